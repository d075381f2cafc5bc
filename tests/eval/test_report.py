"""eval/report.py and attack_report.py: nothing a name contains becomes markup, and a page needs nothing but itself."""

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.attack_report import METRICS, SHOWN_IN_REPORT, save_victims, summary_table, write_csv, write_page
from eval.reconstruction import summarize
from eval.report import (
    COLORS,
    Markup,
    code,
    escape,
    figure,
    heading,
    line_charts,
    new_figure,
    number,
    page,
    paragraph,
    picture,
    picture_grid,
    table,
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


def test_charts_show_the_given_panels():
    panels = [
        {**CHART, "lines": {"naive": ([0, 0.5, 1], [30, 20, 10]), "adaptive": ([0, 1], [30, 25])}, "ylim": (0, 40)},
        {**CHART, "title": "SSIM", "lines": {"adaptive": ([0, 1], [1, 0.5])}, "spread": {"adaptive": [0.1, 0.2]}},
    ]
    chart = line_charts(panels)
    first, second = chart.axes
    for axes, panel in zip(chart.axes, panels, strict=True):
        assert axes.get_title(loc="left") == panel["title"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("ratio", "dB")
        drawn = {bars.get_label(): bars.lines[0] for bars in axes.containers}
        assert drawn.keys() == panel["lines"].keys()
        for name, (x, y) in panel["lines"].items():
            assert drawn[name].get_xdata().tolist() == x
            assert drawn[name].get_ydata().tolist() == y
            assert drawn[name].get_color() == COLORS[list(panels[0]["lines"]).index(name)]
    assert first.get_ylim() == (0, 40)
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["naive", "adaptive"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["adaptive"]
    assert not first.containers[0].has_yerr
    assert second.containers[0].has_yerr


def test_charts_and_pictures_fit_into_one_figure():
    chart = new_figure(8, 4)
    above, below = chart.subfigures(2, 1)
    assert line_charts([CHART], above) is above
    grey = [np.full((2, 3, 3), level, dtype=np.uint8) for level in range(4)]
    picture_grid([grey[:2], grey[2:]], ["left", "right"], below)
    assert [axes.get_title(loc="left") for axes in above.axes] == ["PSNR"]
    assert [axes.get_title() for axes in below.axes] == ["left", "right", "", ""]
    for axes, expected in zip(below.axes, grey, strict=True):
        assert np.array_equal(axes.get_images()[0].get_array(), expected)
        assert not axes.axison
    assert len(chart.axes) == 5
    assert embedded(figure(chart)).width > 1000


def test_figures_are_embedded_pictures():
    markup = figure(line_charts([CHART, CHART]), "caption")
    assert embedded(markup).width > 2 * embedded(figure(line_charts([CHART]))).height
    assert "caption" in Page(markup).text


def victims(number: int, name: str = "cat.png") -> list[dict]:
    """Rows as attack.py writes them, the first reconstruction perfect and the first SSIM undefined."""
    rows = []
    for index in range(number):
        row = {"index": index, "image": f"/data/{index}_{name}", "label": 3} | {key: 10.0 + index for key in METRICS}
        rows.append(row)
    rows[0] |= {"psnr": math.inf, "ssim": math.nan}
    return rows


def images(number: int, shuffled: bool) -> dict[int, tuple]:
    original = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = original.flip(1) if shuffled else original
    return {index: (original, shown, original * 0.5) for index in range(number)}


@pytest.mark.parametrize(("shuffled", "pictures"), [(False, 2), (True, 3)])
def test_the_attack_page_escapes_file_names_and_commands(tmp_path, shuffled, pictures):
    name = HOSTILE.replace("/", "-") + ".png"
    rows = victims(2, name)
    write_page(tmp_path, f"python attack.py --images '{HOSTILE}'", images(2, shuffled), rows, summarize(rows, METRICS))
    text = (tmp_path / "report.html").read_text()
    parsed = Page(text)
    assert_self_contained(text)
    assert len(parsed.sources()) == 2 * pictures
    assert HOSTILE in parsed.text
    for row in rows:
        assert Path(row["image"]).name in parsed.text
    assert ("shown to the model" in parsed.text) == shuffled
    assert "∞" in parsed.text
    assert "more are in results.json" not in parsed.text


def test_the_attack_page_pictures_the_first_victims_only(tmp_path):
    number_of_victims = SHOWN_IN_REPORT + 3
    rows = victims(number_of_victims)
    pictured = images(SHOWN_IN_REPORT, shuffled=False)
    write_page(tmp_path, "python attack.py", pictured, rows, summarize(rows, METRICS))
    parsed = Page((tmp_path / "report.html").read_text())
    assert len(parsed.sources()) == 2 * SHOWN_IN_REPORT
    assert f"The first {SHOWN_IN_REPORT} images; 3 more are in results.json." in parsed.text


def test_the_summary_names_every_score():
    lines = summary_table(summarize(victims(3), METRICS)).splitlines()
    assert len(lines) == 1 + len(METRICS)
    for line, label in zip(lines[1:], METRICS.values(), strict=True):
        assert line.startswith(label)
    assert lines[1].split()[-5:] == ["0.7071", "2", "and", "1", "perfect"]


def test_the_table_of_victims_reads_back(tmp_path):
    rows = victims(3, HOSTILE.replace("/", "-") + ", with a comma.png")
    write_csv(tmp_path, rows)
    with open(tmp_path / "per_image.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["image"] for row in read] == [row["image"] for row in rows]
    assert [float(row["psnr"]) for row in read] == [math.inf, 11.0, 12.0]


def test_victims_are_saved_as_pictures_and_the_first_are_kept(tmp_path):
    batch = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = save_victims(tmp_path, SHOWN_IN_REPORT - 2, ["a", "b", "c"], batch, batch.flip(2), batch * 3 - 1)
    assert [index for index, _ in kept] == [SHOWN_IN_REPORT - 2, SHOWN_IN_REPORT - 1]
    original, shown, reconstruction = kept[1][1]
    assert original.equal(batch[1]) and shown.equal(batch[1].flip(1)) and reconstruction.equal(batch[1] * 3 - 1)
    for kind, expected in (("originals", batch), ("reconstructions", (batch * 3 - 1).clamp(0, 1))):
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == ["a.png", "b.png", "c.png"]
        with Image.open(tmp_path / kind / "b.png") as saved:
            pixels = torch.tensor(list(saved.tobytes())).view(8, 8, 3).permute(2, 0, 1)
        assert (pixels - expected[1] * 255).abs().max() <= 0.51
    assert save_victims(tmp_path, SHOWN_IN_REPORT, ["d"], batch[:1], batch[:1], batch[:1]) == []
