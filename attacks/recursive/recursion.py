"""From the last layer's gradient back to the image, one linear system after the other: what R-GAP and the hybrid share.

The classifier's weight gradient is the outer product of delta = dJ/dlogits and its input; with the input, going back,
each layer's output is known, its activation is undone, delta follows by the chain rule, and U x = V gives its input.

Source: Zhu and Blaschko, ICLR 2021, algorithm 1; Chen and Campbell, BMVC 2022, section 3. docs/method.md.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch
from scipy import sparse
from torch import Tensor, nn

from attacks.exactness import is_exact, rounding
from attacks.recursive.layers import Layer, Solution, chain, double, nearest_solution, predicted_rank
from attacks.threat_model.checks import CROSS_ENTROPY, check_single
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from utils.progress import tell

# Each layer is solved from what the one behind it has made of the rounding: what a layer's misfit may be, times that.
MISFIT = 256.0
SOLVER = 1e-13  # relative error that LSMR's tolerance leaves in float64
GROWTH = 10.0  # error of a pixel (range 1), at most, over the relative misfit of the worst layer


@dataclass(frozen=True)
class Equations:
    """What is known of one layer's input, float64. before: z - b (C, H, W); delta: dJ/dz; gradient: dJ/dw.

    consistent: `before` and `delta` are right up to rounding, so the layer's true input solves the equations; else they
    come from an estimate, and solving them to more than 8 digits is of no use. eps: the gradient's rounding.
    """

    layer: Layer
    before: Tensor
    delta: Tensor
    gradient: Tensor
    consistent: bool
    eps: float

    def system(self, balance: bool) -> tuple[sparse.csr_array, np.ndarray]:
        """Return (U, V). balance: scale the rows of K to the norm of W, which changes the answer only where there is
        none."""
        forward, gradient = self.layer.forward_matrix, self.layer.gradient_matrix(self.delta)
        scale = sparse.linalg.norm(forward) / sparse.linalg.norm(gradient) if balance else 1.0
        right = np.concatenate([self.before.flatten().numpy(), scale * self.gradient.flatten().numpy()])
        return sparse.vstack([forward, scale * gradient], format="csr"), right


Correct = Callable[[int, Equations, Tensor, Tensor], Tensor]


def check_recursion(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the leak is one gradient of one image by the cross-entropy, behind a chain of layers whose
    weights' gradients it all holds."""
    check_single(leak, attack)
    if loss != CROSS_ENTROPY:
        raise RefusalError(f"attack '{attack}' knows the slope of the cross-entropy, and the client's loss is '{loss}'")
    for layer in chain(leak.model, leak.image_shape, attack):
        leak.gradient(f"{layer.name}.weight", attack)


def go_back(leak: Leak, attack: str, *, balance: bool, keep_saturated: bool, correct: Correct | None) -> Reconstruction:
    """Reconstruct one image. correct(layer number, equations, least-squares input, label) -> better input (C, H, W),
    called for convolutions whose equations leave something open.

    An image whose every system has full rank and holds up to rounding is exact (attacks/exactness.py); the bias
    gradients, which the equations do not use, must agree. diagnostics: exact, deficiency (unknowns without an equation,
    over all layers), seconds and per layer NAME: rank (by shapes), unknowns, residual (relative), condition (LSMR's
    estimate), seconds, saturated (outputs whose activation has no inverse), and for layers with a bias its mismatch:
    |sum of delta - dJ/db|, relative.

    Raises UserError for more than one image, other networks, gradients that are zero, and outputs so saturated that the
    activation has no inverse. With keep_saturated these are kept MARGIN inside its range, as estimates always are.
    """
    layers = chain(leak.model, leak.image_shape, attack)
    gradients = {layer.name: double(leak.gradient(f"{layer.name}.weight", attack)) for layer in layers}
    eps = torch.finfo(leak.gradients[f"{layers[0].name}.weight"].dtype).eps
    x, delta, labels = classifier(leak, layers[-1], gradients[layers[-1].name], attack)
    diagnostics, exact, deficiency = {}, True, 0
    for place in reversed(range(len(layers) - 1)):
        tell("layer", len(layers) - 2 - place, len(layers) - 1)
        layer, after, began = layers[place], layers[place + 1], time.perf_counter()
        towards = torch.from_numpy(after.forward_matrix.T @ delta.flatten().numpy()).view(layer.out_shape)
        x, saturated = _within(layer, x.view(layer.out_shape), exact, 16 * eps, keep_saturated, attack)
        z = layer.invert(x)
        delta = towards * layer.slope(z)
        if not delta.any():
            raise RefusalError(
                f"the gradient by the output of layer '{layer.name}' is zero: nothing can be reconstructed"
            )
        bias = 0 if layer.module.bias is None else double(layer.module.bias)[:, None, None]
        equations = Equations(layer, z - bias, delta, gradients[layer.name], exact, eps)
        solution = solve(equations, balance)
        rank = predicted_rank(layer)
        deficiency += layer.unknowns - rank
        holds = exact and solution.residual < eps**0.25  # rounding, with what undone activations have made of it
        exact = holds and rank == layer.unknowns
        x = torch.from_numpy(solution.x).view(layer.shape)
        if correct is not None and not exact and not layer.is_linear:
            x = correct(place, replace(equations, consistent=holds), x, labels)
        about = {"rank": rank, "unknowns": layer.unknowns, "residual": solution.residual}
        about |= {"condition": solution.condition, "saturated": saturated}
        if f"{layer.name}.bias" in leak.gradients:
            given = double(leak.gradient(f"{layer.name}.bias", attack))
            about["bias_mismatch"] = float((delta.flatten(1).sum(dim=1) - given).norm() / given.norm())
        about["seconds"] = time.perf_counter() - began
        diagnostics |= {f"{layer.name}.{key}": value for key, value in about.items()}
    misfits = [value for key, value in diagnostics.items() if key.endswith((".residual", ".bias_mismatch"))]
    worst, eps = max(misfits, default=0.0), rounding(gradients.values())
    claimed = exact and is_exact(
        rank=-deficiency, unknowns=0, misfit=worst, error=GROWTH * worst, eps=max(eps, SOLVER), limit=MISFIT
    )
    diagnostics = {"exact": claimed, "deficiency": deficiency} | diagnostics
    return Reconstruction(
        x.view(1, *leak.image_shape).to(leak.gradients[f"{layers[0].name}.weight"]), diagnostics, labels
    )


