"""The most bits that shared gradients can carry of what is behind them, whatever it is and whoever reads them.

Gaussian noise makes a Gaussian channel of every entry. n entries of sum of squares p, in noise of variance s^2, carry
at most n / 2 log2(1 + p / (n s^2)) bits (Cover and Thomas, Elements of Information Theory, section 9.1), for any
distribution of the private images over which the mean of p is no larger. That is less than p / (2 s^2) nats, the
divergence of the shared gradient from noise alone. Laplacian noise of scale b carries n (a + exp(-a) - 1) nats with
a = sqrt(p / n) / b: of one entry g no more than the divergence from noise alone, h = |g| / b + exp(-|g| / b) - 1, whose
mean over entries and images is largest, at a mean square of p / n, where all are equal, as h is concave in g^2. Rounded
numbers carry no more than the bits they are stored in.
"""

import math
from collections.abc import Iterable

from torch import Tensor


def gaussian_bits(power: float, entries: int, std: float) -> float:
    """Return the most bits that `entries` numbers of sum of squares `power` at most carry through Gaussian noise of
    standard deviation `std` on each."""
    if std == 0 or entries == 0:
        return math.inf if power else 0.0
    return entries / 2 * math.log1p(power / (entries * std**2)) / math.log(2)


def laplacian_bits(power: float, entries: int, scale: float) -> float:
    """Return the most bits that `entries` numbers of sum of squares `power` at most carry through Laplacian noise of
    scale `scale` on each: the divergence from noise alone grows less than in proportion to the square of a number, so
    that it is largest where all are of one size."""
    away = math.sqrt(power / entries) / scale if entries else 0.0
    return entries * (away + math.expm1(-away)) / math.log(2)


def stored_bits(values: Iterable[Tensor]) -> float:
    """Return the bits that tensors take."""
    return float(sum(8 * value.element_size() * value.numel() for value in values))


def chosen_bits(kept: int, entries: int) -> float:
    """Return log2 of the number of ways to choose so many of the entries."""
    return (math.lgamma(entries + 1) - math.lgamma(kept + 1) - math.lgamma(entries - kept + 1)) / math.log(2)
