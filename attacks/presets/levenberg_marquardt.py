"""A second-order polish: from a reconstruction that is near, the most probable image under a known noise.

Minimised over the image x, in float64, is

    sum_k (g_k(x) - h_k)^2 / (2 s_k^2) + sum (neighbouring pixels' difference)^2 / (2 * smoothness^2)

with the client's gradient g, the shared one h, and s_k the standard deviation of the error that the defence makes in an
entry (attacks/matching/likelihood.py), as if errors were independent and Gaussian. The directions of the picture differ
a millionfold in how strongly the gradient of a ViT reacts to them (docs/matching.md), so first-order steps leave the
weak ones as they were; a step of Levenberg-Marquardt goes all the way in each:

    (J^T S J + R + mu diag(J^T S J + R)) d = -slope,   J = dg/dx,   S = diag(1 / s^2),   R the prior's matrix,

by a dense factorisation over all values of the image. Iterative solvers without the matrix would need about the square
root of the condition number in products, more than the image has values. So images are small (MOST). mu grows until the
sum falls and shrinks after a step that helped (Marquardt, 1963).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

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

BASES: dict[str, Callable] = {"closed_form": closed_form, "defense_aware": defense_aware}
GAUSSIAN = ("noise", "laplace", "quantize")  # defences whose errors are taken as independent of known variance
MOST = 4096  # values of an image: its matrix has their square
TRIALS, RAISE = 10, 8.0  # damping tried for a step, each RAISE times the one before
PROGRESS = 1e-6  # a step that lowers the sum by less of it is the last
AT_ONCE = 32  # columns of the matrix made together
HELD = 2**27  # entries of J that are held at once, a gigabyte; of more the matrix is made by columns, at twice the cost


def check_levenberg_marquardt(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError where the base attack does not apply, or for leaks that the polish has no equations for."""
    base = look_up(BASES, options["base"], "base attack")
    base.check(leak, defaults(base) | _base_options(options), loss, options["base"])
    check_single(leak, attack)
    values = leak.image_shape[0] * leak.image_shape[1] * leak.image_shape[2]
    if values > MOST:
        raise RefusalError(
            f"attack '{attack}' solves for all values of an image at once, at most {MOST}: this has {values}"
        )
    if options["defense"] not in GAUSSIAN or (options["defense_options"] or {}).get("bits") == 1:
        raise UserError(
            f"attack '{attack}' must know a defence whose errors have a spread: set attack_options.defense to "
            f"{', '.join(GAUSSIAN)} (of 2 bits and more), got '{options['defense']}'"
        )
    if leak.training or leak.model.hides_positions:
        what = "a model in training mode" if leak.training else "a model that hides positions"
        raise RefusalError(
            f"attack '{attack}' repeats the step of a model without masks and dropout, and this is {what}"
        )
    if options["steps"] < 0 or options["smoothness"] <= 0:
        raise UserError(f"attack '{attack}': steps must be 0 or more, and smoothness above 0")


def _uses(options: dict) -> tuple[str, ...]:
    return tuple({LABELS, *uses(options["base"], _base_options(options))})


