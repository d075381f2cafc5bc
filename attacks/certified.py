"""Bound from below and from above what a leak gives away of its images, in bits of their 8-bit values.

Below, what an attack has shown: a value known to +-r (pixel range 1) is one of floor(510 r) + 1 levels of 256, so that
log2(256 / levels) of its 8 bits are certified. Patches that may stand in each other's places certify their values less
the bits of their order, log2(K! / (K - M)!) for M of them in K places, and a batch less log2(B!): the images that fit
are then no more than 2^-bits of all images. Nothing is certified where an attack predicts no errors.

Above, what no attack can exceed. With images X and what is shared Y, any prior and any attack:

    order        a permutation that the gradient does not see: log2(k! / prod m!) for k patches, m of them equal
    capacity     of noise, rounding and omission on the way: defenses/capacity.py

A certificate of L bits that holds with probability p has p L <= I(X; Y) + 1 over images drawn evenly (Fano): the two
ends are of one scale. Sources: Cover and Thomas, Elements of Information Theory, sections 2.10, 7.9 and 9.1; the
permutation theorem: docs/method.md.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DEPTH = 8  # bits of a value
HALF = 0.999 / (2 * (2**DEPTH - 1))  # just below half a level: closer than that certifies no more bits
PEAK = 4.0  # largest error of a value in a patch, in units of the root mean square error of the patch


@dataclass(frozen=True)
class Certificate:
    """What an attack's equations leave open of what the model was shown. patches (B, N, P): its patches, normalised;
    radius (B, N): the largest error of a value of each (pixel range 1), no less than HALF, infinite where nothing is
    claimed; group (B, N) int64: patches of equal number may stand in each other's places, in any image."""

    patches: Tensor
    radius: Tensor
    group: Tensor

    def __post_init__(self):
        object.__setattr__(self, "radius", self.radius.clamp_min(HALF))

    @property
    def claimed(self) -> Tensor:
        """Return which patches (B, N) are claimed to be anything: a radius of half the range and more says nothing."""
        return value_bits(self.radius) > 0

    @property
    def bits(self) -> float:
        """Return the certified bits of the whole batch, never below zero."""
        claimed = self.claimed
        content = self.patches.shape[2] * float(value_bits(self.radius).sum())
        left = content - order_bits(self.group, claimed) - log2_factorial(len(self.radius))
        return max(0.0, left)

    @property
    def psnr(self) -> float | None:
        """Return the least PSNR of the batch in dB, patches in the order that suits them best; None unless every patch
        is claimed."""
        return -10 * math.log10(float(self.radius.square().mean())) if bool(self.claimed.all()) else None


def certify(patches: Tensor, radius: Tensor, shared: Tensor | None = None) -> Certificate:
    """Return the certificate of one image, patches (N, P) and radius (N,); shared (N,) bool: the patches that the
    gradient gives one position, of which no order is claimed. The others stand where they are."""
    group = torch.arange(len(patches))
    group = group if shared is None else group.where(~shared, len(group))
    return Certificate(patches[None], radius[None], group[None])


def value_bits(radius: Tensor) -> Tensor:
    """Return how many of the 8 bits of a value are certified by a radius (pixel range 1), of the same shape."""
    levels = ((2**DEPTH - 1) * 2 * radius.double()).clamp(0, 2**DEPTH - 1).floor() + 1
    return DEPTH - levels.log2()


def order_bits(group: Tensor, claimed: Tensor) -> float:
    """Return log2 of the number of ways in which the claimed patches can stand in the places of their groups; both of
    one shape."""
    total = 0.0
    for number in group[claimed].unique():
        places = int((group == number).sum())
        found = int((claimed & (group == number)).sum())
        total += log2_factorial(places) - log2_factorial(places - found)
    return total


def log2_factorial(number: int) -> float:
    """Return log2(number!)."""
    return math.lgamma(number + 1) / math.log(2)


def hidden_order_bits(patches: Tensor, group: Tensor) -> float:
    """Return the bits of the order of an image's patches (N, P) that a gradient cannot hold which does not change when
    those of one group (N,) change places. Equal patches have no order."""
    total = 0.0
    for number in group.unique():
        own = patches[group == number]
        equal = torch.unique(own, dim=0, return_counts=True)[1].tolist()
        total += log2_factorial(len(own)) - sum(map(log2_factorial, equal))
    return total


def linear_mse(system: Tensor, std: float, prior: float) -> float:
    """Return the least mean squared error of an entry of X (n, P) with which anybody can estimate it from system (D, n)
    X plus N(0, std^2), the system known: for X of independent N(mean, prior^2) the Bayesian Cramer-Rao bound, which the
    posterior mean meets (van Trees)."""
    values = torch.linalg.svdvals(system.double())
    values = torch.nn.functional.pad(values, (0, max(0, system.shape[1] - len(values))))
    return float((1 / (prior**-2 + values.square() / std**2)).mean())
