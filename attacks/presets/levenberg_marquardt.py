"""Second-order matching: the most probable images under a known noise, from a reconstruction that is near or from grey.

Minimised over the images x behind a gradient, all at once and in float64, is

    sum_k (g_k(x) - h_k)^2 / (2 s_k^2) + sum (neighbouring pixels' difference)^2 / (2 * smoothness^2)

with the client's gradient g, the shared one h, and s_k the standard deviation of the error that the defence makes in an
entry (attacks/matching/likelihood.py), as if errors were independent and Gaussian; without a defence, and in what
pruning kept, it is the rounding of the shared numbers. The directions of a picture differ by orders in how strongly a
gradient reacts to them (docs/matching.md), so first-order steps leave the weak ones as they were; a step of
Levenberg-Marquardt goes all the way in each:

    (J^T S J + R + mu diag(J^T S J + R)) d = -slope,   J = dg/dx,   S = diag(1 / s^2),   R the prior's matrix,

by a dense factorisation over all values of the images. Iterative solvers without the matrix would need about the square
root of the condition number in products, more than an image has values. So images are small and few (MOST). mu grows
until the sum falls and shrinks after a step that helped (Marquardt, 1963); from grey it starts large, so that the first
steps are short ones along what the gradient says loudest.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.label_recovery import LABELS as RULES
from attacks.label_recovery import first_labels
from attacks.linear.closed_form import closed_form
from attacks.matching.likelihood import Likelihood
from attacks.presets.defense_aware import defense_aware
from attacks.threat_model.checks import check_single, checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from attacks.threat_model.local_step import classes_of, client_model, shared_gradient
from attacks.threat_model.uses import LABELS, defaults, uses
from utils.errors import UserError, look_up
from utils.progress import tell

KNOWN = ("noise", "laplace", "quantize", "prune")  # defences whose errors are taken as independent of known variance
MOST = 12_288  # values of all images, four of CIFAR-10: the matrix has their square
NEAR, FAR = 1e-3, 1.0  # damping of the first step from a reconstruction, from grey
TRIALS, RAISE = 10, 8.0  # damping tried for a step, each RAISE times the one before
PROGRESS = 1e-4  # a step that lowers the sum by less of it is the last
AT_ONCE = 32  # columns of J made together
ROWS = 512  # of the matrix made together
HELD = 2**28  # entries of J held at once, two gigabytes; of more the matrix is made by columns, at twice the cost


def check_flat(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError for updates of several local steps."""
    if leak.local is not None and leak.local.steps > 1:
        raise RefusalError(
            f"attack 'levenberg_marquardt' from '{attack}' repeats one step of the client, and this leak is of "
            f"{leak.local.steps}: use local_steps 1"
        )