@checked(check_levenberg_marquardt, uses=_uses)
def levenberg_marquardt(
    leak: Leak,
    *,
    generator: torch.Generator,
    base: str = "defense_aware",
    base_options: dict | None = None,
    defense: str = "",
    defense_options: dict | None = None,
    steps: int = 8,
    smoothness: float = 0.12,
) -> Reconstruction:
    """Attack one image by `base`, then polish what it found by Levenberg-Marquardt.

    diagnostics: steps (that helped), start and objective (what is minimised, before and after, per entry of the
    gradient), exact (False: what a noise hides is in no equation).

    Args:
        base: Attack that the polish starts from: defense_aware or closed_form.
        base_options: Options of that attack; defense_aware is told the defence besides.
        defense: The defence that the client is known to use: noise, laplace or quantize.
        defense_options: Its options.
        steps: Steps at most. Each makes a matrix of all values of the image.
        smoothness: Standard deviation of the difference of neighbouring pixels in [0, 1], of the prior.
    """
    known = {"defense": defense, "defense_options": defense_options}
    told = _base_options({"base": base, "base_options": base_options} | known)
    found = look_up(BASES, base, "base attack")(leak, generator=generator, **told)
    model = client_model(leak.model, training=False, dtype=torch.float64).requires_grad_(False)
    parameters, names = dict(model.named_parameters()), tuple(leak.gradients)
    classes = classes_of(leak.model, leak.image_shape)
    target = first_labels(leak, "bias_corrected", classes, 1, generator)[0].to(parameters[names[0]])

    def gradient(image: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            own = shared_gradient(model, parameters, names, image[None], target, None, None)
        return torch.cat([own[name].flatten() for name in names])

    spread = Likelihood(defense, defense_options, batch_size=1, softness=0.1).spread(leak.gradients)
    errors = torch.cat([spread[name].expand_as(value).flatten() for name, value in leak.gradients.items()]).double()
    weights = torch.where(errors > 0, errors.square().reciprocal(), 0)  # a tensor of zeros says nothing
    shared = torch.cat([value.flatten() for value in leak.gradients.values()]).double()
    mean, std = (shared.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    start = found.images[0].double().clamp(-mean / std, (1 - mean) / std)
    prior = roughness(start.shape, std) / smoothness**2
    image, costs = polish(gradient, shared, weights, start, prior, steps)
    about = {"steps": len(costs) - 1, "start": costs[0] / len(shared), "objective": costs[-1] / len(shared)}
    return Reconstruction(image[None], about | {"exact": False}, found.labels)


def _base_options(options: dict) -> dict:
    """Return the options of the base attack: defense_aware is told the defence."""
    told = {key: options[key] for key in ("defense", "defense_options")} if options["base"] == "defense_aware" else {}
    return told | (options["base_options"] or {})


def roughness(shape: tuple[int, ...], std: Tensor) -> Tensor:
    """Return the matrix R (n, n) with x^T R x the sum of squared differences of neighbouring pixels in [0, 1], of an
    image x (C, H, W) normalised by `std` (C, 1, 1)."""
    places = torch.arange(shape[0] * shape[1] * shape[2], device=std.device).view(shape)
    pairs = [(places[:, 1:], places[:, :-1]), (places[:, :, 1:], places[:, :, :-1])]
    one, other = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    matrix = std.new_zeros(places.numel(), places.numel(), dtype=torch.float64)
    for row, column, sign in ((one, one, 1.0), (other, other, 1.0), (one, other, -1.0), (other, one, -1.0)):
        matrix.index_put_((row, column), matrix.new_full((len(row),), sign), accumulate=True)
    scale = std.double().expand(shape).flatten()
    return scale[:, None] * matrix * scale


def polish(
    gradient: Callable[[Tensor], Tensor], shared: Tensor, weights: Tensor, start: Tensor, prior: Tensor, steps: int
) -> tuple[Tensor, list[float]]:
    """Return (image (C, H, W), the sum that is minimised, before and after every step that helped).

    Args:
        gradient: Of an image, (C, H, W) -> (P,).
        shared: What it should be, (P,).
        weights: 1 / s^2 of its entries, (P,).
        start: Image to begin with.
        prior: Matrix of the prior, (n, n) for n values.
        steps: At most.
    """

    def cost(image: Tensor) -> float:
        error = (weights * (gradient(image) - shared).square()).sum()
        return float(error + image.flatten() @ prior @ image.flatten()) / 2

    image, costs, damping = start, [cost(start)], 1e-3
    for number in range(steps):
        tell("Levenberg-Marquardt, step", number, steps)
        values, curvature = _normal_matrix(gradient, image, weights)
        slope = values.pull(weights * (values.at - shared)) + prior @ image.flatten()
        matrix = curvature + prior
        for _ in range(TRIALS):
            step = torch.linalg.solve(matrix + damping * matrix.diagonal().diag(), -slope).view_as(image)
            lower = cost(image + step)
            if lower < costs[-1]:
                break
            damping *= RAISE
        else:
            break
        image, damping = image + step, damping / RAISE
        costs.append(lower)
        if costs[-2] - lower < PROGRESS * costs[-2]:
            break
    return image, costs


class _Linearised:
    """A function at an image: at, its values (P,); pull(v) = J^T v (n,); push(u) = J u (P,) for u like the image."""

    def __init__(self, function: Callable[[Tensor], Tensor], image: Tensor):
        self.at, self._pull = vjp(function, image)
        _, self._push = vjp(lambda v: self._pull(v)[0], torch.zeros_like(self.at))  # linear: its transpose is J

    def pull(self, v: Tensor) -> Tensor:
        return self._pull(v)[0].flatten()

    def push(self, u: Tensor) -> Tensor:
        return self._push(u)[0]


def _normal_matrix(gradient: Callable, image: Tensor, weights: Tensor) -> tuple[_Linearised, Tensor]:
    """Return (the gradient at an image, J^T S J (n, n))."""
    function = _Linearised(gradient, image)
    units = torch.eye(image.numel(), dtype=image.dtype, device=image.device).view(-1, *image.shape)
    if len(units) * len(weights) <= HELD:
        along = vmap(function.push, chunk_size=AT_ONCE)(units)  # (n, P): J^T
        return function, (along * weights) @ along.T
    return function, vmap(lambda u: function.pull(weights * function.push(u)), chunk_size=AT_ONCE)(units)
