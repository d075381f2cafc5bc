"""Pictures of several attacks on the same images, side by side, as one figure file.

python scripts/attack_figure.py --runs RUN RUN --titles "naive attacker" "attacker who knows MJP" --output FIGURE.jpg

Reads the folders attack.py writes; the first run gives the originals and what the model was shown. With --batches
each run is a batch of images of its own: its originals above what came back.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reports.charts import new_figure, picture_grid
from utils.errors import UserError, run_command
from utils.tool_parser import ToolParser


def pictures(run: Path, kind: str, number: int) -> list[np.ndarray]:
    """Return the first pictures of a kind (originals, inputs, reconstructions) in a run folder, (H, W, 3) uint8."""
    files = sorted((run / kind).glob("*.png"))[:number]
    if len(files) < number:
        raise UserError(f"'{run / kind}' holds {len(files)} pictures, {number} are wanted: check --runs and --number")
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def batch_figure(runs: list[Path]) -> object:
    """Return the figure of runs that are one batch each; rows of smaller batches end in white."""
    sizes = [len(sorted((run / "originals").glob("*.png"))) for run in runs]
    rows = []
    for run, size in zip(runs, sizes, strict=True):
        for kind in ("originals", "reconstructions"):
            own = pictures(run, kind, size)
            rows.append(own + [np.full_like(own[0], 255)] * (max(sizes) - size))
    chart = new_figure(1.1 * max(sizes), 1.1 * len(rows))
    picture_grid(rows, [""] * max(sizes), chart)
    return chart


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of finished attack.py runs")
    parser.add_argument("--titles", nargs="+", default=[], help="what to call them, one for each run")
    parser.add_argument("--number", type=int, default=4, help="images to show (default: 4)")
    parser.add_argument("--across", action="store_true", help="one column for each image: private, then each run's")
    parser.add_argument(
        "--batches", action="store_true", help="two rows for each run: its own originals, what came back"
    )
    parser.add_argument("--output", type=Path, required=True, help="figure file; the suffix chooses the format")
    given = parser.parse_args()
    if not given.across and not given.batches and len(given.titles) != len(given.runs):
        raise UserError(f"--titles has {len(given.titles)} entries for {len(given.runs)} runs: give one each")
    for run in given.runs:
        if not (run / "results.json").is_file():
            raise UserError(f"'{run}' is not a finished run of attack.py: it holds no results.json")
    if given.batches:
        chart = batch_figure(given.runs)
        chart.savefig(given.output, dpi=110)
        return
    reconstructions = [pictures(run, "reconstructions", given.number) for run in given.runs]
    if given.across:
        rows = [pictures(given.runs[0], "originals", given.number), *reconstructions]
        chart = new_figure(1.6 * given.number, 1.75 * len(rows))
        picture_grid(rows, [""] * given.number, chart)
        chart.savefig(given.output, dpi=110)
        return
    columns = [pictures(given.runs[0], kind, given.number) for kind in ("originals", "inputs")] + reconstructions
    titles = ["private image", "what the model saw"]
    for run, title in zip(given.runs, given.titles, strict=True):
        summary = json.loads((run / "results.json").read_text())["summary"]
        titles.append(f"{title}\n{summary['psnr_visible']['mean']:.1f} dB on visible patches")
    chart = new_figure(2.3 * len(columns), 2.3 * given.number + 0.4)
    picture_grid(list(zip(*columns, strict=True)), titles, chart)
    chart.savefig(given.output, dpi=110)


if __name__ == "__main__":
    run_command(main)
