"""The derivative of what gradient matching minimises: exact or by differences, of many problems at once, compiled."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.matching.loss import Phase, ReconstructionLoss
from attacks.matching.options import MatchingOptions
from attacks.threat_model.local_step import autograd_gradient
from utils.errors import UserError


def build_derivative(loss: ReconstructionLoss, phase: Phase, options: MatchingOptions) -> Callable:
    """Return the function (images (V, B, C, H, W), targets (V, B, classes), problem_data) -> ([d/d images, and d/d
    targets if they are optimised], values (V,), objectives alone (V,)).

    The V problems are independent: vectorised, or one after the other where chunk is 1, where dropout is drawn anew
    from its seed, and in bf16, which vectorised normalisation layers do not take. Raises UserError for finite
    differences of several local steps or clients.
    """
    if not options.finite_difference:
        return _derivative(loss, phase, options, compile=options.compile, difference=False)
    if loss.problem.local is not None or loss.problem.aggregate is not None:
        raise UserError(
            "finite_difference works on single gradients of one client, not on updates of several local steps, and not "
            "on the mean over several clients"
        )
    exact = _derivative(loss, phase, options, compile=False, difference=False)
    return Checked(_derivative(loss, phase, options, compile=options.compile, difference=True), exact)


def _derivative(
    loss: ReconstructionLoss,
    phase: Phase,
    options: MatchingOptions,
    *,
    compile: bool,  # noqa: A002
    difference: bool,
) -> Callable:
    problem = loss.problem
    seeded = problem.dropout_seed is not None
    together = len(problem.images) > 1 and options.chunk != 1 and not seeded and options.precision != "bf16"
    where = (0, 1) if problem.joint else (0,)
    if not (difference or together or compile):
        one = partial(_by_autograd, loss, phase, where)
        return _with_precision(partial(_in_turn, one), options.precision, fused_attention=False)
    if difference:
        one = partial(_by_difference, loss, phase, where, options.finite_difference)
    else:
        one = grad_and_value(partial(loss, phase), argnums=where, has_aux=True)
    several = vmap(one, chunk_size=options.chunk or None) if together else one
    several = compiled(several) if compile and not seeded else several
    many = several if together else partial(_in_turn, several)
    return torch.no_grad()(_with_precision(many, options.precision, fused_attention=difference and not together))


def _by_autograd(
    loss: ReconstructionLoss, phase: Phase, where: tuple[int, ...], images: Tensor, targets: Tensor, data: dict
) -> tuple:
    """Differentiate one problem by plain autograd: half the cost of torch.func for a single small network."""
    candidate = [images.detach(), targets.detach()]
    moving = [candidate[place].requires_grad_() for place in where]
    total, distance = loss(phase, *candidate, data, gradient=autograd_gradient)
    return torch.autograd.grad(total, moving), (total.detach(), distance.detach())


def _by_difference(
    loss: ReconstructionLoss,
    phase: Phase,
    where: tuple[int, ...],
    step_length: float,
    images: Tensor,
    targets: Tensor,
    data: dict,
) -> tuple:
    """Differentiate one problem without a second derivative (Pearlmutter, 1994, one-sided).

    d/dx <v, dL/dtheta> is the change of dL/dx when theta moves along v = d objective / d gradient, here by
    `step_length` of its own length. Attention may then run fused, which has no second derivative.
    """
    wanted = {name: loss.parameters[name] for name in loss.names}
    places = tuple(place + 1 for place in where)

    def training_loss(parameters: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return loss.training_loss(parameters, images, targets, data)

    candidate, *here = grad(training_loss, argnums=(0, *places))(wanted, images, targets)
    along, distance = grad_and_value(partial(loss.distance, phase))(candidate, data)
    length = _length(value.detach() for value in wanted.values())
    step = step_length * length / _length(along.values()).clamp_min(1e-12)
    moved = {name: value + step * along[name] for name, value in wanted.items()}
    there = grad(training_loss, argnums=places)(moved, images, targets)
    of_priors, prior = grad_and_value(partial(loss.prior, phase))(images, data)
    gradients = [phase.objective * (after - before) / step for before, after in zip(here, there, strict=True)]
    gradients[0] = gradients[0] + of_priors
    return tuple(gradients), (phase.objective * distance + prior, distance)


def _in_turn(one: Callable, images: Tensor, targets: Tensor, data: dict[str, Tensor]) -> tuple:
    """Apply the function of one problem to each of several."""
    results = []
    for k in range(len(images)):
        results.append(one(images[k], targets[k], {name: value[k] for name, value in data.items()}))
    gradients, values = zip(*results, strict=True)
    return tuple(map(torch.stack, zip(*gradients, strict=True))), tuple(map(torch.stack, zip(*values, strict=True)))


def _with_precision(function: Callable, precision: str, *, fused_attention: bool) -> Callable:
    """Run `function` at the precision of matrix products asked for, with attention that has a second derivative and
    can be vectorised, which the fused kernels cannot."""

    def call(images: Tensor, targets: Tensor, data: dict[str, Tensor]) -> tuple:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if precision == "bf16" else precision)
        try:
            with (
                nullcontext() if fused_attention else sdpa_kernel(SDPBackend.MATH),
                torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"),
            ):
                gradients, (total, distance) = function(images, targets, data)
        finally:
            torch.set_float32_matmul_precision(before)
        return gradients, total.detach(), distance.detach()

    return call


def compiled(function: Callable) -> Callable:
    """Return the derivative as one graph, traced and compiled at its first call, for those shapes only.

    Traced by running it, whose record has no Python left in it: hooks in a network (the priors that look into one) are
    no obstacle, and every derivative has a graph of its own, where torch.compile on the function itself would share
    one cache of eight entries among all attacks of a process. Small graphs on a processor are called from C++: from
    Python, the calls are a seventh of a LeNet's time. Raises what the compiler raises; nothing falls back.
    """
    graphs = []

    def call(images: Tensor, targets: Tensor, data: dict[str, Tensor]) -> tuple:
        def flat(images: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            gradients, values = function(images, targets, dict(zip(data, values, strict=True)))
            return *gradients, *values

        inputs = images, targets, *data.values()
        if not graphs:
            graph = make_fx(flat)(*inputs)
            small = images.device.type == "cpu" and len(graph.graph.nodes) < 1000
            graphs.append(torch.compile(graph, dynamic=False, options={"cpp_wrapper": small}))
        *gradients, total, distance = graphs[0](*inputs)
        return tuple(gradients), (total, distance)

    return call


class Checked:
    """A derivative by finite differences that is compared with the exact one at every CHECK_EVERY-th call.

    Where the cosine of the two, by the images of a problem, falls below LEAST, that problem goes on exactly. lowest
    (V,): the smallest cosine of every problem so far.
    """

    CHECK_EVERY, LEAST = 100, 0.99

    def __init__(self, quick: Callable, exact: Callable):
        self.quick, self.exact, self.calls = quick, exact, 0
        self.lowest, self.some_failed = torch.ones(()), False

    def __call__(self, images: Tensor, targets: Tensor, data: dict[str, Tensor]) -> tuple:
        quick = self.quick(images, targets, data)
        check = self.calls % self.CHECK_EVERY == 0
        self.calls += 1
        if not (check or self.some_failed):
            return quick
        exact = self.exact(images, targets, data)
        if check:
            ours, theirs = (found[0][0].flatten(1) for found in (quick, exact))
            cosine = torch.nn.functional.cosine_similarity(ours, theirs).nan_to_num(-1.0)
            self.lowest = torch.minimum(self.lowest.to(cosine), cosine)
            self.some_failed = bool((self.lowest < self.LEAST).any())
        failed = self.lowest < self.LEAST
        pairs = zip(quick[0], exact[0], strict=True)
        return tuple(torch.where(failed.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs), *quick[1:]


def _length(values: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean length of all values together."""
    return torch.stack([value.square().sum() for value in values]).sum().sqrt()
