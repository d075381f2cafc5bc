"""Inverting Gradients picture by picture as a table, and what an ATS policy changes on the same pictures.

    python scripts/inverting_gradients_table.py --runs runs/inverting_gradients --output FILE.json

Reads RUNS/<name>/<picture>/results.json, as scripts/reproduce/inverting_gradients.sh makes them, and prints Markdown;
--kept FILE takes the victims that RUNS lacks from an earlier table and names them under 'kept'. --figure FILE.jpg also
draws originals and reconstructions, and under a policy what the model was shown. Intervals are Student's, 95 %, over
pictures; those of one batch are not independent. scripts/results_page.py makes claims of the file.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from claim_numbers import Evidence, Reader, ends

from eval.image_folders import read_image
from eval.reconstruction import mean_colour
from eval.report import read_results, summarised
from reports.charts import new_figure, picture_grid
from reports.tables import Table, markdown
from utils.errors import UserError, run_command
from utils.files import existing_folder, write_atomic, write_json
from utils.statistics import describe
from utils.tool_parser import ToolParser

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {
    "psnr": "PSNR (dB)",
    "psnr_shown": "PSNR to the model's input (dB)",
    "psnr_baseline": "PSNR of the mean colour (dB)",
    "ssim": "SSIM",
    "lpips_alex_unverified": "LPIPS (AlexNet, weights unverified)",
    "objective": "objective",
}
RECOVERED = 25.0  # dB
INPUT_BASELINE = "psnr_input_baseline"  # dB, of the mean colour of what a model was shown under a policy
POLICY = "ATS "  # begin of the names of victims under a policy; behind the comma stands the victim without it
BEYOND = (", trained", ", batches of", ", FedAvg")  # in the names of victims beside the claim: one picture, untrained


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, lower, upper end of its 95 % interval); infinite ends for fewer than two values."""
    return statistics.fmean(values), *ends(describe(values))


def collect(runs: Path) -> dict[str, list[dict]]:
    """Return the pictures of every victim, by name: 'image' and MEASURES, under a policy INPUT_BASELINE too, in the
    order of the runs."""
    found: dict[str, list[dict]] = {}
    for file in sorted(existing_folder(runs, "--runs").glob("*/*/results.json")):
        for row in read_results(file, "per_image")["per_image"]:
            path = Path(row["image"])
            measures = {key: row[key] for key in MEASURES if row.get(key) is not None}
            if file.parts[-3].startswith(POLICY):
                measures[INPUT_BASELINE] = mean_colour(_model_input(file.parent, row["index"])).item()
            found.setdefault(file.parts[-3], []).append({"image": f"{path.parent.name}/{path.name}", **measures})
    if not found:
        raise UserError(f"'{runs}' holds no results: run scripts/reproduce/inverting_gradients.sh, which makes them")
    return found


