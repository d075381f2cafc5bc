"""The last step of `make demo`: python scripts/demo_report.py --runs runs/demo writes report.html and figure.jpg."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.report import curve_panels, read_results
from reports.charts import line_charts, new_figure, picture_grid
from reports.page import Markup, code, figure, heading, page, paragraph, picture, table
from utils.errors import run_command
from utils.files import write_text
from utils.tool_parser import ToolParser

NAMES = {"deit": "plain DeiT", "shuffle": "naive shuffle", "mjp": "MJP"}
RATIOS = ("0", "0.03", "0.09", "0.15", "0.27", "0.5", "0.9")
AWARE = ("0.09", "0.27", "0.5")  # those at which the attacker who knows MJP was measured
PICTURED = ("0.27", "0.5")  # those whose reconstructions by both attackers are shown
DIGIT_ATTACKS = {
    "plain DeiT": "deit/attack_0",
    "naive shuffle, masked step": "shuffle/attack_0.5",
    "MJP, masked step": "mjp/attack_0.5",
    "MJP, unmasked step": "mjp/attack_0",
}


def curves(runs: Path) -> list[dict]:
    """Return panels of accuracy and consistency against mask ratio, with the spread over mask draws."""
    found = {
        name: [read_results(runs / model / part / "results.json") for part in ("eval", "consistency")]
        for model, name in NAMES.items()
    }
    labels = {"xlabel": "mask ratio of the evaluated images", "ylim": (0, 102)}
    return [panel | labels for panel in curve_panels(found)]


def privacy(runs: Path) -> tuple[dict, list[dict], list[dict]]:
    """Return the panel of PSNR against mask ratio for the 224-pixel DeiT-S, and the summaries behind it: of the naive
    attacker and of the one who knows MJP."""

    def read(attacker: str, ratios: tuple[str, ...]) -> list[dict]:
        folders = [runs / "photographs" / f"{attacker}_{ratio}" for ratio in ratios]
        return [read_results(folder / "results.json", "summary")["summary"] for folder in folders]

    naive, aware = read("attack", RATIOS), read("joint", AWARE)
    lines = {
        "naive: whole image": (RATIOS, naive, "psnr"),
        "knows MJP: visible patches": (AWARE, aware, "psnr_visible"),
        "knows MJP: hidden, as a set": (AWARE, aware, "psnr_masked"),
    }
    panel = {
        "title": "One gradient of DeiT-S/16, 224 px",
        "xlabel": "mask ratio of the victim's step",
        "ylabel": "PSNR (dB)",
        "taken": list(NAMES.values()),
        "ylim": (0, 260),  # the legend stands above the lines
        "lines": {
            name: ([float(ratio) for ratio in ratios], [summary[key]["mean"] for summary in summaries])
            for name, (ratios, summaries, key) in lines.items()
        },
        "spread": {
            name: [summary[key]["std"] or 0 for summary in summaries] for name, (_, summaries, key) in lines.items()
        },
    }
    return panel, naive, aware


def photographs(runs: Path) -> tuple[list[str], list[list[Path]]]:
    """Return column titles and, per photograph that both attackers had, the files of the original and what came
    back."""
    shown = {"from the gradient, plain DeiT": runs / "photographs" / "attack_0"}
    for ratio in PICTURED:
        shown[f"MJP {ratio}, naive"] = runs / "photographs" / f"attack_{ratio}"
        shown[f"MJP {ratio}, knows MJP"] = runs / "photographs" / f"joint_{ratio}"
    names = sorted(path.name for path in (runs / "photographs" / f"joint_{PICTURED[0]}" / "reconstructions").iterdir())
    originals = runs / "photographs" / "attack_0" / "originals"
    rows = [[originals / name, *(run / "reconstructions" / name for run in shown.values())] for name in names]
    return ["original", *shown], rows


def overview(panels: list[dict], titles: list[str], rows: list[list[Path]], path: Path) -> None:
    """Draw the figure of the README: what MJP does to accuracy, consistency and privacy."""
    chart = new_figure(13, 8.4)
    top, bottom = chart.subfigures(2, 1, height_ratios=(3.6, 4.6))
    line_charts(panels, top)
    picture_grid([[np.asarray(Image.open(file)) for file in row] for row in rows[:2]], titles, bottom)
    chart.savefig(path, dpi=110, pil_kwargs={"quality": 88})


def build_page(runs: Path) -> str:
    panels = curves(runs)
    private, summaries, aware = privacy(runs)
    titles, files = photographs(runs)
    overview([*panels, private], titles, files, runs / "figure.jpg")
    accuracy = {name: dict(zip(*lines, strict=True)) for name, lines in panels[0]["lines"].items()}
    digits = {
        name: read_results(runs / folder / "results.json", "summary")["summary"]
        for name, folder in DIGIT_ATTACKS.items()
    }
    plain, hidden, attack = accuracy["plain DeiT"], accuracy["MJP"], summaries[0]
    keys = ("psnr", "psnr_shown", "psnr_visible", "exact_pixels")
    header = ["", "PSNR (dB)", "to model input (dB)", "visible patches (dB)", "8-bit values exact (%)"]
    return page(
        "What Masked Jigsaw Puzzle does to accuracy, consistency and privacy",
        paragraph(
            f"Three small ViTs learned handwritten digits. Of clean images plain DeiT reads {plain[0.0]:.1f} %, "
            f"MJP {hidden[0.0]:.1f} %. With 90 % of the patches shuffled, plain DeiT falls to {plain[0.9]:.1f} %, MJP "
            f"keeps {hidden[0.9]:.1f} %. From one shared gradient of a plain DeiT-S/16 the closed-form attack returns "
            f"the photograph at {attack['psnr']['mean']:.0f} dB, {attack['exact_pixels']['mean']:.1f} % of its 8-bit "
            f"values exact, in {attack['seconds']['mean']:.2f} s. Of a step that MJP masks at {PICTURED[-1]} the naive "
            f"attacker gets {_text(summaries[RATIOS.index(PICTURED[-1])], 'psnr')}; who knows MJP gets the visible "
            f"patches at {_text(aware[-1], 'psnr_visible')} and the hidden ones, as a set, at "
            f"{_text(aware[-1], 'psnr_masked')}."
        ),
        heading("Accuracy and consistency against mask ratio"),
        figure(
            [line_charts([panel]) for panel in panels],
            "539 validation digits, one training seed, trained at 0.5; bars: standard deviation over 3 mask draws.",
        ),
        heading("What the gradient gives away"),
        figure(
            line_charts([private]),
            f"DeiT-S/16 at 224 pixels, randomly initialised, batch 1; bars: standard deviation over photographs. Naive "
            f"attacker: closed_form, which ignores how MJP works, float32 gradients, n = {summaries[0]['psnr']['n']}. "
            f"Attacker who knows MJP: joint, float64 gradients, n = {aware[0]['psnr']['n']}; it is told neither mask "
            f"nor labels. Which hidden patch belongs where is in no gradient: they are scored as a set.",
        ),
        paragraph(
            "At ratio 0.03 some block masks come out empty or with a single patch; the attack is then still exact, "
            "hence the spread."
        ),
        table(titles, [[picture(_load(file), 170) for file in row] for row in files]),
        heading("The three trained models"),
        table(
            header, [[name, *(summary[key]["mean"] for key in keys)] for name, summary in digits.items()], cards=True
        ),
        paragraph(
            f"closed_form on one float32 gradient of each digit, batch 1: means over n = "
            f"{digits['plain DeiT']['psnr']['n']} validation digits, of which some are shown.",
            note=True,
        ),
        _digit_pictures(runs),
        heading("How to read this"),
        paragraph(
            "A naive shuffle protects only the order of the patches: measured against what the model was shown, the "
            "reconstruction is as exact as without it. MJP breaks the equations of the naive attack on masked steps; "
            "on the steps it leaves unmasked (here every second one, and the whole warm-up) the image leaks as before."
        ),
        paragraph(
            "A low PSNR of a naive attack is no privacy guarantee. Who knows that MJP is in use reads the mask off the "
            "gradient (its rows are exactly zero) and solves one eigenvalue problem for all patches, hidden ones too: "
            "attack.py --attack joint, here in double precision. What MJP keeps is the order of the hidden patches, "
            "which the attack can only guess from their borders. From single precision, as clients send it, the same "
            "attack takes longer and returns less; docs/results.md has numbers."
        ),
        heading("Commands"),
        Markup(f"<p>{code('scripts/demo.sh')} ran everything; each run folder holds its config.yaml and log.txt.</p>"),
    )


def _text(summary: dict, key: str) -> str:
    """Return a mean with its spread and number of photographs, for a sentence."""
    row = summary[key]
    return f"{row['mean']:.0f} ± {row['std'] or 0:.0f} dB (n = {row['n']})"


def _load(file: Path):
    return to_tensor(Image.open(file))


def _digit_pictures(runs: Path) -> Markup:
    folders = [runs / folder for folder in DIGIT_ATTACKS.values()]
    names = sorted(path.name for path in (folders[0] / "originals").iterdir())[::4]
    rows = []
    for name in names:
        reconstructions = [picture(_load(folder / "reconstructions" / name), 96) for folder in folders]
        rows.append([picture(_load(folders[0] / "originals" / name), 96), *reconstructions])
    return table(["original", *DIGIT_ATTACKS], rows)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="folder scripts/demo.sh wrote")
    runs = parser.parse_args().runs
    write_text(runs / "report.html", build_page(runs))
    print(f"\nopen {runs / 'report.html'}")


if __name__ == "__main__":
    run_command(main)
