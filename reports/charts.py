"""Figures people look at, drawn with matplotlib: curves, histograms, pictures in rows."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure, FigureBase

# The first four are told apart also in greyscale and by most colour-blind readers.
COLORS = ("#c2410c", "#64748b", "#0f766e", "#7c3aed", "#0284c7", "#be185d", "#a16207")
STROKES = (("o", "-"), ("s", "--"), ("^", ":"))  # marker and line of the first names, of as many again, ...
# The colour of models, attackers and patches in every figure: of the first line whose words a name holds.
OWN = {
    r"hidden|masked": "#be185d",
    r"visible|adaptive|mjp_aware|\bknows\b": "#0284c7",
    r"shuffle": "#64748b",
    r"naive|closed_form|does not know": "#7c3aed",
    r"whole": "#a16207",
    r"mjp": "#0f766e",
    r"plain|deit": "#c2410c",
    r"r-?gap": "#b45309",
    r"hybrid": "#1e3a8a",
}


def color_of(name: str) -> str | None:
    """Return the colour that a model, an attacker or a kind of patches has in every figure, if it has one."""
    return next((color for words, color in OWN.items() if re.search(words, name.lower())), None)


def looks(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return colour, marker and line of each name, no two alike: its own colour, or the next that nobody here owns."""
    owned = {name: color_of(name) for name in names}
    free = [color for color in COLORS if color not in owned.values()]
    others = [(color, *stroke) for colors in (free, COLORS) for stroke in STROKES for color in colors]
    found: dict[str, tuple] = {}
    for name, color in owned.items():
        own = [(color, *stroke) for stroke in STROKES] if color else []
        found[name] = next((look for look in own + others if look not in found.values()), others[0])
    return {name: dict(zip(("color", "marker", "linestyle"), look, strict=True)) for name, look in found.items()}


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of `width` x `height` inches that lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def open_axes() -> AbstractContextManager:
    """Return a context in which axes have small letters and no frame at the top and on the right."""
    import matplotlib

    return matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def line_charts(panels: Sequence[dict], chart: "FigureBase | None" = None, *, across: int = 0) -> "FigureBase":
    """Draw line charts side by side, or `across` of them in a row, in a new figure or in `chart`.

    Panel: title, xlabel, ylabel, lines {name: (x, y)}; optional spread {name: y_std}, ylim, and taken: names of other
    charts, whose colours are left to them. A name keeps its look over all panels (`looks`).
    """
    taken = [name for panel in panels for name in panel.get("taken", ())]
    styles = looks(list(dict.fromkeys([*taken, *(name for panel in panels for name in panel["lines"])])))
    across = across or len(panels)
    rows = math.ceil(len(panels) / across)
    chart = chart or new_figure(3.9 * across, 3.4 * rows)
    with open_axes():
        places = [*chart.subplots(rows, across, squeeze=False).flat]
        for axes, panel in zip(places, panels, strict=False):
            for name, (x, y) in panel["lines"].items():
                bars = panel.get("spread", {}).get(name)
                axes.errorbar(x, y, yerr=bars, capsize=2, linewidth=1.8, label=name, markersize=4, **styles[name])
            axes.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
            axes.set_title(panel["title"], loc="left", fontweight="bold", fontsize=10)
            if panel.get("ylim"):
                axes.set_ylim(*panel["ylim"])
            axes.grid(axis="y", color="#e2e8f0")
            axes.legend(frameon=False)
        for axes in places[len(panels) :]:
            axes.remove()
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
    """Draw pictures in rows and columns with a title over each column; arrays (H, W, 3) uint8."""
    for line, (images, axes_row) in enumerate(
        zip(rows, chart.subplots(len(rows), len(titles), squeeze=False), strict=True)
    ):
        for title, image, axes in zip(titles, images, axes_row, strict=True):
            axes.imshow(image)
            axes.axis("off")
            if line == 0:
                axes.set_title(title, fontsize=9)
