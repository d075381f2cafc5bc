"""What attacks read of the same sentences, token by token, beside what the client wrote, as one figure file.

    python scripts/sentence_figure.py --runs RUN RUN --titles DLG TAG --output FIGURE.png

Reads the sentences.json of folders that attack.py writes. Green is a token in its place, yellow one that the sentence
has elsewhere, red one that it does not have.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reports.charts import new_figure
from reports.sentences import colours
from utils.errors import UserError, run_command
from utils.tool_parser import ToolParser

PAINT = {"exact": "#bbf7d0", "moved": "#fef08a", "wrong": "#fecaca", "plain": "#f1f5f9"}  # those of report.html
LETTER, GAP, LINE = 0.068, 0.11, 0.24  # inches: a letter, between tokens, a line
ASIDE, APART = 0.75, 0.12  # inches: for the names, between sentences
WRITTEN = "written"


def sentences(run: Path, number: int) -> list[dict]:
    """Return the first sentences of a run, {'original', 'input', 'reconstruction': lists of tokens}. Raises UserError
    where a folder holds no attack on sentences, or fewer."""
    file = run / "sentences.json"
    if not file.is_file():
        raise UserError(f"'{run}' is no finished run of attack.py on sentences: it holds no sentences.json")
    found = json.loads(file.read_text())
    if len(found) < number:
        raise UserError(f"'{file}' holds {len(found)} sentences, {number} are wanted: check --runs and --number")
    return found[:number]


def lines_of(tokens: Sequence[str], width: float) -> list[list[tuple[float, int]]]:
    """Return tokens laid out in lines of at most `width` inches: for each line (where one begins, its place)."""
    lines, at = [[]], 0.0
    for place, token in enumerate(tokens):
        taken = LETTER * len(token) + GAP
        if at and at + taken > width:
            lines.append([])
            at = 0.0
        lines[-1].append((at, place))
        at += taken
    return lines


def blocks(runs: Sequence[Path], titles: Sequence[str], number: int) -> list[tuple[str, list[str], list[str]]]:
    """Return (name, tokens, kinds) for every sentence as it was written and as every run has it, one after another.
    Raises UserError where the runs attacked different sentences."""
    found = [sentences(run, number) for run in runs]
    rows = []
    for same in zip(*found, strict=True):
        original = same[0]["original"]
        if any(one["original"] != original for one in same):
            raise UserError("--runs: the runs attacked different sentences, give runs on the same ones")
        rows.append((WRITTEN, original, ["plain"] * len(original)))
        for title, one in zip(titles, same, strict=True):
            rows.append((title, one["reconstruction"], colours(one["reconstruction"], original)))
    return rows


def figure(rows: Sequence[tuple[str, list[str], list[str]]], width: float) -> object:
    """Return the figure of `blocks`, `width` inches wide."""
    laid = [lines_of(tokens, width - ASIDE) for _, tokens, _ in rows]
    height = LINE * sum(map(len, laid)) + APART * sum(name == WRITTEN for name, _, _ in rows)
    chart = new_figure(width, height + 0.1)
    chart.set_layout_engine("none")  # places are given in inches
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height + 0.1, 0))
    axes.axis("off")
    down = 0.0
    for (name, tokens, kinds), lines in zip(rows, laid, strict=True):
        down += APART if name == WRITTEN else 0
        axes.text(0.05, down + LINE / 2, name, va="center", fontsize=8, fontweight="bold", color="#475569")
        for line in lines:
            for at, place in line:
                box = {"boxstyle": "round,pad=0.15,rounding_size=0.2", "color": PAINT[kinds[place]], "linewidth": 0}
                axes.text(
                    ASIDE + at, down + LINE / 2, tokens[place], va="center", fontsize=8, family="monospace", bbox=box
                )
            down += LINE
    return chart


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of attack.py, the same sentences")
    parser.add_argument("--titles", nargs="+", required=True, help="what to call them, one for each run")
    parser.add_argument("--number", type=int, default=4, help="sentences to show (default: 4)")
    parser.add_argument("--width", type=float, default=9.0, help="of the figure, in inches (default: 9)")
    parser.add_argument("--output", type=Path, required=True, help="figure file; the suffix chooses the format")
    given = parser.parse_args()
    if len(given.titles) != len(given.runs):
        raise UserError(f"--titles has {len(given.titles)} entries for {len(given.runs)} runs: give one each")
    if given.number < 1 or given.width < 2:
        raise UserError(f"--number must be 1 or more and --width 2 or more, got {given.number} and {given.width}")
    figure(blocks(given.runs, given.titles, given.number), given.width).savefig(given.output, dpi=110)


if __name__ == "__main__":
    run_command(main)