@checked(check_flat, uses=(LABELS,))
def flat(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Return grey images with a little noise, which tells those of one label apart."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    pixels = 0.5 + 0.02 * torch.randn(leak.batch_size, *leak.image_shape, generator=generator)
    return Reconstruction(((pixels - mean) / std).to(next(iter(leak.gradients.values())).device), {}, leak.labels)


BASES: dict[str, Callable] = {"closed_form": closed_form, "defense_aware": defense_aware, "flat": flat}


def check_levenberg_marquardt(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError where the base attack does not apply, or for leaks that this one has no equations for."""
    base = look_up(BASES, options["base"], "base attack")
    known = (*KNOWN, "none") if base is flat else KNOWN
    if options["defense"] not in known or (options["defense_options"] or {}).get("bits") == 1:
        raise UserError(
            f"attack '{attack}' from base '{options['base']}' must know a defence whose errors have a spread: set "
            f"attack_options.defense to {', '.join(known)} (of 2 bits and more), or base to flat, which needs none; "
            f"got '{options['defense']}'"
        )
    base.check(leak, defaults(base) | _base_options(options), loss, options["base"])
    if base is not flat:
        check_single(leak, attack)
    values = leak.batch_size * math.prod(leak.image_shape)
    if values > MOST:
        raise RefusalError(
            f"attack '{attack}' solves for all values of all images at once, at most {MOST}: this has {values}"
        )
    if leak.training or leak.model.hides_positions:
        what = "a model in training mode" if leak.training else "a model that hides positions"
        raise RefusalError(
            f"attack '{attack}' repeats the step of a model without masks and dropout, and this is {what}"
        )
    look_up(RULES, options["labels"], "label rule")
    if options["steps"] < 0 or options["smoothness"] <= 0:
        raise UserError(f"attack '{attack}': steps must be 0 or more, and smoothness above 0")


def _uses(options: dict) -> tuple[str, ...]:
    start = () if options["base"] == "flat" else uses(options["base"], _base_options(options))
    return tuple({LABELS, *start})


@checked(check_levenberg_marquardt, uses=_uses)
def levenberg_marquardt(
    leak: Leak,
    *,
    generator: torch.Generator,
    base: str = "defense_aware",
    base_options: dict | None = None,
    defense: str = "none",
    defense_options: dict | None = None,
    steps: int = 8,
    smoothness: float = 0.12,
    labels: str = "bias_corrected",
) -> Reconstruction:
    """Attack one image by `base`, or any batch from grey, then polish what it found by Levenberg-Marquardt.

    diagnostics: steps (that helped), start and objective (what is minimised, before and after, per entry of the
    gradient: 0.5 where nothing but the known errors is left), exact (False: nothing proves that no other images fit).

    Args:
        base: Where the steps start: defense_aware, closed_form, or flat, grey images of any number.
        base_options: Options of that attack; defense_aware is told the defence besides.
        defense: The defence that the client is known to use: noise, laplace, quantize, prune; with base flat also none.
        defense_options: Its options.
        steps: Steps at most. Each makes a matrix of all values of the images. From near 8 are enough, from grey 40.
        smoothness: Standard deviation of the difference of neighbouring pixels in [0, 1], of the prior.
        labels: Rule that reads hidden labels off the gradient; class_features is the surest, where it applies.
    """
    known = {"defense": defense, "defense_options": defense_options}
    told = _base_options({"base": base, "base_options": base_options} | known)
    found = look_up(BASES, base, "base attack")(leak, generator=generator, **told)
    model = client_model(leak.model, training=False, dtype=torch.float64).requires_grad_(False)
    parameters, names = dict(model.named_parameters()), tuple(leak.gradients)
    classes = classes_of(leak.model, leak.image_shape)
    targets = first_labels(leak, labels, classes, 1, generator)[0].to(parameters[names[0]])

    def gradient(images: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            own = shared_gradient(model, parameters, names, images, targets, None, None, aggregate=leak.aggregate)
        return torch.cat([own[name].flatten() for name in names])

    errors = torch.cat([one.expand_as(leak.gradients[name]).flatten() for name, one in _spread(leak, known).items()])
    weights = torch.where(errors > 0, errors.square().reciprocal(), 0)  # a tensor of zeros says nothing
    shared = torch.cat([value.flatten() for value in leak.gradients.values()]).double()
    mean, std = (shared.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    start = found.images.double().clamp(-mean / std, (1 - mean) / std)
    prior = torch.block_diag(*[roughness(leak.image_shape, std) / smoothness**2] * leak.batch_size)
    images, costs = polish(gradient, shared, weights, start, prior, steps, FAR if base == "flat" else NEAR)
    about = {"steps": len(costs) - 1, "start": costs[0] / len(shared), "objective": costs[-1] / len(shared)}
    classes_found = targets.argmax(dim=1) if found.labels is None else found.labels
    return Reconstruction(images, about | {"exact": False}, classes_found)


def _spread(leak: Leak, known: dict) -> dict[str, Tensor]:
    """Return by name the standard deviation of an entry's error in float64, a scalar or one for each entry.

    Without a defence it is that of the shared numbers, a unit in the last place of the tensor's largest, and so it is
    for what pruning kept; what it dropped lies anywhere between plus and minus the smallest kept.
    """
    shared = leak.gradients
    rounding = {name: torch.finfo(one.dtype).eps * one.abs().amax().double() for name, one in shared.items()}
    if known["defense"] == "none":
        return rounding
    likelihood = Likelihood(known["defense"], known["defense_options"], batch_size=leak.batch_size, softness=0.1)
    if known["defense"] == "prune":
        dropped = {name: bound.double() / math.sqrt(3) for name, bound in likelihood.smallest_kept(shared).items()}
        return {name: torch.where(one != 0, rounding[name], dropped[name]) for name, one in shared.items()}
    return {name: value.double() for name, value in likelihood.spread(shared).items()}


def _base_options(options: dict) -> dict:
    """Return the options of the base attack: defense_aware is told the defence."""
    told = {key: options[key] for key in ("defense", "defense_options")} if options["base"] == "defense_aware" else {}
    return told | (options["base_options"] or {})


def roughness(shape: tuple[int, ...], std: Tensor) -> Tensor:
    """Return the matrix R (n, n) with x^T R x the sum of squared differences of neighbouring pixels in [0, 1], of an
    image x of this shape (C, H, W), normalised by `std` (C, 1, 1)."""
    places = torch.arange(shape[0] * shape[1] * shape[2], device=std.device).view(shape)
    pairs = [(places[:, 1:], places[:, :-1]), (places[:, :, 1:], places[:, :, :-1])]
    one, other = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    matrix = std.new_zeros(places.numel(), places.numel(), dtype=torch.float64)
    for row, column, sign in ((one, one, 1.0), (other, other, 1.0), (one, other, -1.0), (other, one, -1.0)):
        matrix.index_put_((row, column), matrix.new_full((len(row),), sign), accumulate=True)
    scale = std.double().expand(shape).flatten()
    return scale[:, None] * matrix * scale


def polish(
    gradient: Callable[[Tensor], Tensor],
    shared: Tensor,
    weights: Tensor,
    start: Tensor,
    prior: Tensor,
    steps: int,
    damping: float,
) -> tuple[Tensor, list[float]]:
    """Return (images (B, C, H, W), the sum that is minimised, before and after every step that helped).

    Args:
        gradient: Of images, (B, C, H, W) -> (P,).
        shared: What it should be, (P,).
        weights: 1 / s^2 of its entries, (P,).
        start: Images to begin with.
        prior: Matrix of the prior, (n, n) for n values.
        steps: At most.
        damping: Of the first step.
    """

    def cost(images: Tensor) -> float:
        error = (weights * (gradient(images) - shared).square()).sum()
        return float(error + images.flatten() @ prior @ images.flatten()) / 2

    images, costs = start, [cost(start)]
    for number in range(steps):
        tell("Levenberg-Marquardt, step", number, steps)
        values, matrix = _normal_matrix(gradient, images, weights)
        slope = values.pull(weights * (values.at - shared)) + prior @ images.flatten()
        matrix += prior
        for _ in range(TRIALS):
            step = _solved(matrix, damping, -slope).view_as(images)
            lower = cost(images + step)
            if lower < costs[-1]:  # False for NaN
                break
            damping *= RAISE
        else:
            break
        images, damping = images + step, damping / RAISE
        costs.append(lower)
        if costs[-2] - lower < PROGRESS * costs[-2]:
            break
    return images, costs


def _solved(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """Return (A + damping diag(A))^-1 b from the lower triangle of A, NaN where rounding leaves it not positive
    definite."""
    damped = matrix.clone()
    damped.diagonal().mul_(1 + damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(right[:, None], factor)[:, 0] if not failed else torch.full_like(right, math.nan)


class _Linearised:
    """A function at images: at, its values (P,); pull(v) = J^T v (n,); push(u) = J u (P,) for u like the images."""

    def __init__(self, function: Callable[[Tensor], Tensor], images: Tensor):
        self.at, self._pull = vjp(function, images)
        _, self._push = vjp(lambda v: self._pull(v)[0], torch.zeros_like(self.at))  # linear: its transpose is J

    def pull(self, v: Tensor) -> Tensor:
        return self._pull(v)[0].flatten()

    def push(self, u: Tensor) -> Tensor:
        return self._push(u)[0]


def _normal_matrix(gradient: Callable, images: Tensor, weights: Tensor) -> tuple[_Linearised, Tensor]:
    """Return (the gradient at some images, J^T S J (n, n), of which the lower triangle counts)."""
    function = _Linearised(gradient, images)
    units = torch.eye(images.numel(), dtype=images.dtype, device=images.device).view(-1, *images.shape)
    if len(units) * len(weights) <= HELD:
        along = vmap(function.push, chunk_size=AT_ONCE)(units)  # (n, P): J^T
        along *= weights.sqrt()
        matrix = along.new_zeros(len(units), len(units))
        for begin in range(0, len(units), ROWS):
            matrix[begin : begin + ROWS, : begin + ROWS] = along[begin : begin + ROWS] @ along[: begin + ROWS].T
        return function, matrix
    return function, vmap(lambda u: function.pull(weights * function.push(u)), chunk_size=AT_ONCE)(units)
