"""Numbers of the claims page with their 95 % intervals, and the verdicts that follow from them.

Two means over training seeds differ where the Welch interval of their difference excludes 0. A mean over images has the
t interval, a share the exact binomial one. Each function of a claim returns an Evidence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from scipy.stats import t as student

from eval.membership import binomial_interval

LEVEL = 0.95
UNDECIDED = "not decided at this scale"
Reader = Callable[[str], dict]


class Evidence(NamedTuple):
    """text: all our numbers; verdict; number: the one that decides, with its interval; n: what it is a mean of."""

    text: str
    verdict: str
    number: str = "–"
    n: str = "–"


def cell(found: dict, unit: str = "%") -> str:
    spread = "" if found["std"] is None else f" ± {found['std']:.1f}"
    return f"{found['mean']:.1f}{spread} {unit}"


def difference(one: dict, other: dict) -> tuple[float, float]:
    """Return (difference of the means, half of its interval over seeds: infinite where there is one), by Welch."""
    gain = one["mean"] - other["mean"]
    if one["std"] is None or other["std"] is None:
        return gain, math.inf
    parts = [(found["std"] ** 2 / len(found["values"]), len(found["values"]) - 1) for found in (one, other)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return gain, 0.0
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    return gain, float(student.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(variance)


def better(one: dict, other: dict, *, margin: float = 0.0) -> str:
    """Return the verdict on 'one is above other', or with a margin on 'one is not more than that below'."""
    gain, half = difference(one, other)
    if gain + margin > half:
        return "holds"
    return "does not hold" if gain + margin < -half else UNDECIDED


def together(verdicts: dict[str, str]) -> str:
    """Return one verdict out of those by data."""
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    return ", ".join(f"{verdict} on {data.split(',')[0]}" for data, verdict in verdicts.items())


def ends(found: dict) -> tuple[float, float]:
    """Return the interval of a mean with its sample standard deviation and n."""
    if found["std"] is None or found["n"] < 2:
        return -math.inf, math.inf
    half = float(student.ppf((1 + LEVEL) / 2, found["n"] - 1)) * found["std"] / math.sqrt(found["n"])
    return found["mean"] - half, found["mean"] + half


def counted(numbers: list[int], what: str) -> str:
    """Return '3 seeds', '1 seed', or '3, 1 seeds' where data differ in it."""
    shown = ", ".join(map(str, dict.fromkeys(numbers)))
    return f"{shown} {what.removesuffix('s') if shown == '1' else what}"


def bracketed(found: dict, unit: str = "dB") -> str:
    """Return a mean with its interval, for a table."""
    low, high = ends(found)
    shown = f" [{low:.1f}, {high:.1f}]" if math.isfinite(low) else ""
    return f"{found['mean']:.1f}{shown} {unit}"


def gained(gain: float, half: float, unit: str = "%") -> str:
    """Return a difference with its interval, for a table."""
    shown = f" [{gain - half:+.1f}, {gain + half:+.1f}]" if math.isfinite(half) else ""
    return f"{gain:+.1f}{shown} {unit}".replace("-0.0", "+0.0")


def share(hits: int, n: int) -> str:
    """Return a share with its exact interval in percent, for a table."""
    low, high = (100 * end for end in binomial_interval(hits, n, LEVEL))
    return f"{hits} of {n} [{low:.0f}, {high:.0f}] %"
