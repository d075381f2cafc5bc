"""The likelihood of a shared gradient under a known defence: what an attacker minimises who models the defence.

The attacker knows which defence is used and how strong it is, not what it drew. With g an entry of the candidate's
gradient and h the shared one, what remains random has a known form:

    noise, dp_sgd   h = g + N(0, s^2); dp_sgd clips g first and has s = z C / B     (g - h)^2 / 2 s^2
    laplace         h = g + Lap(b)                                                  |g - h| / b
    quantize        g is within half a level of h (stochastic: within one)          -log P(|g + t n - h| < d / 2)
    1 bit           the sign of g, and the mean magnitude of the tensor             -log P(g + t n has the sign of h)
    prune           a kept g is h, a pruned one is below the smallest kept          -log P(|g + t n| < smallest kept)

The last three draw nothing: their likelihood is 1 inside an interval and 0 outside, which has no slope. n, a logistic
draw of scale t = softness * (level spacing d, mean magnitude, smallest kept magnitude), gives it one: signs make a
logistic regression, intervals a censored one. Levels, thresholds and magnitudes are read off the leak.
With a prior on images its minimum is the most probable image: the maximum a posteriori attack of Balunovic et al.,
"Bayesian framework for gradient leakage", ICLR 2022 (arXiv 2111.04706), which is optimal up to the prior.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from attacks.matching.objectives import Gradients
from defenses import build_defense
from utils.errors import UserError

MODELLED = ("noise", "laplace", "dp_sgd", "prune", "quantize")


class Likelihood:
    """The objective (candidate, target), scalar, lower is likelier: the mean over entries of log(1 + 2 l) / 2, with l
    the mean negative log-likelihood of their tensor in nats (`of_tensors`).

    For Gaussian noise of variance s^2 that is log(s^2 + mean squared difference) / 2 up to a constant: the likelihood
    under a variance of each tensor that is fitted, but no less than the known one. The plain sum has the same minimum
    where the candidate is right; from afar the tensor that fits worst hides all others in it.

    Tensors that the defence left at zero say nothing and are left out. Raises UserError for defences that are not a
    known distortion of single entries, and where nothing would be left to model."""

    def __init__(self, defense: str, defense_options: dict | None, *, batch_size: int, softness: float):
        if defense not in MODELLED:
            raise UserError(
                f"the attacker must know the defence: set attack_options.defense to {', '.join(MODELLED)}, which "
                f"distort single entries of a gradient in a known way, got '{defense}'"
            )
        known = build_defense(defense, defense_options or {})
        if not known.active or (defense == "dp_sgd" and not known.noise_multiplier):
            raise UserError(f"defence '{defense}' ({known}) leaves nothing to model: use attack 'closed_form'")
        if defense == "dp_sgd" and batch_size > 1:
            raise UserError(
                "the likelihood of 'dp_sgd' takes one image per gradient: of several, each is clipped apart"
            )
        if softness <= 0:
            raise UserError(f"softness must be above 0, got {softness}")
        self.name, self.defense, self.softness = defense, known, softness

    def __call__(self, candidate: Gradients, target: Gradients) -> Tensor:
        sizes = [value.numel() for value in target.values()]
        losses = self.of_tensors(candidate, target)
        return sum(size * torch.log1p(2 * one) for size, one in zip(sizes, losses, strict=True)) / (2 * sum(sizes))

    def of_tensors(self, candidate: Gradients, target: Gradients) -> list[Tensor]:
        """Return the mean negative log-likelihood of an entry, of every tensor of `target`, in nats up to a
        constant."""
        if self.name == "dp_sgd":
            length = torch.stack([candidate[name].square().sum() for name in target]).sum().sqrt()
            share = (self.defense.clip / (length + 1e-6)).clamp_max(1)
            candidate = {name: share * candidate[name] for name in target}
        least = self._least(target)
        return [self._term(candidate[name], value, least) / value.numel() for name, value in target.items()]

    def spread(self, target: Gradients) -> dict[str, Tensor]:
        """Return by name the standard deviation of an entry's error (scalars), for attacks that solve linear
        equations."""
        least, known = self._least(target), self.defense

        def one(value: Tensor) -> Tensor:
            if self.name == "noise":
                return value.new_tensor(known.std)
            if self.name == "laplace":
                return value.new_tensor(math.sqrt(2) * known.scale)
            if self.name == "dp_sgd":
                return value.new_tensor(known.noise_multiplier * known.clip)
            if self.name == "prune":
                return _smallest(value, least) * math.sqrt(known.ratio / 3)
            largest = value.abs().amax()  # half-normal entries: sign and mean tell them to 0.76 of their mean
            if known.bits == 1:
                return largest * math.sqrt(math.pi / 2 - 1)
            return self._spacing(value) / math.sqrt(6 if known.rounding == "stochastic" else 12)

        return {name: one(value) for name, value in target.items()}

    def smallest_kept(self, target: Gradients) -> dict[str, Tensor]:
        """Return by name the magnitude below which pruning dropped entries (scalars), infinity where it dropped all."""
        least = self._least(target)
        return {name: _smallest(value, least) for name, value in target.items()}

    def _least(self, target: Gradients) -> Tensor | None:
        """Return the threshold of pruning over all tensors at once; None where each has its own."""
        if self.name != "prune" or self.defense.scope != "global":
            return None
        return torch.stack([_smallest(value) for value in target.values()]).amin()

    def _spacing(self, target: Tensor) -> Tensor:
        return target.abs().amax() / (2 ** (self.defense.bits - 1) - 1)

    def _term(self, found: Tensor, target: Tensor, least: Tensor | None) -> Tensor:
        """Return the sum over the entries of one tensor."""
        known, soft = self.defense, self.softness
        if self.name == "noise":
            return _gaussian(found - target, known.std).sum()
        if self.name == "laplace":
            return (found - target).abs().sum() / known.scale
        if self.name == "dp_sgd":
            return _gaussian(found - target, known.noise_multiplier * known.clip).sum()
        if self.name == "prune":
            bound, present = _positive(_smallest(target, least))
            bounds = torch.where(target != 0, 0, bound)
            return torch.where(present, _censored(found - target, bounds, soft * bound).sum(), 0)
        if known.bits > 1:
            spacing, present = _positive(self._spacing(target))
            if known.rounding == "stochastic":  # a triangle of variance d^2 / 6 at most
                terms = _gaussian(found - target, spacing / math.sqrt(6))
            else:
                terms = _censored(found - target, spacing / 2, soft * spacing)
            return torch.where(present, terms.sum(), 0)
        mean, present = _positive(target.abs().amax())
        width = soft * mean
        signs = softplus(-target.sign() * found / width).sum()
        size = found.numel() * _censored(found.abs().mean() - mean, 0, width)
        return torch.where(present, signs + size, 0)


def _gaussian(error: Tensor, std: Tensor | float) -> Tensor:
    return (error / std).square() / 2


def _censored(error: Tensor, bound: Tensor | float, width: Tensor) -> Tensor:
    """Return -log P(-bound < error + width * n < bound), n standard logistic, up to a constant; bound 0 is its
    density."""
    return softplus((error - bound) / width) + softplus((-error - bound) / width)


def _positive(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the value, or 1 where it is zero or infinite; whether it is neither)."""
    present = (value > 0) & value.isfinite()
    return torch.where(present, value, 1), present


def _smallest(target: Tensor, least: Tensor | None = None) -> Tensor:
    """Return the smallest magnitude that was kept, infinity where nothing was; or `least`, where all tensors share
    one."""
    return torch.where(target != 0, target.abs(), torch.inf).amin() if least is None else least
