"""Prose of Markdown pages in lines that fit a screen.

python -m reports.prose docs/attacks.md      # wraps the long lines of the page, in place
"""

import re
import textwrap

from utils.errors import run_command
from utils.files import existing_file, write_text
from utils.tool_parser import ToolParser

WIDTH = 120
KEPT = ("|", "#", "!", "    ")  # begins of tables, headings, figures and code
ITEM = re.compile(r"\s*(?:[-*+]|\d+\.) +")
# What would begin a list, a heading, a quotation or a table at the start of a line stays where it is, ± and % too.
GLUED = re.compile(r" (?=[±%]|(?:[-+*>|=#]|\d+[.)])(?: |$))")


def wrap_markdown(text: str, width: int = WIDTH) -> str:
    """Return a page whose paragraphs and list items have lines of at most `width`; short ones stay as they are.

    Tables, headings, blocks of code, comments and figures are not touched, nor words longer than a line.
    """
    lines: list[str] = []
    for part in re.split(r"(^ *```.*?^ *```|^<!--.*?-->)", text, flags=re.DOTALL | re.MULTILINE):
        lines.append(part if part.lstrip().startswith(("```", "<!--")) else _wrapped_part(part, width))
    return "".join(lines)


def _wrapped_part(text: str, width: int) -> str:
    """Return the text between blocks of code with its paragraphs wrapped."""
    found = re.split(r"(\n[ \t]*(?=\n))", text)  # paragraphs at even places, the empty lines between them
    found[::2] = [_wrapped_paragraph(paragraph, width) for paragraph in found[::2]]
    return "".join(found)


def _wrapped_paragraph(text: str, width: int) -> str:
    """Return a paragraph, or the items of a list, each wrapped where it has a long line."""
    lead, tail = ("\n" if text.startswith("\n") else ""), ("\n" if text[1:].endswith("\n") else "")
    pieces: list[list[str]] = []
    for line in text.removeprefix("\n").removesuffix("\n").split("\n"):
        open_item = bool(pieces) and not pieces[-1][0].startswith(KEPT)
        goes_on = open_item and not ITEM.match(line) and (line.startswith("    ") or not line.startswith(KEPT))
        if goes_on:
            pieces[-1].append(line)
        else:
            pieces.append([line])
    return lead + "\n".join("\n".join(_wrapped(piece, width)) for piece in pieces) + tail


def _wrapped(lines: list[str], width: int) -> list[str]:
    """Return one paragraph or list item, wrapped if a line is long."""
    if lines[0].startswith(KEPT) or max(map(len, lines)) <= width:
        return lines
    marker = found[0] if (found := ITEM.match(lines[0])) else re.match(r"\s*", lines[0])[0]
    words = " ".join(line.strip() for line in [lines[0][len(marker) :], *lines[1:]])
    wrapped = textwrap.wrap(
        GLUED.sub("\0", words), width, initial_indent=marker, subsequent_indent=" " * len(marker),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [line.replace("\0", " ") for line in wrapped]


def main() -> None:
    parser = ToolParser(prog="reports.prose", description=__doc__)
    parser.add_argument("pages", nargs="+", help="Markdown files")
    for page in [existing_file(page, "page") for page in parser.parse_args().pages]:
        write_text(page, wrap_markdown(page.read_text()))


if __name__ == "__main__":
    run_command(main)
