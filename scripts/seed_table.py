"""Mean and spread over training seeds as a Markdown table: python scripts/seed_table.py --runs runs/demo_seeds

Reads RUNS/<model>/<seed>/{eval,consistency}/results.json; each run is already averaged over its mask draws.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import UserError, run_command

TABLES = {"accuracy": ("eval", "acc1"), "consistency": ("consistency", "consistency")}


def table(runs: Path, key: str) -> str:
    """One Markdown table: models down, mask ratios across, mean ± sample standard deviation in percent."""
    folder, metric = TABLES[key]
    header, lines = None, []
    for model in sorted(path for path in runs.iterdir() if path.is_dir()):
        files = sorted(model.glob(f"*/{folder}/results.json"))
        if len(files) < 2:
            raise UserError(
                f"'{model}' has {len(files)} finished seeds, a spread needs 2: run the script that makes them"
            )
        seeds = [json.loads(file.read_text())[key] for file in files]
        columns = list(zip(*seeds, strict=True))
        if header is None:
            header = [f"{key} (%), n = {len(files)} seeds", *(f"{column[0]['mask_ratio']:g}" for column in columns)]
        values = [[row[metric] for row in column] for column in columns]
        lines.append([model.name, *(f"{statistics.fmean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values)])
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with <model>/<seed> runs")
    runs = parser.parse_args().runs
    if not runs.is_dir():
        raise UserError(f"'{runs}' does not exist: run scripts/reproduce/demo_seeds.sh, which makes it")
    print("\n\n".join(table(runs, key) for key in TABLES))


if __name__ == "__main__":
    run_command(main)
