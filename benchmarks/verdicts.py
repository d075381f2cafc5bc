"""One table of what benchmarks measured: ratio, goal and verdict of every comparison that has a goal.

    python -m benchmarks.verdicts runs/bench/*.json

Reads what the benchmarks write with --json. A goal is `<= x` or `>= x`; a goal is reached where the median ratio keeps
it, and `open` says that the quartiles lie on both sides of it. Below stands what files without comparisons say: the
verdict of an attack, the accuracy of a training, the notes of a benchmark.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from reports.tables import Table, plain
from utils.errors import UserError, run_command
from utils.tool_parser import ToolParser


def verdict(ratio: float, quartiles: Sequence[float], goal: str) -> str:
    """Return 'reached' or 'missed', and ', open' where one quartile says otherwise. Raises UserError for no goal."""
    sign, _, number = goal.partition(" ")
    try:
        limit = float(number)
    except ValueError:
        sign = ""
    if sign not in ("<=", ">="):
        raise UserError(f"goal '{goal}' is not '<= x' or '>= x'")

    def kept(value: float) -> bool:
        return value <= limit if sign == "<=" else value >= limit

    said = "reached" if kept(ratio) else "missed"
    return said + ", open" * (len({kept(value) for value in (ratio, *quartiles)}) > 1)


def rows_of(file: Path) -> list[list[str]]:
    """Return the rows (what, ratio, quartiles, goal, verdict) of one file, those without a goal left out."""
    try:
        content = json.loads(file.read_text())
        rows = [row for row in content.get("rows", ()) if row.get("goal")]
        return [
            [
                row["what"],
                f"{row['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*row["quartiles"]),
                row["goal"],
                verdict(row["ratio"], row["quartiles"], row["goal"]),
            ]
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{file}' is not what a benchmark writes with --json ({error})") from error


def findings(file: Path) -> list[str]:
    """Return what a file says beside comparisons with a goal, as lines."""
    content = json.loads(file.read_text())
    said = [content["verdict"]] if "verdict" in content else []
    if "acc1" in content:
        said.append(f"accuracy {content['acc1']:.2f} % of {content['images']} images, {content.get('epochs')} epochs")
    rows = content.get("rows", ())
    if not any(row.get("goal") for row in rows):
        said += [f"{row['what']}: {row['ratio']:.3f}, no goal" for row in rows]
    said += content.get("notes") or []
    for key, value in content.items():
        if " against " in key and None not in value:  # a correlation and its interval
            said.append("{}: {:.2f} [{:.2f}, {:.2f}]".format(key, *value))
    if content.get("passed"):
        said.append("passed")
    return [f"{file.stem}: {line}" for line in said]


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="files of results")
    rows, said = [], []
    for file in parser.parse_args().files:
        rows += rows_of(file)
        said += findings(file)
    for line in (*plain(Table(["comparison", "ratio", "quartiles", "goal", "verdict"], rows)), *said):
        print(line)


if __name__ == "__main__":
    run_command(main)
