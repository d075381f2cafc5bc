"""The equations of one token of a ViT, from the gradients of its first block; `first_block` solves them.

With m + B^T c a patch and n + A^T e what attention returns, what the token puts into query, key and value and into the
two layers of the MLP lies in the row spaces of their gradients (attacks/linear/first_block.py). Unknown are c and e.
"""

import copy
import math
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from attacks.exactness import MIXED, OFF, beyond_rank, rounding
from attacks.linear.row_spaces import affine_hull
from attacks.linear.token_span import FLOOR, SPREAD
from attacks.solvers.levenberg_marquardt import CHUNK
from attacks.threat_model.checks import evaluating, prefix_tokens
from attacks.threat_model.knowledge import pixel_bounds
from attacks.threat_model.leak import Leak, RefusalError
from models.jigsaw import patchify

PATCHES, QKV = "patch_embed.proj", "blocks.0.attn.qkv"
PROJ, MLP1, MLP2 = "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"
LAYERS = (PATCHES, QKV, PROJ, MLP1, MLP2)
SOLVED = 5.0  # times the squared misfit that rounding explains, up to which a token is solved; true ones come to 1
TOLD = 1e4  # times rounding, how far the weakest direction of the MLP's second layer has to stand out in float64
SLACK = 1e-6  # normalised, by which pixels may leave their range: they were rounded to single precision
OUTSIDE = 0.1  # weight of leaving the pixel range, against relative misfits


