"""The hybrid attack: R-GAP's linear systems, corrected by gradient matching wherever they leave something open.

Going back from the classifier, a layer's least-squares input x is the start of

    minimise  a_cos * sum over tensors of (1 - cos(gradient at x, shared gradient)) + a_tv * TV(x) + a_sq * |U x - V|^2

over the gradients of this layer and all behind it, by Adam. Layers whose equations determine their input skip it: total
variation could only hurt there. Where the equations are right but too few, the result is moved to the nearest input
that fulfils them; the paper leaves it where Adam does (`project` false).

Source: Chen and Campbell, "Analysing Training-Data Leakage from Gradients through Linear Systems and Gradient
Matching", BMVC 2022, section 3; weights and iterations of their code.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import fold, normalize, one_hot, pad, unfold

from attacks.recursive.layers import Layer, chain
from attacks.recursive.recursion import Equations, check_recursion, go_back, solve
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.local_step import autograd_gradient, training_loss
from attacks.threat_model.uses import LABELS
from utils.progress import tell

WEIGHTS = ((1.0, 1.0, 0.05), (1.0, 1.0, 0.1), (10.0, 0.1, 1.0))  # (a_cos, a_tv, a_sq) of layers 0, 1, and from 2 on


@checked(check_recursion, uses=(LABELS,))
def hybrid(
    leak: Leak,
    *,
    generator: torch.Generator,
    iterations: int = 10000,
    deeper_iterations: int = 2000,
    lr: float = 1e-3,
    project: bool = True,
    balance: bool = True,
    keep_saturated: bool = False,
) -> Reconstruction:
    """Reconstruct one image from the gradients of a chain of layers; `generator` is not drawn from.

    The label is as told, or the one negative entry of the last bias gradient. Diagnostics and errors are those of
    attacks.recursive.recursion.go_back.

    Args:
        iterations: Iterations of Adam on the image.
        deeper_iterations: Iterations on the inputs of deeper layers, as in the paper: four times as many for the second
            layer, half as many for those behind it.
        lr: Learning rate of Adam.
        project: Move the corrected input to the nearest that fulfils the linear system, where that has no
            contradiction; false leaves it where Adam does, as in the paper.
        balance: Weigh both halves of a layer's equations alike; false stacks them as in the paper.
        keep_saturated: Take outputs whose activation has no inverse as just inside its range; false refuses them.
    """
    layers = chain(leak.model, leak.image_shape, "hybrid")
    schedule = {0: iterations, 1: 4 * deeper_iterations}

    def correct(place: int, equations: Equations, x: Tensor, labels: Tensor) -> Tensor:
        steps, weights = schedule.get(place, deeper_iterations // 2), WEIGHTS[min(place, 2)]
        x = descend(leak, layers[place:], equations, x, labels, weights=weights, iterations=steps, lr=lr)
        if project and equations.consistent:
            x = torch.from_numpy(solve(equations, balance, start=x).x).view(equations.layer.shape)
        return x

    return go_back(leak, "hybrid", balance=balance, keep_saturated=keep_saturated, correct=correct)


def descend(
    leak: Leak,
    layers: list[Layer],
    equations: Equations,
    start: Tensor,
    labels: Tensor,
    *,
    weights: tuple[float, float, float],
    iterations: int,
    lr: float,
) -> Tensor:
    """Minimise the hybrid's objective by Adam over the input (C, H, W) of the first of `layers`, from `start`.

    At the precision and on the device of the leak; weights (a_cos, a_tv, a_sq). Returns float64 on the CPU.
    """
    by_cosine, by_variation, by_equations = weights
    layer, like = layers[0].module, leak.gradients[f"{layers[0].name}.weight"]
    parts = [part for one in layers for part in ([nn.Flatten()] * one.is_linear + [one.module, one.act])]
    network = copy.deepcopy(nn.Sequential(*parts)).to(like)
    names = [f"{one.name}.{name}" for one in layers for name, _ in one.module.named_parameters()]
    parameters = dict(zip(names, network.parameters(), strict=True))
    shared = [normalize(leak.gradient(name, "hybrid").flatten(), dim=0) for name in names]
    x = start[None].to(like).requires_grad_()
    targets = one_hot(labels, layers[-1].module.out_features).to(like)
    known = [getattr(equations, part).to(like) for part in ("before", "delta", "gradient")]
    optimizer = torch.optim.Adam([x], lr=lr, fused=True)
    for step in range(iterations):
        tell(f"layer {layers[0].name}, iteration", step, iterations)
        candidate = autograd_gradient(lambda own: training_loss(network, {}, x, targets, None), parameters)
        slopes = [
            by_cosine * cosine_slope(value.detach(), to) for value, to in zip(candidate.values(), shared, strict=True)
        ]
        (x.grad,) = torch.autograd.grad(list(candidate.values()), [x], slopes)
        fixed = x.detach()
        x.grad += by_variation * variation_slope(fixed) + by_equations * misfit_slope(fixed, layer, *known)
        optimizer.step()
    return x.detach()[0].double().cpu()


# The derivatives of the three terms. Written out they cost a fraction of what autograd takes for them, and on a small
# network they are most of an iteration.


def variation_slope(x: Tensor) -> Tensor:
    """Return the derivative of mean |dx| + mean |dy| by x (1, C, H, W)."""
    across, down = x.diff(dim=3).sign(), x.diff(dim=2).sign()
    across, down = across / across.numel(), down / down.numel()
    return pad(across, (1, 0)) - pad(across, (0, 1)) + pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))


def misfit_slope(x: Tensor, layer: nn.Conv2d, before: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
    """Return the derivative of |U x - V|^2 by x (1, C, H, W). On the patches that the kernel meets, as columns, W and K
    are products with the kernel and with delta; their transposes add up in the same columns."""
    options = {name: getattr(layer, name) for name in ("kernel_size", "dilation", "padding", "stride")}
    columns, kernel = unfold(x, **options)[0], layer.weight.detach().flatten(1)
    before, delta, gradient = (value.flatten(1) for value in (before, delta, gradient))
    forward, backward = kernel @ columns - before, delta @ columns.T - gradient
    return 2 * fold((kernel.T @ forward + backward.T @ delta)[None], x.shape[2:], **options)


def cosine_slope(value: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative of 1 - cos(value, direction) by `value`, for a flat `direction` of length 1."""
    flat = value.flatten()
    square = flat @ flat + torch.finfo(flat.dtype).tiny
    return ((flat * (flat @ direction / square) - direction) * square.rsqrt()).view_as(value)
