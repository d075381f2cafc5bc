"""reports/charts.py: the curves, bars and pictures that were asked for."""

import numpy as np
import pytest

from reports.charts import COLORS, color_of, histogram, line_charts, looks, new_figure, picture_grid

CHART = {"title": "PSNR", "xlabel": "ratio", "ylabel": "dB", "lines": {"naive": ([0, 1], [30, 10])}}


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
            assert drawn[name].get_color() == color_of(name)
    assert first.get_ylim() == (0, 40)
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["naive", "adaptive"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["adaptive"]
    assert not first.containers[0].has_yerr
    assert second.containers[0].has_yerr


def test_a_model_or_an_attacker_has_its_colour_in_every_figure():
    both = looks(["plain DeiT", "MJP"]), looks(["another", "naive shuffle", "MJP 0.27", "MJP 0.5", "DeiT-S"])
    assert both[0]["plain DeiT"] == both[1]["DeiT-S"] and both[0]["MJP"] == both[1]["MJP 0.27"]
    assert both[1]["MJP 0.5"]["color"] == color_of("MJP") and both[1]["MJP 0.5"]["linestyle"] == "--"
    assert both[1]["another"]["color"] not in {color_of(name) for name in both[1]}
    assert color_of("knows MJP: hidden, as a set") == color_of("hidden patches") != color_of("knows MJP: visible")


def test_charts_stand_in_rows():
    chart = line_charts([CHART] * 3, across=2)
    assert len(chart.axes) == 3 and chart.get_size_inches().tolist() == [7.8, 6.8]


def test_more_lines_than_colours_differ_in_their_strokes():
    names = [f"model {number}" for number in range(2 * len(COLORS) + 1)]
    (axes,) = line_charts([CHART | {"lines": {name: ([0, 1], [1, 0]) for name in names}}]).axes
    looks = [(bars.lines[0].get_color(), bars.lines[0].get_linestyle()) for bars in axes.containers]
    assert len(set(looks)) == len(names)


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
    assert [axes.get_window_extent().width > 0 for axes in chart.axes]


@pytest.mark.parametrize("values", [[11.0, 12.5, 12.7, 30.2], [1.0, 150.0], [25.0], [13.1] * 3, [-40.0, 3e4]])
def test_histograms_count_every_value_once(values):
    chart = histogram(values, xlabel="PSNR (dB)", ylabel="images", marks={"no leak": 13.1, "25 dB": 25.0})
    (axes,) = chart.axes
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) == len(values) and len(heights) <= 22
    width = axes.patches[0].get_width() / 0.92
    for value in values:
        starts = [bar.get_x() + bar.get_width() / 2 - width / 2 - 1e-9 for bar in axes.patches]
        assert heights[next(place for place, start in enumerate(starts) if start <= value < start + width)] >= 1
    assert [line.get_xdata()[0] for line in axes.lines] == [13.1, 25.0]
    assert [text.get_text() for text in chart.legends[0].get_texts()] == ["no leak", "25 dB"]