def with_kept(victims: dict[str, list[dict]], file: Path) -> tuple[dict[str, list[dict]], list[str]]:
    """Return the victims and those of an earlier table that they lack, by name, and the names of the latter."""
    try:
        earlier = json.loads(file.read_text())["victims"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--kept '{file}' is no table that --output of this script has written ({error!r})") from error
    kept = sorted(earlier.keys() - victims.keys())
    return dict(sorted((earlier | victims).items())), kept


def _model_input(run: Path, index: int) -> Tensor:
    """Return what the model was shown of an image of a run, (1, 3, H, W) in [0, 1]."""
    for file in (run / "inputs").glob(f"{index:04d}_*.png"):
        return read_image(file)[None]
    raise UserError(f"'{run}' has no picture of what the model was shown, in inputs/: run this attack again")


def table(victims: dict[str, list[dict]]) -> Table:
    """Return the mean and standard deviation over pictures."""
    lines = []
    for name, rows in victims.items():
        scores = [describe([row[key] for row in rows if key in row]) for key in MEASURES]
        lines.append([name, len(rows), *map(summarised, scores)])
    return Table(["victim", "n", *MEASURES.values()], lines, "± sample standard deviation over pictures")


def draw(runs: Path, names: Sequence[str]) -> "Figure":
    """Return a figure with a row per picture of the first victim of `names`; where another has none there is a gap."""
    columns = [("originals", names[0], "original")]
    for name in names:
        title = name.replace(", ", "\n")
        columns += [("inputs", name, f"{title}:\nmodel's input")] if name.startswith(POLICY) else []
        columns.append(("reconstructions", name, title))
    rows = []
    for place in sorted(path.parent.name for path in (runs / names[0]).glob("*/results.json")):
        files = [next((runs / name / place / kind).glob("*.png"), None) for kind, name, _ in columns]
        own = np.asarray(Image.open(files[0]).convert("RGB"))
        gap = np.full_like(own, 255)
        rows.append([np.asarray(Image.open(file).convert("RGB")) if file else gap for file in files])
    chart = new_figure(1.9 * len(columns), 1.6 * len(rows) + 0.5)
    picture_grid(rows, [title for *_, title in columns], chart)
    return chart


def gains(rows: Sequence[dict]) -> list[float]:
    """Return how far each picture is above its mean colour, in dB."""
    return [row["psnr"] - row["psnr_baseline"] for row in rows]


def reconstructs(read: Reader) -> Evidence:
    """Return the evidence on pictures from untrained CNNs, for results_page.py."""
    victims = read("inverting_gradients")["victims"]
    texts, verdicts, gained = [], {}, {}
    for name, rows in victims.items():
        if len(rows) < 2 or name.startswith(POLICY) or any(part in name for part in BEYOND):
            continue
        gain, low, high = interval(gains(rows))
        psnr, ssim = (describe([row[key] for row in rows]) for key in ("psnr", "ssim"))
        texts.append(
            f"{name}: {psnr['mean']:.1f} ± {psnr['std']:.1f} dB, SSIM {ssim['mean']:.2f}, {gain:+.1f} dB "
            f"[{low:+.1f}, {high:+.1f}] above the mean colour (n = {len(rows)})"
        )
        gained[f"{gain:+.1f} [{low:+.1f}, {high:+.1f}] dB above the mean colour"] = (psnr["mean"], len(rows))
        verdicts[name] = "not decided" if low <= 0 <= high else "does not hold" if high < 0 else "holds in part"
        if low > 0 and psnr["mean"] > RECOVERED:
            verdicts[name] = "holds"
    if not texts:
        return Evidence("no victim with two pictures or more", "not decided")
    best = max(gained, key=gained.get)
    shown = "; ".join(texts), best, f"{gained[best][1]} images"
    if len(set(verdicts.values())) == 1:
        return Evidence(shown[0], next(iter(verdicts.values())) + " at this length", *shown[1:])
    found = list(verdicts.values())
    counts = ", ".join(f"{one} on {found.count(one)} of {len(found)} victims" for one in dict.fromkeys(found))
    if len(found) < 4:
        counts = "; ".join(f"{verdict} on {name}" for name, verdict in verdicts.items())
    return Evidence(shown[0], counts, *shown[1:])


def hides(read: Reader) -> Evidence:
    """Return the evidence on what an ATS policy takes from an attack that works without it.

    Compared on the same pictures, each against what the model was shown: the policy hides it if the attack gets less
    and no more than its mean colour; it holds in part if the attack gets less and still more than that.
    """
    victims = read("inverting_gradients")["victims"]
    texts, verdicts, numbers = [], [], []
    for name, rows in victims.items():
        if not name.startswith(POLICY):
            continue
        policy, plain = name.split(", ", 1)
        without = {row["image"]: row for row in victims.get(plain, [])}
        pairs = [(row, without[row["image"]]) for row in rows if row["image"] in without]
        if not pairs:
            continue
        (shown, low, high), (original, first, last) = (
            interval([row[key] - other["psnr"] for row, other in pairs]) for key in ("psnr_shown", "psnr")
        )
        above, least, most = interval([row["psnr_shown"] - row[INPUT_BASELINE] for row, _ in pairs])
        undefended = statistics.fmean(other["psnr"] for _, other in pairs)
        texts.append(
            f"{policy} on {plain}: {undefended:.1f} dB without it (n = {len(pairs)}); to the model's input "
            f"{shown:+.1f} dB [{low:+.1f}, {high:+.1f}], {above:+.1f} dB [{least:+.1f}, {most:+.1f}] above its mean "
            f"colour; to the original {original:+.1f} dB [{first:+.1f}, {last:+.1f}]"
        )
        number = f"{plain.split(', ')[0]}: {above:+.1f} [{least:+.1f}, {most:+.1f}] dB above its mean colour"
        numbers.append((number, f"{len(pairs)} images"))
        less = "holds in part" if least > 0 else "holds"
        found = less if high < 0 else "does not hold" if low > 0 else f"not decided at n = {len(pairs)}"
        verdicts.append((found, plain))
    if not texts:
        return Evidence("no policy has been attacked on the pictures of its victim", "not decided")
    number, n = ("; ".join(parts) for parts in zip(*numbers, strict=True))
    alike = len({found for found, _ in verdicts}) == 1
    verdict = verdicts[0][0] if alike else "; ".join(f"{found} on {plain}" for found, plain in verdicts)
    return Evidence("; ".join(texts), verdict, number, n)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with <name>/<picture> runs")
    parser.add_argument("--data", default="", help="the victims and their images, in words, kept in FILE")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the scores of all pictures as JSON")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="earlier --output: also its victims that RUNS lacks")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE.jpg", help="also draw the victims of more than one picture"
    )
    given = parser.parse_args()
    measured = collect(given.runs)
    victims, kept = with_kept(measured, given.kept) if given.kept else (measured, [])
    print(markdown(table(victims)))
    content = {"data": given.data, "kept": kept, "victims": victims}
    for what, judge in (("reconstructs", reconstructs), ("the policy hides", hides)):
        found = judge(lambda name: content)
        print(f"{what}: {found.verdict}. {found.text}")
    if given.output:
        write_json(given.output, content)
    if given.figure:
        names = sorted(
            (name for name, rows in measured.items() if len(rows) > 1), key=lambda name: name.startswith(POLICY)
        )
        if not names:
            raise UserError("--figure draws victims of two pictures or more: there are none yet")
        chart = draw(given.runs, names)
        write_atomic(given.figure, lambda file: chart.savefig(file, format="jpeg", dpi=110, pil_kwargs={"quality": 88}))


if __name__ == "__main__":
    run_command(main)