def solve(equations: Equations, balance: bool, start: Tensor | None = None) -> Solution:
    """Return the input that fits the equations best, closest to `start` (C, H, W), default 0. Linear layers need no
    iteration: each row of their gradient is the input times an entry of delta."""
    layer = equations.layer
    if layer.is_linear:
        x = outer_input(equations.gradient, equations.delta.flatten())
        misfit = torch.outer(equations.delta.flatten(), x) - equations.gradient
        return Solution(x.numpy(), float(misfit.norm() / equations.gradient.norm()), 1.0, 0)
    tolerance = max(1e-14, 1e-4 * equations.eps) if equations.consistent else 1e-8
    unique = predicted_rank(layer) == layer.unknowns
    start = None if start is None else start.flatten().numpy()
    return nearest_solution(*equations.system(balance), tolerance=tolerance, unique=unique, start=start)


def outer_input(gradient: Tensor, delta: Tensor) -> Tensor:
    """Return the x that best fits gradient = delta x^T: rows weighted by their delta, not one row that may be tiny."""
    return delta @ gradient / delta.square().sum()


def classifier(leak: Leak, layer: Layer, gradient: Tensor, attack: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input of the last layer, delta = dJ/dz, label (1,)) from its gradients; the label as told, or found.

    The gradient of a bias is delta, and only the label's entry of it is negative, whatever increasing activation
    follows. Without it the weight's gradient gives both up to a common factor, which the loss fixes (R-GAP, for two
    classes).
    """
    if leak.labels is not None and leak.labels.dim() == 2:
        raise RefusalError(f"attack '{attack}' needs one class per image, and this client trained on mixed labels")
    if not gradient.any():
        raise RefusalError(
            f"the gradient of '{layer.name}.weight' is zero everywhere: nothing can be reconstructed from it"
        )
    if f"{layer.name}.bias" in leak.gradients:
        delta = double(leak.gradient(f"{layer.name}.bias", attack))
        if not delta.any():
            raise RefusalError(
                f"the gradient of '{layer.name}.bias' is zero everywhere: nothing can be reconstructed from it"
            )
        labels = delta.argmin()[None] if leak.labels is None else leak.labels.cpu()
        return outer_input(gradient, delta), delta, labels
    left, value, right = torch.linalg.svd(gradient, full_matrices=False)
    direction, length, x = left[:, 0], value[0], right[0]
    signs = direction.sign()
    odd = [k for k in range(len(signs)) if (signs == signs[k]).sum() == 1]
    if leak.labels is None and (len(signs) < 3 or len(odd) != 1):
        raise RefusalError(
            f"attack '{attack}' cannot tell the label from a classifier without bias here: use labels known"
        )
    labels = torch.tensor(odd) if leak.labels is None else leak.labels.cpu()
    if direction[labels] > 0:
        direction, x = -direction, -x

    def excess(factor: float) -> float:
        """Return the excess along `direction`, times the factor: delta by the loss at input factor * x, less delta by
        the gradient."""
        return factor * float(direction @ _delta(layer, factor * x, labels)) - float(length)

    def misfit(factor: float) -> float:
        return float((_delta(layer, factor * x, labels) - direction * length / factor).norm() * factor / length)

    factors = np.geomspace(1e-4, 1e4, 400)
    changes = np.flatnonzero(np.diff(np.sign([excess(factor) for factor in factors])))
    found = [scipy.optimize.brentq(excess, factors[k], factors[k + 1], xtol=1e-300, rtol=1e-15) for k in changes]
    fitting = [factor for factor in found if misfit(factor) < 1e-3]
    if len(fitting) != 1:
        raise RefusalError(
            f"attack '{attack}' finds {len(fitting)} inputs of the classifier that explain its gradient and needs one: "
            f"use more than two classes, or share the gradient of a bias (model_options.fc_bias true)"
        )
    return fitting[0] * x, direction * length / fitting[0], labels


def _delta(layer: Layer, x: Tensor, label: Tensor) -> Tensor:
    """Return dJ/dz of the cross-entropy when the last layer reads x."""
    bias = 0 if layer.module.bias is None else double(layer.module.bias)
    z = (double(layer.module.weight) @ x + bias).requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(layer.act(z)[None], label), z)[0]


def _within(
    layer: Layer, x: Tensor, exact: bool, rounding: float, keep_saturated: bool, attack: str
) -> tuple[Tensor, int]:
    """Return outputs whose activation can be undone, and how many had to be moved for it. Exact ones may lie right at
    the edge of the range for their rounding."""
    saturated = int(layer.outside(x, rounding).sum())
    if saturated and exact and not keep_saturated:
        raise RefusalError(
            f"attack '{attack}' cannot undo {type(layer.act).__name__} behind layer '{layer.name}': {saturated} of "
            f"{x.numel()} outputs are saturated; attack_options.keep_saturated true takes them for almost saturated"
        )
    return (layer.clip(x) if saturated or not exact else x), saturated
