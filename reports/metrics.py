"""What is said of a score wherever it stands: its record, and the tables, files and summaries made of many."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from reports.page import Markup, escape, number, table
from utils.files import write_text
from utils.statistics import finite

SAME, UNSEEN = 0.1, 60.0  # dB: a difference nobody reads; a PSNR above which no 8-bit value differs
DIRECTIONS = {"higher": "higher is closer", "lower": "lower is closer", "": ""}


class Metric(NamedTuple):
    """A score: how it is computed, what it is called, its unit, which direction is closer, and what it means.

    function: of what is compared, see the table that the metric stands in; None where it is no function of pictures
    but measured with the attack. better: 'higher', 'lower', or '' where neither is closer. refines: the metric that it
    says more than; where both say the same on every image, page and log leave this one out.
    """

    function: Callable | None
    label: str
    unit: str
    better: str
    meaning: str
    refines: str = ""

    def __str__(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def hint(self) -> str:
        """Return what the metric means and which direction is closer."""
        return "; ".join(filter(None, (self.meaning, DIRECTIONS[self.better])))

    @property
    def head(self) -> Markup:
        """Return the head of its column."""
        return Markup(f"{escape(self.label)}<small>{escape(self.unit)}</small>")


Metrics = Mapping[str, Metric]


def telling(rows: Sequence[dict], metrics: Metrics) -> list[str]:
    """Return the metrics worth a line: those with a value for some image that differs from what they refine."""
    keys = [key for key in metrics if any(defined(row.get(key)) for row in rows)]
    return [
        key
        for key in keys
        if not metrics[key].refines or not all(_alike(row, key, metrics[key].refines) for row in rows)
    ]


def defined(value: float | None) -> bool:
    """Return whether a score has a value."""
    return value is not None and not math.isnan(value)


def _alike(row: dict, key: str, other: str) -> bool:
    """Return whether two scores of an image say the same to a reader."""
    if not defined(row.get(key)) or not defined(row.get(other)):
        return defined(row.get(key)) == defined(row.get(other))
    one, two = row[key], row[other]
    return one == two or min(one, two) > UNSEEN or abs(one - two) <= SAME


def left_out(rows: Sequence[dict], metrics: Metrics) -> list[str]:
    """Return the labels of the metrics that have values and are not `telling`."""
    shown = telling(rows, metrics)
    every = [key for key in metrics if any(defined(row.get(key)) for row in rows)]
    return [metrics[key].label for key in every if key not in shown]


def summary_lines(summary: dict, metrics: Metrics, keys: Sequence[str]) -> list[str]:
    """Return the metrics `keys` of the summary as lines of text, under a head."""
    lines = [f"{'':<28}      mean       std     n"]
    for key in keys:
        if row := summary.get(key):
            perfect = f"   and {row['infinite']} perfect" if row.get("infinite") else ""
            lines.append(f"{metrics[key]!s:<28}{number(row['mean']):>10}{number(row['std']):>10}{row['n']:>6}{perfect}")
    return lines


def summary_table(summary: dict, metrics: Metrics, keys: Sequence[str]) -> Markup:
    """Return the metrics `keys` of the summary as a table of a page."""
    perfect = any(row.get("infinite") for row in summary.values())
    rows = []
    for key in keys:
        if row := summary.get(key):
            label = Markup(f"{escape(metrics[key])}<small>{escape(metrics[key].hint)}</small>")
            rows.append([label, row["mean"], row["std"], row["n"], *[row.get("infinite", 0)] * perfect])
    return table(["score", "mean", "std", "n", *["perfect"] * perfect], rows)


def write_csv(folder: Path, rows: Sequence[dict]) -> None:
    """Write per_image.csv, one line per victim; a column for everything any of them has."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "per_image.csv", text.getvalue())


def campaign_results(
    attack: str, verdict: str, summary: dict, threat_model: Mapping[str, object], rows: Sequence[dict]
) -> dict:
    """Return what results.json holds of a campaign."""
    return {
        "attack": attack,
        "verdict": verdict,
        "summary": summary,
        "threat_model": dict(threat_model),
        "per_image": [finite(row) for row in rows],
    }


def tiles(summary: dict, metrics: Metrics, keys: Sequence[str]) -> Markup:
    """Return the share of successes and the means of `keys` as tiles at the top of a page."""

    def tile(value: str, label: str, spread: float | None = None) -> str:
        more = f" <small>± {number(spread)}</small>" if spread is not None else ""
        return f"<div><strong>{escape(value)}{more}</strong><span>{escape(label)}</span></div>"

    success, found = summary["success"], []
    if success["metric"] == "psnr":
        found.append(
            tile(f"{100 * success['mean']:.0f} %", f"of {success['n']} images above {success['threshold']:g} dB")
        )
    for key in keys:
        row = summary.get(key, {"mean": None})
        if row["mean"] is not None:
            gone = f", {row['infinite']} perfect left out" if row.get("infinite") else ""
            found.append(tile(number(row["mean"]), f"mean {metrics[key]}, n\u00a0=\u00a0{row['n']}{gone}", row["std"]))
    return Markup(f'<div class="tiles">{"".join(found)}</div>')
