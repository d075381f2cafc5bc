"""R-GAP and the hybrid over all their targets, and beside other attacks: a table, and two figures.

python scripts/hybrid_figures.py --runs runs/hybrid --output docs/figures

Reads what scripts/reproduce/hybrid.sh makes: RUNS/index/<attack>/<target>/results.json gives the table on stdout and
hybrid_index.png, the PSNR of each network by its security index; RUNS/compare/<attack>/<target>/results.json with its
pictures gives hybrid_comparison.jpg. --rows docs/results/hybrid.json draws the first figure of docs/results.md alone.
--kept FILE: a target whose runs are not at hand keeps its row of FILE, rows of an earlier run; the comparison is drawn
where there is one.
"""

import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.security import security
from eval.report import read_results, summarised
from models import build_model
from models.chains import TARGETS
from reports.charts import color_of, new_figure, open_axes
from reports.tables import Measured, Table, markdown
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.statistics import summarize
from utils.tool_parser import ToolParser

NAMES = {
    "dlg": "DLG",
    "cosine": "cosine + TV",
    "inverting_gradients": "Inverting Gradients",
    "rgap": "R-GAP",
    "hybrid": "hybrid",
}
PEAK_255 = 20 * math.log10(255)  # dB by which the hybrid's own code is off: it takes 255 for the peak of [0, 1] images


def index_rows(runs: Path) -> list[dict]:
    """Return per target with runs: its index, and by attack the summary of PSNR and seconds over images."""
    rows = []
    for name in TARGETS:
        found = {
            attack: summarize(
                read_results(runs / attack / name / "results.json", "per_image")["per_image"], ["psnr", "seconds"]
            )
            for attack in ("rgap", "hybrid")
            if (runs / attack / name).is_dir()
        }
        if found:
            index = security(build_model(name, num_classes=10, image_size=32))["index"]
            rows.append({"name": name, "index": index, **found})
    return in_order(rows)


def with_kept(rows: list[dict], kept: list[dict]) -> list[dict]:
    """Return `rows`, and those of `kept` whose target they lack."""
    names = {row["name"] for row in rows}
    return in_order([*rows, *(row for row in kept if row["name"] not in names)])


def in_order(rows: list[dict]) -> list[dict]:
    """Return rows from the largest index down, then by name."""
    return sorted(rows, key=lambda row: (-row["index"], row["name"]))


def table(rows: list[dict]) -> Table:
    """Return PSNR and seconds an image of both attacks on every target."""
    header, lines = ["target", "index"], []
    for attack in ("rgap", "hybrid"):
        header += [f"{NAMES[attack]} (dB)", "same, peak 255 as in their code", "n", "seconds"]
    for row in rows:
        line = [f"`{row['name']}`", Measured(row["index"], None, ".6g")]
        for scores in (row.get(attack, {"psnr": None, "seconds": None}) for attack in ("rgap", "hybrid")):
            number = scores["psnr"]["n"] if scores["psnr"] else "–"
            mean = scores["psnr"] and scores["psnr"]["mean"]
            theirs = Measured(None if mean is None else mean + PEAK_255)
            line += [summarised(scores["psnr"], ".1f", ".1f"), theirs, number, summarised(scores.get("seconds"), ".2g")]
        lines.append(line)
    return Table(header, lines, "R-GAP and the hybrid on every target; ± sample standard deviation over images")


def index_figure(rows: list[dict]) -> Figure:
    """Draw left the networks that linear systems determine, right the others, from the largest index down: a line
    each."""
    exact = [row for row in rows if row["index"] == 0]
    others = [row for row in rows if row["index"] != 0]
    chart = new_figure(8.0, 0.9 + 0.19 * max(len(exact), len(others)))
    with open_axes():
        for axes, own in zip(chart.subplots(1, 2, width_ratios=(1, 1.4)), (exact, others), strict=True):
            heights = range(len(own), 0, -1)
            for attack, marker in (("rgap", "o"), ("hybrid", "D")):
                found = [
                    (height, row[attack]["psnr"]) for height, row in zip(heights, own, strict=True) if attack in row
                ]
                axes.errorbar(
                    [score["mean"] for _, score in found], [height for height, _ in found],
                    xerr=[score["std"] or 0 for _, score in found], label=NAMES[attack], color=color_of(attack),
                    marker=marker, markersize=5, linestyle="", capsize=2,
                )  # fmt: skip
            names = [f"{row['name']} ({row['index']:g})" if row["index"] else row["name"] for row in own]
            axes.set_yticks(heights, names, fontsize=8)
            axes.set(xlabel="PSNR (dB)", ylim=(0.4, len(own) + 0.6))
            axes.set_title("index 0" if own is exact else "network (index)", loc="left", fontsize=9)
            axes.grid(axis="x", color="#e2e8f0")
            axes.set_axisbelow(True)
        axes.set_xlim(0, None)
        axes.legend(frameon=False, loc="lower right")
    return chart


def comparison_figure(runs: Path):
    """Return a row for each target and photograph, a column for each attack, its PSNR below."""
    attacks = [name for name in NAMES if (runs / name).is_dir()]
    targets = sorted({path.name for name in attacks for path in (runs / name).iterdir()})
    lines = []
    for target in targets:
        by_attack = {
            name: read_results(runs / name / target / "results.json", "per_image")["per_image"] for name in attacks
        }
        for place, picture in enumerate(sorted((runs / attacks[0] / target / "originals").glob("*.png"))):
            cells = [(Image.open(picture), target)]
            for name in attacks:
                found = runs / name / target / "reconstructions" / picture.name
                cells.append((Image.open(found), f"{by_attack[name][place]['psnr']:.1f} dB"))
            lines.append(cells)
    chart = new_figure(1.25 * (1 + len(attacks)), 1.42 * len(lines) + 0.3)
    titles = ["original", *(NAMES[name] for name in attacks)]
    for line, row in enumerate(chart.subplots(len(lines), len(titles), squeeze=False)):
        for axes, title, (image, caption) in zip(row, titles, lines[line], strict=True):
            axes.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(caption, fontsize=8, labelpad=2)
            axes.spines[:].set_visible(False)
            if line == 0:
                axes.set_title(title, fontsize=8)
    return chart


def main() -> None:
    parser = ToolParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=Path, help="folder that scripts/reproduce/hybrid.sh wrote")
    source.add_argument("--rows", type=Path, help="hybrid_index.json of such runs: draws hybrid_index.png alone")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures and hybrid_index.json")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="rows of an earlier run, for targets not at hand")
    given = parser.parse_args()
    if given.rows and given.kept:
        raise UserError("--kept completes the rows of --runs: leave it out with --rows")
    if given.runs:
        kept = read_results(given.kept, "rows")["rows"] if given.kept else []
        compared = (given.runs / "compare").is_dir()
        for name in ("index", *(["compare"] if not given.kept else [])):
            if not (given.runs / name).is_dir():
                raise UserError(
                    f"'{given.runs / name}' does not exist: run scripts/reproduce/hybrid.sh, which makes it"
                )
        rows = with_kept(index_rows(given.runs / "index"), kept)
        print(markdown(table(rows)))
        given.output.mkdir(parents=True, exist_ok=True)
        write_json(given.output / "hybrid_index.json", {"rows": rows})
        if compared:
            comparison_figure(given.runs / "compare").savefig(given.output / "hybrid_comparison.jpg", dpi=140)
    else:
        rows = read_results(given.rows, "rows")["rows"]
    index_figure(rows).savefig(given.output / "hybrid_index.png", dpi=110)


if __name__ == "__main__":
    run_command(main)
