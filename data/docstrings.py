"""Real sentences that are on every machine with Python: python -m data.docstrings --output DIR

Writes DIR/train.csv and DIR/val.csv (label,text): first sentences of docstrings of the standard library, written by its
authors (licence of Python), labelled by what they describe, a class or a function. They stand in for a corpus where no
public one can be had, and depend on the version of Python.
"""

import ast
import csv
import io
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError, run_command
from utils.files import write_text
from utils.tool_parser import ToolParser

WORDS = (5, 40)  # of a sentence
EVERY = 5  # of the sentences go to val.csv


def sentences(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (label, sentence) of the public classes and functions in the modules of a folder, in order of their names,
    each sentence once."""
    seen = set()
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node))
            if kind is None or node.name.startswith("_"):
                continue
            paragraph = (ast.get_docstring(node) or "").partition("\n\n")[0]
            text = " ".join(paragraph.split()).partition(". ")[0].rstrip(".") + "."
            if WORDS[0] <= len(text.split()) <= WORDS[1] and text.isascii() and text not in seen:
                seen.add(text)
                yield kind, text


def as_csv(rows: list[tuple[str, str]]) -> str:
    """Return rows of (label, text) as CSV with a header."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(("label", "text"))
    writer.writerows(rows)
    return file.getvalue()


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets train.csv and val.csv")
    output = parser.parse_args().output
    files = [output / name for name in ("train.csv", "val.csv")]
    if existing := [str(path) for path in files if path.exists()]:
        raise UserError(f"'{existing[0]}' exists: it is kept; choose another --output")
    rows = list(sentences(Path(sysconfig.get_path("stdlib"))))
    output.mkdir(parents=True, exist_ok=True)
    write_text(files[0], as_csv([row for place, row in enumerate(rows) if place % EVERY]))
    write_text(files[1], as_csv(rows[::EVERY]))
    print(f"{len(rows)} sentences of Python {sys.version.split()[0]} in '{output}'")


if __name__ == "__main__":
    run_command(main)
