"""Means, spreads and shares over rows of results."""

import math
import statistics
from collections.abc import Sequence

from utils.errors import not_empty

RECOVERED = 25.0  # dB: above it a picture or patch is recognisably the private one; a convention, stated with results


def summarize(rows: Sequence[dict], keys: Sequence[str]) -> dict[str, dict]:
    """Return {metric: {"mean", "std", "n"}} over the rows whose value is finite; `infinite` counts perfect PSNRs left
    out.

    std is the sample standard deviation, null for one value; a metric without finite values has mean null. Keys that no
    row has are left out.
    """
    summary = {}
    for key in keys:
        if not any(key in row for row in rows):
            continue
        found = [row[key] for row in rows if row.get(key) is not None]
        summary[key] = describe([value for value in found if math.isfinite(value)])
        if infinite := sum(math.isinf(value) for value in found):
            summary[key]["infinite"] = infinite
    return summary


def success(rows: Sequence[dict], threshold: float = RECOVERED, *, key: str = "psnr") -> dict:
    """Return how many reconstructions are better than `threshold`: mean is their share, from 0 to 1, of n images.

    Perfect ones count, undefined ones (NaN) do not. Returns {"mean", "std", "n", "metric", "threshold"}.
    """
    not_empty(rows, "the share of successes")
    above = [float(row[key] is not None and row[key] > threshold) for row in rows]
    return describe(above) | {"metric": key, "threshold": threshold}


def describe(values: Sequence[float]) -> dict:
    """Return {"mean", "std", "n"} of finite values; std of fewer than two and the mean of none are None."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def finite(row: dict) -> dict:
    """Return the row with infinite and undefined numbers as None, as JSON wants them."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
