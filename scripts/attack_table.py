"""Attack scores against mask ratio as a table: python scripts/attack_table.py --runs runs/closed_form_curve

Reads RUNS/<name>/<ratio>/<seed>/results.json; means run over images and seeds. --by says what the names are. Prints
Markdown; --output STEM also writes STEM.md, STEM.tex, STEM.csv and STEM.json, {"data": the victims in words, "attacks":
{name: {ratio: {measure: {mean, std, n}}}}}.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.reconstruction import METRICS
from eval.report import read_results, summarised
from reports.tables import Measured, Table, markdown, write_table
from utils.aliases import ATTACKS
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.statistics import summarize
from utils.tool_parser import ToolParser

COLUMNS = ("psnr_visible_raw", "psnr_visible", "psnr_masked", "psnr", "psnr_baseline", "exact_pixels", "seconds")
MORE = ("ssim", "lpips_alex", "lpips_alex_unverified")  # columns of tables whose runs have them


def summaries(runs: Path) -> dict[str, dict[str, dict]]:
    """Return {name: {ratio: summary of every measure over images and seeds}}."""
    found: dict[str, dict[str, dict]] = {}
    for sampler in sorted(path for path in runs.iterdir() if path.is_dir()):
        for ratio in sorted(filter(_is_ratio, sampler.iterdir()), key=lambda path: float(path.name)):
            images = []
            for file in sorted(ratio.glob("*/results.json")):
                images += read_results(file, "per_image")["per_image"]
            if images:
                name = re.sub(r"\w+$", lambda last: ATTACKS.get(last[0], last[0]), sampler.name)  # "model: attack"
                keys = [*COLUMNS, *(key for key in MORE if all(row.get(key) is not None for row in images))]
                images = [{key: row.get(key) for key in keys} for row in images]
                found.setdefault(name, {})[ratio.name] = summarize(images, keys) | {"images": len(images)}
    if not found:
        raise UserError(f"'{runs}' holds no results: run scripts/reproduce/closed_form_curve.sh, which makes them")
    return found


def _is_ratio(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"\d+(\.\d+)?", path.name) is not None


def columns(found: dict[str, dict[str, dict]]) -> dict[str, str]:
    """Return the columns of a table with their labels: COLUMNS, and those of MORE that some run has."""
    every = [summary for ratios in found.values() for summary in ratios.values()]
    keys = [*COLUMNS, *(key for key in MORE if any(key in summary for summary in every))]
    return {key: str(METRICS[key]) for key in keys}


def rows(found: dict[str, dict[str, dict]]) -> list[list[str | int | Measured]]:
    lines, keys = [], columns(found)
    for name, ratios in found.items():
        for ratio, summary in ratios.items():
            scores = [summary.get(key) for key in keys]
            cells = [summarised(one | {"std": one["std"] or 0}) if one else Measured(None) for one in scores]
            lines.append([name, ratio, summary["images"], *cells])
    return lines


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with <name>/<ratio>/<seed> runs")
    parser.add_argument("--by", default="sampler", help="heading of the first column (default: sampler)")
    parser.add_argument("--data", default="", help="the victims and their images, in words, kept in STEM.json")
    parser.add_argument("--output", type=Path, metavar="STEM", help="also write STEM.md, .tex, .csv and .json")
    given = parser.parse_args()
    runs = given.runs
    if not runs.is_dir():
        raise UserError(f"'{runs}' does not exist: run scripts/reproduce/closed_form_curve.sh, which makes it")
    caption = "Reconstructions; ± sample standard deviation over images and seeds"
    found = summaries(runs)
    table = Table([given.by, "mask ratio", "n", *columns(found).values()], rows(found), caption)
    print(markdown(table), end="")
    if given.output:
        write_table(given.output, table)
        write_json(given.output.with_suffix(".json"), {"data": given.data, "attacks": found})


if __name__ == "__main__":
    run_command(main)
