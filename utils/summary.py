"""Summaries of one score over several images, in which some copies may be perfect: their PSNR is infinite."""

import math
from collections.abc import Mapping, Sequence

from utils.statistics import describe


def summarise(rows: Sequence[dict], key: str) -> dict:
    """Return mean, std and n of a score, and the best; of these n `perfect` ones are infinite, which mean and std, of
    the others, leave out and JSON cannot hold. Undefined scores are not counted."""
    values = [row[key] for row in rows if row.get(key) is not None and not math.isnan(row[key])]
    known = [value for value in values if math.isfinite(value)]
    best = max(known, default=None) if len(known) == len(values) else None
    return describe(known) | {"n": len(values), "best": best, "perfect": len(values) - len(known)}


def level(summary: Mapping) -> float:
    """Return a mean score as a number: infinite where all are perfect, minus infinity where none was measured."""
    if summary["mean"] is not None:
        return summary["mean"]
    return math.inf if summary.get("perfect") else -math.inf


def decibels(summary: Mapping) -> str:
    """Return a mean PSNR in words: one decimal, `perfect` where every copy is without error."""
    value = level(summary)
    return f"{value:.1f}" if math.isfinite(value) else "perfect, infinite" if value > 0 else "undefined"


def spread(summary: Mapping) -> str:
    """Return the mean ± standard deviation, with how many copies are without error, which the mean leaves out."""
    around = f" ± {summary['std']:.1f}" if summary["std"] is not None else ""
    perfect = summary.get("perfect", 0)
    more = f" and {perfect} perfect" if perfect and summary["mean"] is not None else ""
    return f"{decibels(summary)}{around}{more}"
