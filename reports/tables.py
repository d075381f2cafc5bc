"""Tables of measured values as Markdown, LaTeX and CSV, and as plain lines for a log."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.files import write_text

# What LaTeX reads as commands, and what its fonts have another way of saying.
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{sign: rf"\{sign}" for sign in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "–": "--",
        "∞": r"$\infty$",
        "−": "$-$",
        "γ": r"$\gamma$",
    }
)


class Measured(NamedTuple):
    """A mean and its spread, each with the format it is printed in. No spread: only the mean. No mean: a dash."""

    mean: float | None
    std: float | None = None
    digits: str = ".1f"
    std_digits: str = ".1f"

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        spread = "" if self.std is None else f" ± {self.std:{self.std_digits}}"
        return f"{self.mean:{self.digits}}{spread}"


class Table(NamedTuple):
    """Rows of text, whole numbers and `Measured` values under a header; the caption says what they are."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | Measured]]
    caption: str = ""


COLUMNS = 8  # of a table that a page shows without scrolling


def markdown(table: Table) -> str:
    """Return a pipe table, or below each other as many of `COLUMNS` columns as it takes; numbers stand to the right."""
    return "\n".join(map(_piped, narrowed(table)))


def narrowed(table: Table) -> list[Table]:
    """Return tables of at most `COLUMNS` columns: each repeats the first columns, as far as they are text."""
    if len(table.header) <= COLUMNS:
        return [table]
    texts = [all(isinstance(row[place], str) for row in table.rows) for place in range(len(table.header))]
    keys = min([*texts, False].index(False) or 1, COLUMNS // 2)
    size = -(-(len(table.header) - keys) // -(-(len(table.header) - keys) // (COLUMNS - keys)))  # about equal parts
    parts = []
    for start in range(keys, len(table.header), size):
        header, *rows = ([*row[:keys], *row[start : start + size]] for row in (table.header, *table.rows))
        parts.append(Table(header, rows, table.caption))
    return parts


def _piped(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (table.header, *table.rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (lines[0], rule, *lines[1:]))


def latex(table: Table) -> str:
    """Return a `table` environment with the rules of the package booktabs; whatever names contain is printed as it
    stands."""
    lines = [" & ".join(str(cell).translate(LATEX) for cell in line) + r" \\" for line in (table.header, *table.rows)]
    caption = [rf"\caption{{{table.caption.translate(LATEX)}}}"] if table.caption else []
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            *caption,
            rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(table: Table) -> str:
    """Return CSV in full precision: a column of means and, where any value has a spread, one of standard deviations."""
    columns = []
    for place, name in enumerate(table.header):
        cells = [row[place] for row in table.rows]
        measured = [cell if isinstance(cell, Measured) else Measured(cell) for cell in cells]
        columns.append([name, *(cell.mean for cell in measured)])
        if any(cell.std is not None for cell in measured):
            columns.append([f"{name} std", *(cell.std for cell in measured)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    return text.getvalue()


def plain(table: Table) -> list[str]:
    """Return the table as aligned lines of text."""
    lines = [[str(cell) for cell in line] for line in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


FORMATS = {"md": markdown, "tex": latex, "csv": comma_separated}


def write_table(stem: str | Path, table: Table) -> None:
    """Write STEM.md, STEM.tex and STEM.csv."""
    for suffix, form in FORMATS.items():
        write_text(f"{stem}.{suffix}", form(table))