class TokenEquations:
    """The equations of one token. point (P,), basis (r, P): its patch is point + c basis; mean (D,), mixes (s, D): what
    its attention returns is mean + e mixes. Unknowns are [c, e]. off: times its predicted error, how far a solution can
    be off: more in single precision where a layer does not tell all tokens apart, for what fits may be a mixture.
    Infinite in double precision where what the MLP's second layer read fades into rounding: tokens on a smooth curve,
    greys without positions say, then fill its span, and every point of the curve fits. Equal patches leave a gap."""

    def __init__(self, leak: Leak):
        model, own = leak.model, dict(leak.model.named_parameters())
        self.block, self.before = _frozen(model.blocks[0]), _frozen(getattr(model, "norm_pre", nn.Identity()))
        self.attend = partial(self.block.attn, **_told_to_attention(leak))
        self.prefix = _prefix(model)
        self.number = model.grid[0] * model.grid[1]
        names = {
            layer: [f"{layer}.{part}" for part in ("weight", "bias") if f"{layer}.{part}" in own] for layer in LAYERS
        }
        gradient = {name: leak.gradient(name, "first_block").double() for both in names.values() for name in both}
        if empty := next((name for name, *_ in names.values() if not gradient[name].any()), None):
            raise RefusalError(f"the gradient of '{empty}' is zero everywhere: nothing can be reconstructed from it")
        self.eps, self.misfit, rows, tilts, stands, apart = rounding(gradient.values()), 0.0, {}, {}, {}, True
        # Lower than for linear equations: a direction of rounding only adds freedom, a lost one costs its patches.
        floor = 0.1 * FLOOR.get(self.eps, self.eps)
        for layer, (weight, *bias) in names.items():
            matrix = torch.cat([gradient[weight].flatten(1), *(gradient[name][:, None] for name in bias)], dim=1)
            tokens = self.number + prefix_tokens(model) * (layer != PATCHES)
            _, values, right = torch.linalg.svd(matrix, full_matrices=False)
            rows[layer] = right[: min(tokens, int((values > floor * values[0]).sum()))]
            self.misfit = max(self.misfit, beyond_rank(values, tokens, matrix.shape))
            tilts[layer], above, stands[layer] = _tilt(values, tokens, matrix.shape, self.eps)
            apart = apart and above == len(rows[layer]) == tokens
        biased = len(names[PATCHES]) > 1
        self.point, self.basis = _hull(rows[PATCHES], biased)
        self.full = min(self.number - biased, len(self.point))
        self.mean, self.mixes = _hull(rows[PROJ], len(names[PROJ]) > 1)
        self.spans = [rows[layer] for layer in (QKV, MLP1, MLP2)]
        self.tilts = [tilts[layer][: len(rows[layer])] for layer in (QKV, MLP1, MLP2)]
        self.off = OFF if apart else MIXED
        if self.eps <= torch.finfo(torch.float64).eps:
            self.off = OFF if stands[MLP2] > TOLD else math.inf
        self.embed = model.patch_embed.proj.weight.detach().double().flatten(1)
        self.offset = model.patch_embed.proj.bias.detach().double() if biased else torch.zeros_like(self.embed[:, 0])
        self.low, self.high = (
            patchify(bound.expand(1, *leak.image_shape).contiguous(), model.patch_size)[0, 0]
            for bound in pixel_bounds(leak, self.point)
        )
        self.low, self.high = self.low - SLACK, self.high + SLACK
        self.spread = SPREAD * (self.basis.shape[1] / max(1, len(self.basis))) ** 0.5 / min(leak.std)

    def patches(self, unknowns: Tensor) -> Tensor:
        """Return the patches (V, P) of solutions."""
        return self.point + unknowns[..., : len(self.basis)] @ self.basis

    def returned(self, unknowns: Tensor) -> Tensor:
        """Return (V, D): what attention adds to the tokens."""
        return self.block.attn.proj(self.mean + unknowns[..., len(self.basis) :] @ self.mixes)

    def tokens(self, unknowns: Tensor) -> Tensor:
        """Return (V, D): the tokens, without a position."""
        return self.patches(unknowns) @ self.embed.T + self.offset

    def inputs(self, unknowns: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what goes into query, key and value and into the two layers of the MLP (..., D) and (..., H)."""
        token = self.before(self.tokens(unknowns) + position)
        hidden, mlp = self.block.norm2(token + self.returned(unknowns)), self.block.mlp
        inner = mlp.act(mlp.fc1(hidden))
        return self.block.norm1(token), hidden, mlp.norm(inner) if hasattr(mlp, "norm") else inner

    def residual(self, unknowns: Tensor, position: Tensor) -> Tensor:
        """Return how far one token's inputs are from the spans of their layers, each in parts of its length, and its
        pixels from their range."""
        patch, inputs = self.patches(unknowns), self.inputs(unknowns, position)
        parts = [_outside(one, span) for one, span in zip(inputs, self.spans, strict=True)]
        outside = (patch - self.high).clamp_min(0) + (self.low - patch).clamp_min(0)
        return torch.cat([*parts, OUTSIDE * outside])

    def error(self, unknowns: Tensor, position: Tensor) -> Tensor:
        """Return (V,): predicted root mean square error of a solution's pixels (normalised), from its misfit and from
        how well the equations determine it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as in levenberg_marquardt
            slope = vmap(jacfwd(self.residual), chunk_size=CHUNK)(unknowns, position)
        values, axes = torch.linalg.eigh(slope.mT @ slope)
        equations = sum(span.shape[1] - len(span) for span in self.spans)
        variance = vmap(self.residual)(unknowns, position).square().sum(dim=1) / max(1, equations - unknowns.shape[1])
        spread = (axes[:, : len(self.basis)].square() / values.clamp_min(1e-24)[:, None]).sum(dim=(1, 2))
        return (variance * spread / self.basis.shape[1]).sqrt()

    def solved(self, unknowns: Tensor, position: Tensor) -> Tensor:
        """Return which (V,) fit the equations as far as rounding tilts the spans, the range of pixels aside."""
        left, explained = torch.zeros(2, len(unknowns), dtype=torch.float64)
        for one, span, tilt in zip(self.inputs(unknowns, position), self.spans, self.tilts, strict=True):
            value = _with_one(one, span)
            inside, size = value @ span.T, value.square().sum(dim=1)
            left += (value - inside @ span).square().sum(dim=1) / size
            explained += (inside * tilt).square().sum(dim=1) / size * (span.shape[1] - len(span))
        return left < SOLVED * explained

    def start(self, number: int, found: Tensor, generator: torch.Generator) -> Tensor:
        """Return random unknowns (number, n), half of them away from the tokens found, whose directions they leave
        alone."""
        noise = torch.randn(number, len(self.basis) + len(self.mixes), generator=generator, dtype=torch.float64)
        scale = self.spread * 3 ** (2 * torch.rand(number, 1, generator=generator, dtype=torch.float64) - 1)
        patch, mixed = noise[:, : len(self.basis)] * scale, noise[:, len(self.basis) :]
        if len(found):
            seen = found[:, : len(self.basis)]
            taken = torch.linalg.qr((seen - seen.mean(dim=0)).T).Q[:, : len(found) - 1]
            patch[::2] = seen.mean(dim=0) + patch[::2] - (patch[::2] @ taken) @ taken.T
        return torch.cat([patch, 0.3 * mixed], dim=1)


def _prefix(model: nn.Module) -> Tensor | None:
    """Return the tokens (K, D) before the patches of a model that adds no positions to them; None if not known."""
    rows = [getattr(model, name, None) for name in ("cls_token", "reg_token")]
    rows = [value.detach().double()[0] for value in rows if value is not None]
    whole = torch.cat(rows) if rows else model.patch_embed.proj.weight.new_zeros(0, model.embed_dim).double()
    return whole if len(whole) == prefix_tokens(model) else None


@torch.no_grad()
def _told_to_attention(leak: Leak) -> dict:
    """Return what a model gives its first attention beside tokens, by name: the angles of rotary positions, say."""
    model, told = leak.model, {}
    image = torch.zeros(1, *leak.image_shape).to(next(model.parameters()))
    handle = model.blocks[0].attn.register_forward_pre_hook(lambda _, args, named: told.update(named), with_kwargs=True)
    try:
        with evaluating(model):
            model(image)
    finally:
        handle.remove()
    floats = {name for name, value in told.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value.double() if name in floats else value for name, value in told.items()}


def _frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().eval().requires_grad_(False)


def _hull(rows: Tensor, biased: bool) -> tuple[Tensor, Tensor]:
    """Return (point, orthonormal directions) of the inputs of a layer, from the row space of its gradient; without a
    bias they are known to lie in that space alone."""
    return affine_hull(rows) if biased else (torch.zeros_like(rows[0]), rows)


def _outside(value: Tensor, span: Tensor) -> Tensor:
    """Return what of [value; 1], of the value alone where the layer has no bias, is not in the span of orthonormal
    rows, in parts of its length."""
    value = _with_one(value, span)
    return (value - (value @ span.T) @ span) / value.norm()


def _with_one(value: Tensor, span: Tensor) -> Tensor:
    """Return [value; 1] (..., n) for a layer with a bias, whose span has an entry more, else the value."""
    return value if value.shape[-1] == span.shape[1] else torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def _tilt(values: Tensor, tokens: int, shape: tuple[int, int], eps: float) -> tuple[Tensor, int, float]:
    """Return (how far rounding tilts each direction of a row space, per entry; how many directions stand above it; how
    many times the weakest of them), by the singular values (descending) of a gradient of a shape, of so many tokens and
    of relative rounding eps."""
    rest, free = values[tokens:], (shape[0] - tokens) * (shape[1] - tokens)
    noise = eps * float(values.square().mean()) ** 0.5 / max(shape) ** 0.5  # of an entry
    if len(rest):
        noise = max(1e-16 * float(values[0]), float(rest.square().sum() / free) ** 0.5)
    largest = noise * (shape[0] ** 0.5 + shape[1] ** 0.5)  # singular value of a matrix of noise
    above = values[:tokens][values[:tokens] > largest]
    weakest = float(above[-1]) / largest if len(above) else 0.0
    return noise / values.clamp_min(1e-300), len(above), weakest
