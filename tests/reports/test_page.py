"""reports/page.py: nothing a name contains becomes markup, and a page needs nothing but itself."""

import base64
import hashlib
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from reports.charts import line_charts
from reports.glossary import GLOSSARY
from reports.page import (
    SORT,
    Markup,
    code,
    escape,
    facts,
    figure,
    heading,
    number,
    page,
    paragraph,
    picture,
    sortable_table,
    table,
    to_image,
)

HOSTILE = "<script>alert('1')</script> \"quoted\" & <img src=x onerror=alert(2)>"
ESCAPED = (
    "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &quot;quoted&quot; &amp; &lt;img src=x onerror=alert(2)&gt;"
)
CHART = {"title": "PSNR", "xlabel": "ratio", "ylabel": "dB", "lines": {"naive": ([0, 1], [30, 10])}}


class Page(HTMLParser):
    """What a browser would make of a page: its tags with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def sources(self) -> list[str]:
        return [attributes[key] for _, attributes in self.tags for key in ("src", "href") if key in attributes]


def assert_self_contained(text: str) -> None:
    parsed = Page(text)
    assert not parsed.names() & {"script", "link", "iframe", "object", "base"}
    assert all(source.startswith("data:image/") for source in parsed.sources())
    assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert "@import" not in text
    assert "url(" not in text


def embedded(markup: str) -> Image.Image:
    content = re.search(r'src="data:image/(\w+);base64,([^"]+)"', markup)
    image = Image.open(io.BytesIO(base64.b64decode(content[2], validate=True)))
    assert image.format.lower() == content[1]
    return image


def test_text_is_escaped_and_markup_kept():
    assert escape(HOSTILE) == ESCAPED
    assert escape(escape(HOSTILE)) == ESCAPED
    assert escape(3) == "3"
    assert isinstance(escape(HOSTILE), Markup)


@pytest.mark.parametrize("part", [heading, paragraph, code, lambda text: paragraph(text, note=True)])
def test_every_part_escapes_its_text(part):
    markup = part(HOSTILE)
    assert isinstance(markup, Markup)
    assert ESCAPED in markup
    assert Page(markup).text == HOSTILE
    assert not Page(markup).names() & {"script", "img"}


def test_tables_escape_headers_and_cells():
    markup = table([HOSTILE, "b"], [[HOSTILE, 1.23456], [None, "x"], [7, math.inf]])
    assert markup.count(ESCAPED) == 2
    assert not Page(markup).names() & {"script", "img"}
    assert "<td>1.235</td>" in markup
    assert "<td>–</td>" in markup
    assert "<td>7</td>" in markup
    assert "<td>∞</td>" in markup


def test_tables_keep_pictures():
    markup = table(["image"], [[picture(torch.zeros(3, 4, 4))]])
    assert '<td class="picture"><img ' in markup
    assert len(Page(markup).sources()) == 1


def test_a_page_escapes_its_title_and_fetches_nothing():
    text = page(HOSTILE, heading("h"), picture(torch.rand(3, 8, 8)), figure(line_charts([CHART]), HOSTILE))
    assert text.startswith("<!doctype html>")
    assert text.count(ESCAPED) == 4  # title, heading, and the figure's alternative text and caption
    assert_self_contained(text)
    assert len(Page(text).sources()) == 2


def policy(text: str) -> str:
    return next(attributes["content"] for tag, attributes in Page(text).tags if "http-equiv" in attributes)


def test_a_page_forbids_browsers_everything_but_its_own_script():
    assert "default-src 'none'" in policy(page("plain")) and "script-src 'none'" in policy(page("plain"))
    assert "<script" not in page("plain")
    text = page("sorted", script=SORT, style="p { color: red }")
    digest = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy(text)
    assert f"<script>{SORT}</script>" in text
    assert text.index("p { color: red }") > text.index("body {")


def test_sortable_tables_carry_full_values_and_escape_them():
    below = Markup("<p>pictures</p>")
    bodies = [([HOSTILE, 1.23456789, math.inf], below), (["b", math.nan, None], Markup(""))]
    markup = sortable_table([HOSTILE, Markup("PSNR<small>dB</small>"), "x"], bodies, [HOSTILE, "", ""])
    parsed = Page(markup)
    assert not parsed.names() & {"script", "img"}
    assert markup.count(ESCAPED) == 6  # hint, head, the cell and what it is sorted by, and the label of either row
    values = [attributes["data-value"] for tag, attributes in parsed.tags if tag == "td" and "data-value" in attributes]
    assert values == [HOSTILE, "1.23456789", "Infinity", "b", "", ""]
    assert [word for word in ("1.235", "∞", "–") if f">{word}<" in markup] == ["1.235", "∞", "–"]
    assert [attributes.get("aria-sort") for tag, attributes in parsed.tags if tag == "th"] == ["ascending", None, None]
    assert sum(tag == "button" for tag, _ in parsed.tags) == 3
    assert markup.count("<tbody>") == 2 and markup.count("pictures") == 1 and 'colspan="3"' in markup


def test_facts_escape_names_and_values():
    markup = facts({HOSTILE: HOSTILE, "rank": 7, "residual": 0.123456, "labels": None})
    assert markup.count(ESCAPED) == 2
    assert not Page(markup).names() & {"script", "img"}
    assert "<dt>rank</dt><dd>7</dd><dt>residual</dt><dd>0.1235</dd><dt>labels</dt><dd>–</dd>" in markup


def test_a_picture_says_what_it_shows_and_how_large_it_is():
    markup = picture(torch.zeros(3, 8, 16), width=40, alt=HOSTILE)
    assert f'alt="{ESCAPED}"' in markup and 'width="40" height="20"' in markup and 'loading="lazy"' in markup


def test_pixels_out_of_range_are_clamped_and_undefined_ones_black():
    image = torch.tensor([-1.0, 0.5, 2.0, math.nan, math.inf, 1.4 / 255]).expand(3, 1, 6)
    assert list(to_image(image).tobytes()) == [value for value in (0, 128, 255, 0, 255, 1) for _ in range(3)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (0.0, "0"),
        (12.34567, "12.35"),
        (0.000123456, "0.0001235"),
        (123456.0, "1.235e+05"),
        (100.0, "100"),
        (-3.5, "-3.5"),
    ],
)
def test_numbers_are_readable(value, text):
    assert number(value) == text


def test_small_pictures_are_exact():
    image = (torch.arange(3 * 8 * 6) % 256).view(3, 8, 6) / 255
    opened = embedded(picture(image, width=40))
    assert opened.size == (6, 8)
    assert torch.tensor(list(opened.tobytes())).view(8, 6, 3).equal((image * 255).round().long().permute(1, 2, 0))
    assert 'width="40"' in picture(image, width=40)


def test_large_pictures_are_compressed_and_all_are_clamped():
    image = torch.full((3, 70, 80), 2.0, dtype=torch.float64)
    image[:, :35] = -1
    opened = embedded(picture(image))
    assert (opened.format, opened.size) == ("JPEG", (80, 70))
    assert max(opened.getpixel((40, 5))) < 10
    assert min(opened.getpixel((40, 65))) > 245


def test_figures_are_embedded_pictures():
    assert figure([line_charts([CHART]), line_charts([CHART])], "two").count("<img") == 2
    markup = figure(line_charts([CHART, CHART]), "caption")
    assert embedded(markup).width > 2 * embedded(figure(line_charts([CHART]))).height
    assert "caption" in Page(markup).text


def test_rows_that_become_cards_carry_their_heads_and_terms_are_explained():
    markup = table(["SSIM", Markup("PSNR<small>dB</small>"), "x"], [[0.5, 30.0, "a"]], cards=True)
    parsed = Page(markup)
    assert [tag.get("data-label") for name, tag in parsed.tags if name == "td"] == ["SSIM", "PSNR dB", "x"]
    assert [tag["title"] for name, tag in parsed.tags if name == "abbr"] == [GLOSSARY["SSIM"]]
    assert "data-label" not in table(["x"], [[1.0]])
