"""A layer as a linear system: what its output and its weight gradient say about its input.

A network is taken for a chain x -> z = W x + b -> act(z). With delta = dJ/dz the gradient of the kernel is linear in
the input too, dJ/dw = K x, where K holds the entries of delta that each tap of the kernel meets:

    U x = V,    U = [W; K],    V = [act^-1(next x) - b; dJ/dw]

W and K are sparse and share their pattern: an entry for every output position, tap and pair of channels whose input
pixel lies inside the picture. A linear layer is a 1 x 1 convolution of a 1 x 1 picture. All is float64 on the CPU.

Source: Chen and Campbell, "Analysing Training-Data Leakage from Gradients through Linear Systems and Gradient
Matching", BMVC 2022; Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021. The algebra is in
docs/method.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from attacks.threat_model.leak import RefusalError
from models.convnets import ConvolutionalNet


class Inverse(NamedTuple):
    """How an activation is undone: (activation, output) -> input, for outputs strictly between low and high."""

    function: Callable[[nn.Module, Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf


def _unsoftplus(act: nn.Softplus, y: Tensor) -> Tensor:
    """Return log(exp(b y) - 1) / b without overflow, and y where torch takes softplus for linear."""
    z = y + (-torch.expm1(-act.beta * y)).log() / act.beta
    return torch.where(y * act.beta > act.threshold, y, z)


INVERSES = {
    nn.Identity: Inverse(lambda act, y: y),
    nn.LeakyReLU: Inverse(lambda act, y: torch.where(y >= 0, y, y / act.negative_slope)),
    nn.Sigmoid: Inverse(lambda act, y: y.logit(), 0, 1),
    nn.Tanh: Inverse(lambda act, y: y.atanh(), -1, 1),
    nn.Softplus: Inverse(_unsoftplus, 0),
}
MARGIN = 1e-4  # estimated outputs are kept this far inside the range of their activation, as in the paper's code


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of a chain, the activation behind it, and the shape of its input, (C, H, W)."""

    name: str
    module: nn.Conv2d | nn.Linear
    act: nn.Module
    shape: tuple[int, int, int]

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def unknowns(self) -> int:
        return math.prod(self.shape)

    @property
    def weight(self) -> Tensor:
        """(C out, C in, k, k) float64."""
        weight = double(self.module.weight)
        return weight[..., None, None] if self.is_linear else weight

    @cached_property
    def axes(self) -> list[np.ndarray]:
        """For rows and for columns: the input coordinate (outputs, taps) that each output meets under each tap."""
        module = self.module
        if self.is_linear:
            return [np.zeros((1, 1), dtype=int)] * 2
        axes = []
        for side, kernel, stride, padding, dilation in zip(
            self.shape[1:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True
        ):
            outputs = (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            axes.append(stride * np.arange(outputs)[:, None] + dilation * np.arange(kernel) - padding)
        return axes

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return (self.weight.shape[0], len(self.axes[0]), len(self.axes[1]))

    @cached_property
    def pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(output position, tap, input pixel) of every product of one pair of channels; padding is left out."""
        (height, width), (y, x) = self.shape[1:], self.axes
        y, x = y[:, None, :, None], x[None, :, None, :]  # (rows, columns, taps down, taps across)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = np.broadcast_to(y * width + x, inside.shape)
        rows, columns, down, across = inside.shape
        position, tap = np.divmod(np.arange(inside.size).reshape(inside.shape), down * across)
        return position[inside], tap[inside], pixel[inside]

    @cached_property
    def forward_matrix(self) -> "scipy.sparse.csr_array":
        """W (outputs, inputs): z = W x + b."""
        position, tap, _ = self.pattern
        values = self.weight.flatten(2).numpy()[:, :, tap]
        rows = np.arange(len(values))[:, None] * math.prod(self.out_shape[1:]) + position
        return self._matrix(rows[:, None], values, math.prod(self.out_shape))

    def gradient_matrix(self, delta: Tensor) -> "scipy.sparse.csr_array":
        """Return K (entries of the weight, inputs): dJ/dw = K x, for delta = dJ/dz (C out, H, W) float64."""
        position, tap, _ = self.pattern
        values = delta.flatten(1).numpy()[:, None, position]
        out, channels, *kernel = self.weight.shape
        taps = math.prod(kernel)
        rows = np.arange(out * channels).reshape(out, channels, 1) * taps + tap
        return self._matrix(rows, np.broadcast_to(values, rows.shape), out * channels * taps)

    def _matrix(self, rows: np.ndarray, values: np.ndarray, height: int) -> "scipy.sparse.csr_array":
        channels = np.arange(self.shape[0])[:, None]
        columns = channels * math.prod(self.shape[1:]) + self.pattern[2]
        places = [np.broadcast_to(x, values.shape).ravel() for x in (rows, columns)]
        return scipy.sparse.csr_array((values.ravel(), places), shape=(height, self.unknowns))

    def invert(self, y: Tensor) -> Tensor:
        """Return the layer's z from its activated output, both (C, H, W); outside the range of the activation NaN or
        inf."""
        return INVERSES[type(self.act)].function(self.act, y)

    def outside(self, y: Tensor, margin: float) -> Tensor:
        """Return which outputs have no inverse, or are closer than `margin` to having none."""
        inverse = INVERSES[type(self.act)]
        return (y <= inverse.low + margin) | (y >= inverse.high - margin)

    def clip(self, y: Tensor) -> Tensor:
        """Return outputs moved MARGIN inside the range of the activation."""
        inverse = INVERSES[type(self.act)]
        return y.clamp(inverse.low + MARGIN, inverse.high - MARGIN)

    def slope(self, z: Tensor) -> Tensor:
        """Return act'(z), as autograd has it (LeakyReLU at 0: its negative slope)."""
        z = z.detach().requires_grad_()
        return torch.autograd.grad(self.act(z).sum(), z)[0]


def double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


def chain(model: nn.Module, image_shape: tuple[int, int, int], attack: str) -> list[Layer]:
    """Return the layers of a network from image to logits. Raises UserError naming what cannot be taken apart."""
    if not isinstance(model, ConvolutionalNet):
        raise RefusalError(
            f"attack '{attack}' takes chains of convolutions apart, not a {type(model).__name__}: use a model such as "
            f"cnn2_c1 or cnn6, or attack 'closed_form' on a ViT"
        )
    layers: list[Layer] = []
    for name, module in [*model.body.named_children(), ("fc", model.fc), ("head", model.head)]:
        name = name if name in ("fc", "head") else f"body.{name}"
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _is_plain(module)):
            shape = layers[-1].out_shape if layers else image_shape
            shape = (math.prod(shape), 1, 1) if isinstance(module, nn.Linear) else shape
            layers.append(Layer(name, module, nn.Identity(), shape))
        elif type(module) in INVERSES and layers and isinstance(layers[-1].act, nn.Identity):
            layers[-1] = Layer(layers[-1].name, layers[-1].module, module, layers[-1].shape)
        elif not isinstance(module, nn.Flatten | nn.Identity):
            raise RefusalError(
                f"attack '{attack}' cannot take layer '{name}' ({type(module).__name__}) apart: it knows plain "
                f"convolutions and linear layers, each followed by one of {', '.join(act.__name__ for act in INVERSES)}"
            )
    return layers


def _is_plain(module: nn.Conv2d) -> bool:
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def predicted_rank(layer: Layer) -> int:
    """Return rank(U) from shapes alone, for weights and gradients in general position.

    Pixels fall into classes by their row and column modulo the stride; a class meets only some of the taps. K has c_out
    equations per tap and input channel, of which no more count than the class has pixels. W adds its outputs, less
    c_out * min(c_out, c_in k^2) that follow from K: the pairing of delta_o with z_o' can be had from either. Untouched
    pixels are in no equation. Checked against singular values in tests/attacks/recursive/test_layers.py.
    """
    if layer.is_linear:
        return layer.unknowns  # each row of the weight gradient is the input, scaled
    out, channels, *kernel = layer.weight.shape
    taps, touched = [], []
    for side, axis, stride in zip(layer.shape[1:], layer.axes, layer.module.stride, strict=True):
        met = np.unique(axis[(axis >= 0) & (axis < side)])
        taps.append(np.bincount(axis[0] % stride, minlength=stride))
        touched.append(np.bincount(met % stride, minlength=stride))
    per_class = np.minimum(out * np.outer(*taps), np.outer(*touched))
    by_gradient = channels * int(per_class.sum())
    covered = channels * int(touched[0].sum() * touched[1].sum())
    overlap = out * min(out, channels * math.prod(kernel))
    return min(covered, max(by_gradient, math.prod(layer.out_shape) + by_gradient - overlap))


def measured_rank(layer: Layer, delta: Tensor) -> int:
    """Return rank(U) by its singular values: those above 1e-10 of the largest, K scaled to the norm of W. Dense and
    cubic in the number of pixels, for checks."""
    forward, gradient = layer.forward_matrix.toarray(), layer.gradient_matrix(delta).toarray()
    gradient *= np.linalg.norm(forward) / np.linalg.norm(gradient)
    values = np.linalg.svd(np.concatenate([forward, gradient]), compute_uv=False)
    return int((values > 1e-10 * values[0]).sum())


class Solution(NamedTuple):
    """x (n,), its relative residual |U x - V| / |V|, LSMR's estimate from below of the condition number, with columns
    as they were scaled, and the iterations spent."""

    x: np.ndarray
    residual: float
    condition: float
    iterations: int


def nearest_solution(
    system: "scipy.sparse.csr_array",
    right: np.ndarray,
    *,
    tolerance: float,
    unique: bool,
    start: np.ndarray | None = None,
) -> Solution:
    """Return the x of least |U x - V| that is closest to `start` (default 0: the minimum-norm solution), by LSMR.

    tolerance: relative, of residual and of normal equations. unique: the columns are independent, so they may be scaled
    to length 1, which saves up to half of the iterations. Time and memory grow with the entries of U; no dense matrix
    is made. Source: Fong and Saunders, "LSMR", SIAM J. Sci. Comput., 2011.
    """
    from scipy.sparse.linalg import lsmr, norm

    start = np.zeros(system.shape[1]) if start is None else start.astype(np.float64)
    scale = 1 / norm(system, axis=0) if unique else np.ones(system.shape[1])
    limits = {"atol": tolerance, "btol": tolerance, "conlim": 0, "maxiter": 20 * system.shape[1]}
    scaled = (system @ scipy.sparse.diags_array(scale)).tocsr() if unique else system
    step, _, iterations, *_, condition, _ = lsmr(scaled, right - system @ start, **limits)
    x = start + scale * step
    residual = float(np.linalg.norm(system @ x - right) / np.linalg.norm(right))
    return Solution(x, residual, float(condition), iterations)
