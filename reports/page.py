"""Pages people look at: self-contained HTML with embedded pictures and figures, nothing fetched, every name escaped."""

import base64
import hashlib
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from unicodedata import category

from PIL import Image
from torch import Tensor

from reports.glossary import GLOSSARY
from utils.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1e293b; background: #f8fafc; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 21px; margin: 48px 0 8px; }
p { max-width: 72ch; } p.note { color: #64748b; font-size: 14px; }
code { font: 13px ui-monospace, monospace; background: #e2e8f0; border-radius: 4px; padding: 1px 5px; }
code { overflow-wrap: anywhere; }
table { border-collapse: collapse; background: #fff; margin: 12px 0; }
table { font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 7px 14px; border-bottom: 1px solid #e2e8f0; text-align: right; white-space: nowrap; }
th { color: #475569; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td img { display: block; margin: auto; border-radius: 4px; image-rendering: pixelated; }
td.picture { padding: 6px; } th.picture { text-align: center; white-space: normal; padding: 7px 6px; }
figure { margin: 16px 0; } figure img { max-width: 100%; background: #fff; border-radius: 8px; }
figure.several img { width: 550px; vertical-align: top; }
.scroll { overflow-x: auto; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 12px 0; font-size: 14px; }
dl.facts dt { color: #475569; font-weight: 600; } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
th button { all: unset; display: block; width: 100%; cursor: pointer; } th button:hover { color: #c2410c; }
th button:focus-visible { outline: 2px solid #c2410c; outline-offset: 3px; border-radius: 2px; }
th[aria-sort] button::before { content: "\\2191\\a0"; color: #c2410c; }
th[aria-sort="descending"] button::before { content: "\\2193\\a0"; }
.lead { font-size: 18px; line-height: 1.5; } .lead strong { color: #c2410c; }
abbr { text-decoration: underline dotted #94a3b8; text-underline-offset: 3px; cursor: help; }
@media (max-width: 640px) {
  .cards, .cards tbody, .cards tr, .cards td { display: block; } .cards { width: 100%; }
  .cards thead { display: none; } .cards tr { border-bottom: 2px solid #cbd5e1; padding: 8px 0; }
  .cards td { display: grid; grid-template-columns: 38% minmax(0, 1fr); gap: 0 10px; padding: 2px 12px; border: 0; }
  .cards td { text-align: left; white-space: normal; min-width: 0; overflow-wrap: anywhere; }
  .cards td::before { content: attr(data-label); color: #64748b; overflow-wrap: anywhere; }
  .cards td:first-child { font-weight: 600; }
  main { padding: 24px 16px 48px; } h1 { font-size: 25px; } .lead { font-size: 17px; }
  table:has(td.picture) { width: 100%; table-layout: fixed; } td.picture { padding: 2px; }
  td.picture img { width: 100%; height: auto; } th.picture { white-space: normal; font-size: 12px; padding: 4px 2px; }
}
"""
# Sorts tables of class "sortable" by the data-value of a column's cells: numbers as numbers, empty values always last.
SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = (body) => body.rows[0].cells[column].dataset.value;
    const order = (a, b) => (a === "") - (b === "") || sign * (a - b || a.localeCompare(b, "en", { numeric: true }));
    table.append(...[...table.tBodies].sort((one, other) => order(value(one), value(other))));
  }));
}
"""


class Markup(str):
    """HTML that is already escaped; anything else is escaped when it enters a page."""


def escape(value) -> Markup:
    """Return text as HTML. Control characters and broken bytes, which file names may hold, are shown as escapes."""
    if isinstance(value, Markup):
        return value
    text = "".join(
        printable(char) if category(char) in ("Cc", "Cs") and char not in "\n\t" else char for char in str(value)
    )
    return Markup(html.escape(text))


def page(title: str, *parts: Markup, style: str = "", script: str = "") -> str:
    """Return a whole HTML document. style: more CSS. script: the only JavaScript that browsers will run in it.

    Its content security policy lets a browser fetch nothing and run nothing but `script`, whatever a name contains.
    """
    body = "\n".join(parts)
    allowed = f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n{body}\n</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def heading(text: str) -> Markup:
    return Markup(f"<h2>{escape(text)}</h2>")


def paragraph(text: str, note: bool = False) -> Markup:
    kind = ' class="note"' if note else ""
    return Markup(f"<p{kind}>{escape(text)}</p>")


def verdict(text: str, more: str = "") -> Markup:
    """Return a report's first paragraph: a verdict, of which the words up to the colon stand out, and how to read
    it."""
    lead, colon, rest = text.partition(": ")
    return Markup(f'<p class="lead"><strong>{escape(lead)}{colon and "."}</strong> {escape(rest)} {escape(more)}</p>')


def code(text: str) -> Markup:
    return Markup(f"<code>{escape(text)}</code>")


def table(header: Sequence, rows: Sequence[Sequence], cards: bool = False) -> Markup:
    """Return a table; cells are escaped, numbers formatted, pictures kept. cards: on a phone every row becomes a
    card."""
    pictured = [is_picture(cell) for cell in rows[0]] if rows else [False] * len(header)
    classes = [' class="picture"' if shown else "" for shown in pictured]
    head = "".join(f"<th{kind}>{explained(cell)}</th>" for kind, cell in zip(classes, header, strict=True))
    kind = ' class="cards"' if cards else ""
    body = "\n".join(f"<tr>{''.join(_cells(row, header, cards))}</tr>" for row in rows)
    return Markup(
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _cells(row: Sequence, header: Sequence, cards: bool) -> list[str]:
    if not cards:
        return [_cell(cell) for cell in row]
    return [
        f'<td data-label="{label_of(head)}"><div>{_text(cell)}</div></td>'
        for cell, head in zip(row, header, strict=True)
    ]


def label_of(head: str) -> Markup:
    """Return the text of a column's head, without tags, for an attribute."""
    return Markup(" ".join(re.sub(r"<[^>]*>", " ", escape(head)).split()))


def explained(term: str) -> Markup:
    """Return a term, with what it means when it is pointed at where the glossary has it."""
    if isinstance(term, Markup) or term not in GLOSSARY:
        return escape(term)
    return Markup(f'<abbr title="{escape(GLOSSARY[term])}">{escape(term)}</abbr>')


def sortable_table(
    columns: Sequence[Markup], bodies: Sequence[tuple[Sequence, Markup]], hints: Sequence[str]
) -> Markup:
    """Return a table that sorts by a click on a column's head, or with the keyboard; the page needs the script `SORT`.

    bodies: the cells of a row, sorted by their full values, and what stands below them over the whole width ("" for
    nothing), which moves along. The rows come sorted by the first column. hints: what a head says when pointed at.
    """
    heads = "".join(
        f'<th scope="col" title="{escape(hint)}"{first}><button type="button">{escape(column)}</button></th>'
        for column, hint, first in zip(columns, hints, [' aria-sort="ascending"', *[""] * len(columns)], strict=False)
    )
    groups = []
    for cells, below in bodies:
        values = [f'data-value="{escape(_sort_value(cell))}"' for cell in cells]
        row = "".join(
            f'<td {value} data-label="{label_of(column)}"><div>{_text(cell)}</div></td>'
            for value, cell, column in zip(values, cells, columns, strict=True)
        )
        below = below and f'<tr class="below"><td colspan="{len(columns)}">{escape(below)}</td></tr>'
        groups.append(f"<tbody><tr>{row}</tr>{below}</tbody>")
    body = "\n".join(groups)
    return Markup(
        f'<div class="scroll"><table class="sortable cards"><thead><tr>{heads}</tr></thead>\n{body}\n</table></div>'
    )


def _sort_value(cell) -> str:
    """Return what the script sorts by: full precision, JavaScript's infinity, nothing for undefined values."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return repr(cell).replace("inf", "Infinity") if isinstance(cell, float) else str(cell)


def facts(pairs: Mapping[str, object]) -> Markup:
    """Return the names and what they are, as a list in two columns."""
    lines = "".join(f"<dt>{explained(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs.items())
    return Markup(f'<dl class="facts">{lines}</dl>')


def is_picture(cell) -> bool:
    return isinstance(cell, Markup) and cell.startswith("<img")


def _cell(value) -> str:
    if is_picture(value):
        return f'<td class="picture">{value}</td>'
    return f"<td>{_text(value)}</td>"


def _text(value) -> Markup:
    return escape(number(value) if isinstance(value, float) or value is None else value)


def number(value: float | None) -> str:
    """Return a readable number: a dash for none, the infinity sign, four significant digits otherwise."""
    if value is None or math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "−∞") if math.isinf(value) else f"{value:.4g}"


def to_image(image: Tensor) -> Image.Image:
    """Return an 8-bit picture of (3, H, W), or (1, H, W) in grey, in [0, 1]; values outside are clamped, undefined ones
    black."""
    pixels = (image.float().nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def picture(image: Tensor, width: int = 160, alt: str = "") -> Markup:
    """Return an embedded picture of (C, H, W) in [0, 1], `width` CSS pixels wide: PNG when small, else JPEG."""
    opened, buffer = to_image(image), io.BytesIO()
    kind = "PNG" if max(opened.size) <= 64 else "JPEG"
    opened.save(buffer, kind, quality=90)
    size = f'width="{width}" height="{round(width * opened.height / opened.width)}"'
    source = data_uri(buffer.getvalue(), kind.lower())
    return Markup(f'<img {size} alt="{escape(alt)}" loading="lazy" decoding="async" src="{source}">')


def figure(charts: "Figure | Sequence[Figure]", caption: str = "") -> Markup:
    """Return embedded matplotlib figures with their caption: side by side, on a phone one below the other."""
    several = isinstance(charts, Sequence)
    images, kind = "", ' class="several"' if several else ""
    for chart in charts if several else [charts]:
        buffer = io.BytesIO()
        chart.savefig(buffer, format="png", dpi=160)
        images += f'<img alt="{escape(caption)}" src="{data_uri(buffer.getvalue(), "png")}">'
    return Markup(f'<figure{kind}>{images}<figcaption><p class="note">{escape(caption)}</p></figcaption></figure>')


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
