"""How far a candidate's gradient is from the leaked one: the objectives every matching attack minimises.

An objective is a function (candidate, target, *, layer_weights, scale, ...) of two dicts {parameter name: gradient}; it
returns a scalar, lower is closer. It compares the tensors of `target`, in that order, which is the order of
registration; the candidate may hold more. One problem at a time, and nothing but tensor arithmetic: objectives can be
vectorised by torch.func.vmap and differentiated twice, also where a gradient is exactly zero.

layer_weights: how much each tensor counts. 'equal'; 'linear', (L - l) / L for tensor l of L; 'exp', e^-l; or a dict
{name: number}, whose numbers may be 0-dim tensors. All but 'equal' favour the layers next to the image. In the cosines
they weight the inner product, as in Inverting Gradients.

Notation: g the candidate, h the target, <g, h> the inner product over all entries of all tensors.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from utils.errors import UserError, look_up

Gradients = Mapping[str, Tensor]
LayerWeights = str | Mapping[str, float | Tensor]

SCHEMES: dict[str, Callable[[int, int], float]] = {
    "equal": lambda place, number: 1.0,
    "linear": lambda place, number: (number - place) / number,
    "exp": lambda place, number: math.exp(-place),
}


def weigh_layers(names: Iterable[str], scheme: str) -> dict[str, float]:
    """Return {name: weight} by the name of a scheme, 'equal', 'linear' or 'exp' (Inverting Gradients). Raises
    UserError."""
    weight, names = look_up(SCHEMES, scheme, "layer_weights"), list(names)
    return {name: weight(place, len(names)) for place, name in enumerate(names)}


def select(gradients: Gradients, rule: str) -> list[str]:
    """Return the names of the tensors to match, in order of registration; they are chosen by the leaked gradients
    (Geiping et al.).

    rule: 'all', 'firstK', 'lastK', 'topK' or 'topk-K': the K of largest norm, the earlier where norms are equal; or
    'batchK': all, of which the loop draws K at a time (`drawn_at_once`). Leaks that are matched together may rank their
    tensors differently. Raises UserError for other rules and for K beyond the tensors.
    """
    names = list(gradients)
    if rule == "all":
        return names
    if drawn_at_once(rule):
        if drawn_at_once(rule) > len(names) and rule != "batch":
            raise UserError(f"layers '{rule}' draws from {len(names)} shared gradients: use a smaller number")
        return names
    parts = re.fullmatch(r"(first|last|top)(?:k-)?([1-9]\d*)", rule)
    if parts is None or "k-" in rule and parts[1] != "top":
        known = "all, firstK, lastK, topK or batchK, for example top10"
        raise UserError(f"unknown rule to select layers '{rule}': use {known}")
    kind, count = parts[1], int(parts[2])
    if count > len(names):
        raise UserError(
            f"layers '{rule}' asks for {count} of {len(names)} shared gradients: use 'all' or a smaller number"
        )
    if kind == "top":
        norms = {name: float(gradients[name].detach().double().norm()) for name in names}
        largest = set(sorted(names, key=lambda name: -norms[name])[:count])
        return [name for name in names if name in largest]
    return names[:count] if kind == "first" else names[-count:]


def drawn_at_once(rule: str) -> int:
    """Return how many tensors the rule 'batchK' compares in an iteration, 8 for 'batch'; 0 for other rules."""
    parts = re.fullmatch(r"batch([1-9]\d*)?", rule)
    return int(parts[1] or 8) if parts else 0


def l2(candidate: Gradients, target: Gradients, *, layer_weights: LayerWeights = "equal", scale: float = 1.0) -> Tensor:
    """Return the squared distance, summed over all entries (Deep Leakage from Gradients, Zhu et al., 2019)."""
    return scale * _total(lambda name: (candidate[name] - target[name]).square().sum(), target, layer_weights)


def euclidean(
    candidate: Gradients, target: Gradients, *, layer_weights: LayerWeights = "equal", scale: float = 1.0
) -> Tensor:
    """Return half the squared distance (breaching)."""
    return l2(candidate, target, layer_weights=layer_weights, scale=scale / 2)


def mean_squared(
    candidate: Gradients, target: Gradients, *, layer_weights: LayerWeights = "equal", scale: float = 1.0
) -> Tensor:
    """Return the sum over tensors of the mean squared difference of their entries: small tensors count as much as large
    ones."""
    # mse_loss, whose derivative is one pass over the tensors where that of a square of a difference is several.
    return scale * _total(lambda name: mse_loss(candidate[name], target[name]), target, layer_weights)


def l1(candidate: Gradients, target: Gradients, *, layer_weights: LayerWeights = "equal", scale: float = 1.0) -> Tensor:
    """Return half the absolute distance (breaching; Inverting Gradients' l1 is twice that)."""
    return scale / 2 * _total(lambda name: (candidate[name] - target[name]).abs().sum(), target, layer_weights)


def maximum(
    candidate: Gradients, target: Gradients, *, layer_weights: LayerWeights = "equal", scale: float = 1.0
) -> Tensor:
    """Return sum over tensors of their largest absolute difference (Inverting Gradients)."""
    return scale * _total(lambda name: (candidate[name] - target[name]).abs().amax(), target, layer_weights)


def cosine(
    candidate: Gradients,
    target: Gradients,
    *,
    layer_weights: LayerWeights = "equal",
    scale: float = 1.0,
    target_square: Tensor | None = None,
) -> Tensor:
    """Return 1 - cos of the angle between the gradients, all tensors taken as one vector (Inverting Gradients); in [0,
    2].

    Does not depend on the length of either. 1, with derivative 0, where one of them is zero. target_square: the
    `squared_length` of the target, of the same weights, where it is known.
    """
    return scale * (1 - _global_cosine(candidate, target, layer_weights, target_square))


def local_cosine(
    candidate: Gradients,
    target: Gradients,
    *,
    layer_weights: LayerWeights = "equal",
    scale: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """Return 1 - cos per tensor, weighted, then summed ('sum', Inverting Gradients) or divided by their number ('mean',
    LAMP).

    Tensors whose target is zero have no direction and are left out. Inverting Gradients' own code weights the cosines
    alone, sum of 1 - w cos: larger by the constant sum of 1 - w, with the same derivative.
    """
    look_up(dict.fromkeys(("sum", "mean")), reduction, "reduction")
    dots, lengths, target_lengths = (
        torch.stack([(x[name] * y[name]).sum() for name in target])
        for x, y in ((candidate, target), (candidate, candidate), (target, target))
    )
    present = _inverse_norm(target_lengths) > 0
    cosines = dots * _inverse_norm(lengths) * _inverse_norm(target_lengths)
    terms = dict(zip(target, torch.where(present, 1 - cosines, 0).unbind(), strict=True))
    total = scale * _total(terms.__getitem__, target, layer_weights)
    return total if reduction == "sum" else total / present.sum().clamp_min(1)


def out_sim(
    candidate: Gradients, target: Gradients, *, layer_weights: LayerWeights = "equal", scale: float = 1.0
) -> Tensor:
    """Return 1 - cos for each output of a layer (row of a tensor, along its first axis; a vector is one row), the
    weighted mean over all rows of all tensors (Automatic Transformation Search's out_sim).

    A row whose target is zero has no direction: it counts as 1, with derivative 0, as in the original.
    """
    costs, rows = {}, {}
    for name in target:
        one, other = (values[name].flatten(1) if values[name].dim() > 1 else values[name].reshape(1, -1)
                      for values in (candidate, target))  # fmt: skip
        cosines = (one * other).sum(1) * _inverse_norm(one.square().sum(1)) * _inverse_norm(other.square().sum(1))
        costs[name] = (1 - cosines).sum()
        rows[name] = costs[name].new_tensor(len(one))
    number = _total(rows.__getitem__, target, layer_weights)
    return scale * _total(costs.__getitem__, target, layer_weights) / number


def angular(
    candidate: Gradients,
    target: Gradients,
    *,
    layer_weights: LayerWeights = "equal",
    scale: float = 1.0,
    target_square: Tensor | None = None,
) -> Tensor:
    """Return the angle between the gradients in half turns, in [0, 1] (breaching).

    The cosine is kept 1e-7 away from 1, where the angle has no derivative: equal gradients are 1.4e-4 apart.
    """
    bound = 1 - 1e-7
    cosine = _global_cosine(candidate, target, layer_weights, target_square)
    return scale / math.pi * cosine.clamp(-bound, bound).acos()


def masked_cosine(
    candidate: Gradients,
    target: Gradients,
    *,
    layer_weights: LayerWeights = "equal",
    scale: float = 1.0,
    threshold: float = 1e-6,
) -> Tensor:
    """Return `cosine` over the entries where the target is larger than `threshold`: for pruned gradients
    (breaching)."""
    kept = {name: target[name].abs() > threshold for name in target}
    candidate, target = (
        {name: torch.where(kept[name], values[name], 0) for name in kept} for values in (candidate, target)
    )
    return cosine(candidate, target, layer_weights=layer_weights, scale=scale)


def fast_cosine(
    candidate: Gradients,
    target: Gradients,
    *,
    layer_weights: LayerWeights = "equal",
    scale: float = 1.0,
    target_square: Tensor | None = None,
) -> Tensor:
    """Return `cosine` whose derivative takes the candidate's length for a constant (breaching): same values, cheaper
    steps."""
    return scale * (1 - _global_cosine(candidate, target, layer_weights, target_square, through_length=False))


def tag(
    candidate: Gradients,
    target: Gradients,
    *,
    layer_weights: LayerWeights = "linear",
    scale: float = 1.0,
    tau: float = 0.1,
) -> Tensor:
    """Return half the sum over tensors of |d|_2^2 + tau * w |d|_1, d = g - h, w the layer weight (TAG, Deng et al.,
    2021)."""
    differences = {name: candidate[name] - target[name] for name in target}
    squares = _total(lambda name: differences[name].square().sum(), target, "equal")
    return scale / 2 * (squares + tau * _total(lambda name: differences[name].abs().sum(), target, layer_weights))


def pos_embed_cosine(
    candidate: Gradients,
    target: Gradients,
    *,
    names: Sequence[str] = ("pos_embed",),
    rowwise: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """Return APRIL's term: 1 - cos over the gradient of the position embeddings, in [0, 2] (Lu et al., CVPR 2022,
    section 4).

    names: tensors (..., D) whose rows take part, for instance also 'unknown_pos_embed'. rowwise: the mean over rows of
    1 - cos of each, instead of one cosine over all. Rows whose target is zero, positions MJP has masked, are left out
    on both sides. Added to another objective. Raises UserError when a tensor is not among the gradients.
    """
    for name in names:
        if name not in target:
            raise UserError(f"the position-embedding term needs the gradient of '{name}', which is not matched here")
    rows, target_rows = (torch.cat([x[name].flatten(0, -2) for name in names]) for x in (candidate, target))
    dots, target_lengths = (rows * target_rows).sum(dim=1), target_rows.square().sum(dim=1)
    present = _inverse_norm(target_lengths) > 0
    lengths = torch.where(present, rows.square().sum(dim=1), 0)
    if not rowwise:
        return scale * (1 - dots.sum() * _inverse_norm(lengths.sum()) * _inverse_norm(target_lengths.sum()))
    cosines = dots * _inverse_norm(lengths) * _inverse_norm(target_lengths)
    return scale * torch.where(present, 1 - cosines, 0).sum() / present.sum().clamp_min(1)


def _total(term: Callable[[str], Tensor], target: Gradients, layer_weights: LayerWeights) -> Tensor:
    """Return the weighted sum over the tensors of `target` of a scalar each."""
    # Per tensor: one long vector would be quicker for a single small network but costs copies of every gradient
    # (12 % slower over 16 LeNets under vmap), and the _foreach functions have no batching rule.
    if layer_weights == "equal":
        return torch.stack([term(name) for name in target]).sum()
    weights = weigh_layers(target, layer_weights) if isinstance(layer_weights, str) else layer_weights
    return torch.stack([weights[name] * term(name) for name in target]).sum()


def squared_length(gradients: Gradients, layer_weights: LayerWeights = "equal") -> Tensor:
    """Return <g, g>, weighted, a scalar: what the cosines of COSINES divide by, for `target_square`."""
    # x * x and not x.square(), whose derivative takes twice the calls.
    return _total(lambda name: (gradients[name] * gradients[name]).sum(), gradients, layer_weights)


def _global_cosine(
    candidate: Gradients,
    target: Gradients,
    layer_weights: LayerWeights,
    target_square: Tensor | None = None,
    *,
    through_length: bool = True,
) -> Tensor:
    """Return <g, h> / (|g| |h|), weighted; 0 where either is zero."""
    dot = _total(lambda name: (candidate[name] * target[name]).sum(), target, layer_weights)
    own = {name: candidate[name] if through_length else candidate[name].detach() for name in target}
    length = squared_length(own, layer_weights)
    target_length = squared_length(target, layer_weights) if target_square is None else target_square
    return dot * _inverse_norm(length) * _inverse_norm(target_length)


def _inverse_norm(square: Tensor) -> Tensor:
    """Return square^(-1/2), and 0 with derivative 0 where that or its derivative would overflow."""
    floor = torch.finfo(square.dtype).tiny ** (2 / 3)  # the derivative is square^(-3/2) / 2
    return torch.where(square > floor, square, torch.inf).rsqrt()


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "l2": l2,
    "euclidean": euclidean,
    "mean_squared": mean_squared,
    "l1": l1,
    "max": maximum,
    "cosine": cosine,
    "local_cosine": local_cosine,
    "out_sim": out_sim,
    "angular": angular,
    "masked_cosine": masked_cosine,
    "fast_cosine": fast_cosine,
    "tag": tag,
}

COSINES = ("cosine", "angular", "fast_cosine")  # these take `target_square`, which no iteration changes
