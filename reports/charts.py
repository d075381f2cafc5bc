"""Figures people look at, drawn with matplotlib: curves, histograms, pictures in rows."""

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

# The first four are told apart also in greyscale and by most colour-blind readers.
COLORS = ("#c2410c", "#64748b", "#0f766e", "#7c3aed", "#0284c7", "#be185d", "#a16207")
STROKES = (("o", "-"), ("s", "--"), ("^", ":"))  # marker and line of the first names, of as many again, ...


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def open_axes() -> AbstractContextManager:
    """Inside, axes have small letters and no frame at the top and on the right."""
    import matplotlib

    return matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def line_charts(panels: Sequence[dict], chart: "FigureBase | None" = None) -> "FigureBase":
    """Side-by-side line charts, in a new figure or in `chart`.

    Panel: title, xlabel, ylabel, lines {name: (x, y)}; optional spread {name: y_std}, ylim, and taken: names of other
    charts, whose colours are left to them. A name keeps its colour over all panels; past the last colour the lines are
    dashed, then dotted.
    """
    taken = [name for panel in panels for name in panel.get("taken", ())]
    names = list(dict.fromkeys([*taken, *(name for panel in panels for name in panel["lines"])]))
    chart = chart or new_figure(3.9 * len(panels), 3.4)
    with open_axes():
        for axes, panel in zip(chart.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, (x, y) in panel["lines"].items():
                round_, place = divmod(names.index(name), len(COLORS))
                marker, dashes = STROKES[round_ % len(STROKES)]
                style = {"color": COLORS[place], "marker": marker, "linestyle": dashes, "markersize": 4}
                bars = panel.get("spread", {}).get(name)
                axes.errorbar(x, y, yerr=bars, capsize=2, linewidth=1.8, label=name, **style)
            axes.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
            axes.set_title(panel["title"], loc="left", fontweight="bold", fontsize=10)
            if panel.get("ylim"):
                axes.set_ylim(*panel["ylim"])
            axes.grid(axis="y", color="#e2e8f0")
            axes.legend(frameon=False)
    return chart


def histogram(values: Sequence[float], *, xlabel: str, ylabel: str, marks: Mapping[str, float]) -> "Figure":
    """Return how many of the finite `values` fall where, in bins of 1, 2, 5 ... wide; marks: vertical lines by name."""
    shown = [*values, *marks.values()]
    low, high = min(shown), max(shown)
    width = next(step * 10**k for k in itertools.count() for step in (1, 2, 5) if high - low <= 20 * step * 10**k)
    edges = np.arange(math.floor(low / width), math.floor(high / width) + 2) * width
    chart = new_figure(5.6, 2.7)
    with open_axes():
        axes = chart.subplots()
        axes.hist(values, bins=edges, color=COLORS[2], rwidth=0.92)
        for (name, x), color, dashes in zip(marks.items(), COLORS, ("--", ":"), strict=False):
            axes.axvline(x, color=color, linestyle=dashes, linewidth=1.8, label=name)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="#e2e8f0")
        axes.set_axisbelow(True)
        chart.legend(loc="outside upper left", frameon=False, ncols=len(marks))
    return chart


def picture_grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], chart: "FigureBase") -> None:
    """Pictures in rows and columns with a title over each column; arrays (H, W, 3) uint8."""
    for line, (images, axes_row) in enumerate(
        zip(rows, chart.subplots(len(rows), len(titles), squeeze=False), strict=True)
    ):
        for title, image, axes in zip(titles, images, axes_row, strict=True):
            axes.imshow(image)
            axes.axis("off")
            if line == 0:
                axes.set_title(title, fontsize=9)
