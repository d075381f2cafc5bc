"""The recovery of sentences over the runs of scripts/reproduce/text.sh, as a Markdown table.

python scripts/text_table.py --runs DIR [--output FILE.json]
"""

import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.report import read_results
from eval.text_scores import SENTENCE_METRICS
from reports.tables import Measured, Table, markdown
from utils.aliases import current
from utils.errors import UserError, run_command
from utils.files import existing_folder, write_json
from utils.tool_parser import ToolParser

COLUMNS = ("tokens_in_place", "tokens_any_order", "tokens_visible", "tokens_masked", "rougeL", "bleu", "seconds")
WHO = {"none": "naive", "method": "knows MJP"}


def rows(folder: Path) -> list[list]:
    """Return a row per finished run below `folder`, by victim, mask ratio, attack, attacker and batch size. Raises
    UserError for a folder without runs, and for other results in it."""
    found = []
    for path in existing_folder(folder, "--runs").rglob("results.json"):
        summary, config = read_results(path, "summary")["summary"], path.parent / "config.yaml"
        if not config.is_file() or "tokens_in_place" not in summary:
            raise UserError(f"'{path.parent}' is no run of attack.py on sentences: give a folder of such runs alone")
        run = current(yaml.safe_load(config.read_text()))
        victim = path.parent.parent.name
        prior = ", public text" if run["data"].get("public") else ""
        who = WHO[run["attacker_knowledge"]] + prior if run["mask_ratio"] else "–"
        scores = [summary.get(key, {"mean": None, "std": None}) for key in COLUMNS]
        found.append(
            [victim, run["mask_ratio"], run["attack"], who, run.get("batch_size", 1), summary["tokens_in_place"]["n"]]
            + [Measured(score["mean"], score["std"]) for score in scores]
        )
    if not found:
        raise UserError(f"'{folder}' holds no results: run scripts/reproduce/text.sh, which makes them")
    return sorted(found, key=lambda row: row[:5])


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of attack runs, VICTIM/NAME/results.json")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--data", default="", help="the victim and its sentences, in words, kept in FILE")
    parser.add_argument("--command", default="", help="what made the runs, kept in FILE")
    given = parser.parse_args()
    header = [
        "victim",
        "mask ratio",
        "attack",
        "attacker",
        "batch",
        "n",
        *(str(SENTENCE_METRICS[key]) for key in COLUMNS),
    ]
    lines = [[row[0], f"{row[1]:g}", *row[2:]] for row in rows(given.runs)]
    print(markdown(Table(header, lines)), end="")
    if given.output:
        keys = ["victim", "mask_ratio", "attack", "attacker", "batch_size", "n", *COLUMNS]
        found = [
            {
                key: {"mean": cell.mean, "std": cell.std} if isinstance(cell, Measured) else cell
                for key, cell in zip(keys, row, strict=True)
            }
            for row in rows(given.runs)
        ]
        write_json(given.output, {"data": given.data, "command": given.command, "rows": found})


if __name__ == "__main__":
    run_command(main)
