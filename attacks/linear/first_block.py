"""Attack on ViTs that needs no position embedding at all: the first block's linear layers, one token at a time.

The gradient of a linear layer is a sum over tokens, what came back times what went in, and so is that of its bias: the
rows of [dL/dW | dL/db] span the inputs [a; 1] of all N + 1 tokens. Where a layer is wider than that, its input must lie
in a known subspace. For one token of the first block, with m + B^T c a patch, and n + A^T e what its attention returns,
both in the affine hulls that the patch projection and the attention's projection give away,

    z = W (m + B^T c) + b + position          [LN1(z); 1]              in the rows of query, key and value
    u = z + P (n + A^T e) + q                 [LN2(u); 1]              in the rows of the MLP's first layer
                                              [GELU(W1 LN2(u) + b1); 1] in the rows of its second

These are about D + H - 2 N equations for 2 N unknowns (D dimensions, H hidden ones, 4 D), and no other token appears in
them: how attention mixed the tokens is an unknown like the patch. Every solution is a patch of the image, so random
starts of Levenberg-Marquardt collect them. A position that is added to the token, be it learned, fixed, tied or the
unknown one of MJP, tells which place the equations are about; places that share it get their patches in any order, and
border compatibility orders them. With rotary or relative positions nothing is added, but the order shows in what
attention returned: the arrangement is sought under which the first attention gives just that.

Source: derived for this project; docs/method.md.
"""

import copy
import math
import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from attacks.certified import PEAK, Certificate
from attacks.exactness import MISFIT, MIXED, OFF, beyond_rank, claim, is_exact, rounding
from attacks.linear.jigsaw_solver import place, place_all
from attacks.linear.layer_scale import check_not_lost, fold_layer_scale
from attacks.linear.row_spaces import affine_hull
from attacks.linear.token_span import FLOOR, SPREAD, token_positions
from attacks.solvers.levenberg_marquardt import CHUNK, levenberg_marquardt
from attacks.threat_model.checks import (
    SAME,
    check_dropout,
    check_embedding,
    check_tokens,
    checked,
    evaluating,
    prefix_tokens,
)
from attacks.threat_model.knowledge import pixel_bounds
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError, on_cpu
from attacks.threat_model.uses import MJP
from models.jigsaw import patchify, shuffle_patches, unpatchify

PATCHES, QKV = "patch_embed.proj", "blocks.0.attn.qkv"
PROJ, MLP1, MLP2 = "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"
LAYERS = (PATCHES, QKV, PROJ, MLP1, MLP2)
SOLVED = 5.0  # times the squared misfit that rounding explains, up to which a token is solved; true ones come to 1
OTHER = 1e-6  # relative squared misfit from which on a minimum is none of a token, whatever the rounding
APART = 1e-3  # relative distance from which two solutions are two tokens
TOLD = 1e4  # times rounding, how far the weakest direction of the MLP's second layer has to stand out in float64
SLACK = 1e-6  # normalised, by which pixels may leave their range: they were rounded to single precision
OUTSIDE = 0.1  # weight of leaving the pixel range, against relative misfits
ARRANGED = 1e-6  # relative squared misfit of what attention returns


def check_first_block(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the first block is one whose layers' inputs are known functions of a patch and of what
    attention returns, all their gradients are shared, and there are more equations than unknowns for each token."""
    model, block = leak.model, check_embedding(leak, attack)
    layers = [getattr(block.attn, name, None) for name in ("qkv", "proj")]
    layers += [getattr(block.mlp, name, None) for name in ("fc1", "fc2")]
    plain = all(isinstance(layer, nn.Linear) for layer in layers) and isinstance(
        getattr(block.mlp, "act", 0), nn.Module
    )
    if not plain or layers[2].out_features != layers[3].in_features:
        raise RefusalError(
            f"attack '{attack}' needs a first block with linear layers attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 "
            f"and an activation mlp.act between the last two"
        )
    check_not_lost(model, [f"{layer}.weight" for layer in LAYERS], attack)
    own = dict(model.named_parameters())
    for layer in LAYERS:
        for part in ("weight", "bias"):
            if f"{layer}.{part}" in own:
                leak.gradient(f"{layer}.{part}", attack)
    check_tokens(leak, attack)
    check_dropout(leak, attack, seed_helps=False)
    _check_counts(model, layers[3].in_features, attack)


def _check_counts(model: nn.Module, hidden: int, attack: str) -> None:
    (width, *kernel), number = model.patch_embed.proj.weight.shape, model.grid[0] * model.grid[1]
    tokens = number + prefix_tokens(model)
    equations = 2 * max(0, width - tokens) + max(0, hidden - tokens)
    unknowns = min(number - 1, math.prod(kernel)) + min(tokens - 1, width)
    if number > width or equations < unknowns:
        raise RefusalError(
            f"attack '{attack}' needs no more patches than embedding dimensions and more equations than unknowns for "
            f"a token; this model has {number} patches and {width} dimensions, {equations} equations for {unknowns} "
            f"unknowns"
        )


@checked(check_first_block, uses=(MJP,))
def first_block(
    leak: Leak,
    *,
    generator: torch.Generator,
    starts: int = 128,
    rounds: int = 8,
    steps: int = 80,
    arrangements: int = 12,
) -> Reconstruction:
    """Reconstruct one image from the gradients of a ViT's patch projection and first block, in float64 on the CPU.

    Patches that were not found are given a mean of all. diagnostics: patches; found, of them; span (dimension of the
    patches' affine hull); noise (largest predicted error of a pixel in a patch found, range 1; NaN without any);
    arrangement (relative squared misfit of the order; NaN where none was sought); exact, exact_up_to_order (all found,
    with their places or without; attacks/exactness.py). Raises UserError for models and leaks without these layers,
    with more patches than dimensions, for several images, and for gradients of zero.

    Args:
        starts: Random starts of a round, shared among what is not found yet.
        rounds: Rounds of starts, at most.
        steps: Iterations of Levenberg-Marquardt from each start.
        arrangements: Starts of the search for the order under rotary or relative positions.
    """
    leak = fold_layer_scale(on_cpu(leak))
    tokens = TokenEquations(leak)
    rows, kind = torch.unique(token_positions(leak, tokens.number), dim=0, return_inverse=True)
    found = _collect(tokens, rows, kind, starts, rounds, steps, generator)
    patches = tokens.point.repeat(tokens.number, 1)
    known, misfit = torch.zeros(tokens.number, dtype=torch.bool), math.nan
    errors = torch.full((tokens.number,), torch.inf, dtype=torch.float64)  # predicted, of a pixel (range 1)
    for number, solutions in enumerate(found):
        places = (kind == number).nonzero()[:, 0]
        patches[places[: len(solutions)]] = tokens.patches(solutions)
        known[places[: len(solutions)]] = True
        if len(solutions):
            predicted = tokens.error(solutions, rows[number].expand(len(solutions), -1))
            errors[places[: len(solutions)]] = predicted * max(leak.std)
    image = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
    shared = torch.bincount(kind)[kind] > 1
    if len(found) == 1 and bool(known.all()) and _sees_places(tokens):
        order, misfit = _arrange(tokens, found[0], arrangements, generator)
        patches, errors = patches[order], errors[order]
        image = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
    elif shared.any() and not shared.all():
        image = order_by_borders(leak, image, shared, kind)
    noise = float(errors[known].max()) if known.any() else math.nan
    placed = misfit < ARRANGED or not shared.any()
    error = noise * tokens.off / OFF
    holds = is_exact(rank=len(tokens.basis), unknowns=tokens.full, misfit=tokens.misfit, error=error, eps=tokens.eps)
    diagnostics = {
        "patches": tokens.number,
        "found": int(known.sum()),
        "span": len(tokens.basis),
        "noise": noise,
        "arrangement": misfit,
        **claim(patches=bool(known.all()) and holds, places=bool(placed)),
    }
    certificate, clean = None, tokens.misfit <= MISFIT * tokens.eps  # else there is more than rounding in the gradient
    if clean and math.isfinite(tokens.off):
        group = torch.arange(tokens.number) if placed else kind
        certificate = Certificate(patches[None], tokens.off * PEAK * errors[None], group[None])
    return Reconstruction(image, diagnostics, certificate=certificate)


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
        self.eps, self.misfit, rows, tilts, apart = rounding(gradient.values()), 0.0, {}, {}, True
        # Lower than for linear equations: a direction of rounding only adds freedom, a lost one costs its patches.
        floor = 0.1 * FLOOR.get(self.eps, self.eps)
        for layer, (weight, *bias) in names.items():
            matrix = torch.cat([gradient[weight].flatten(1), *(gradient[name][:, None] for name in bias)], dim=1)
            tokens = self.number + prefix_tokens(model) * (layer != PATCHES)
            _, values, right = torch.linalg.svd(matrix, full_matrices=False)
            rows[layer] = right[: min(tokens, int((values > floor * values[0]).sum()))]
            self.misfit = max(self.misfit, beyond_rank(values, tokens, matrix.shape))
            tilts[layer], above, weakest = _tilt(values, tokens, matrix.shape, self.eps)
            apart = apart and above == len(rows[layer]) == tokens
        biased = len(names[PATCHES]) > 1
        self.point, self.basis = _hull(rows[PATCHES], biased)
        self.full = min(self.number - biased, len(self.point))
        self.mean, self.mixes = _hull(rows[PROJ], len(names[PROJ]) > 1)
        self.spans = [rows[layer] for layer in (QKV, MLP1, MLP2)]
        self.tilts = [tilts[layer][: len(rows[layer])] for layer in (QKV, MLP1, MLP2)]
        self.off = OFF if apart else MIXED
        if self.eps <= torch.finfo(torch.float64).eps:
            self.off = OFF if weakest > TOLD else math.inf  # of MLP2, the last layer
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


def _collect(
    tokens: TokenEquations,
    rows: Tensor,
    kind: Tensor,
    starts: int,
    rounds: int,
    steps: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Return for each distinct position row the solutions (at most as many as places share it, n)."""
    wanted = torch.bincount(kind).tolist()
    size = len(tokens.basis) + len(tokens.mixes)
    found = [torch.empty(0, size, dtype=torch.float64) for _ in wanted]
    for _ in range(rounds):
        missing = [number for number, count in enumerate(wanted) if len(found[number]) < count]
        if not missing:
            break
        each = max(2, starts // len(missing))
        start = torch.cat([tokens.start(each, found[number], generator) for number in missing])
        ends, misfits = levenberg_marquardt(tokens.residual, start, rows[missing].repeat_interleave(each, dim=0), steps)
        for number, points, errors in zip(missing, ends.split(each), misfits.split(each), strict=True):
            solved = tokens.solved(points, rows[number]) & (errors < OTHER)
            for best in errors.argsort().tolist():
                apart = (found[number] - points[best]).norm(dim=1) > APART * points[best].norm()
                if solved[best] and bool(apart.all()) and len(found[number]) < wanted[number]:
                    found[number] = torch.cat([found[number], points[best][None]])
    return found


@torch.no_grad()
def _sees_places(tokens: TokenEquations) -> bool:
    """Return whether the first attention tells patches apart by their places, as rotary and relative positions do."""
    if tokens.prefix is None:
        return False
    first, own = len(tokens.prefix), torch.Generator().manual_seed(0)
    rows = torch.randn(first + tokens.number, len(tokens.embed), generator=own, dtype=torch.float64)[None]
    order = torch.cat([torch.arange(first), torch.arange(tokens.number).flip(0) + first])
    moved, still = tokens.attend(rows[:, order]), tokens.attend(rows)[:, order]
    return bool((moved - still).abs().max() > SAME * still.abs().max())


@torch.no_grad()
def _arrange(tokens: TokenEquations, found: Tensor, tries: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return ((N,): the solution that stands in each place, relative squared misfit): the order under which the first
    attention returns to every token what the equations say it did. Best swap at a time, from random orders."""
    block, number = tokens.block, tokens.number
    content, returned = tokens.before(tokens.tokens(found)), tokens.returned(found)
    pairs = torch.combinations(torch.arange(number))
    prefix = tokens.before(tokens.prefix)[None]
    swaps = torch.arange(number).repeat(len(pairs), 1)
    swaps[torch.arange(len(pairs)), pairs[:, 0]], swaps[torch.arange(len(pairs)), pairs[:, 1]] = pairs.T[1], pairs.T[0]
    scale = (returned - returned.mean(dim=0)).square().sum()

    def misfits(orders: Tensor) -> Tensor:
        parts = []
        for some in orders.split(256):
            whole = torch.cat([prefix.expand(len(some), -1, -1), content[some]], dim=1)
            mixed = tokens.attend(block.norm1(whole))[:, -number:]
            parts.append((mixed - returned[some]).square().sum(dim=(1, 2)) / scale)
        return torch.cat(parts)

    best, lowest = torch.arange(number), math.inf
    for _ in range(tries):
        order = torch.randperm(number, generator=generator)
        value = float(misfits(order[None]))
        while True:
            trials = order[swaps]
            errors = misfits(trials)
            if float(errors.min()) >= value:
                break
            order, value = trials[errors.argmin()], float(errors.min())
        if value < lowest:
            best, lowest = order, value
        if lowest < ARRANGED:
            break
    return best, lowest


def order_all_by_borders(leak: Leak, image: Tensor) -> Tensor:
    """Order the patches of an image (1, C, H, W) of which no place is known by how their borders continue."""
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    size = leak.model.patch_size
    pixels = (image * std + mean).nan_to_num().clamp(0, 1)
    order = place_all(patchify(pixels, size)[0], leak.model.grid, size)
    return shuffle_patches(image, order[None], size)


def order_by_borders(leak: Leak, image: Tensor, shared: Tensor, kind: Tensor) -> Tensor:
    """Order patches whose places share a position by how their borders continue those of the others."""
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    for number in kind[shared].unique().tolist():
        pixels = patchify(image * std + mean, leak.model.patch_size)[0]
        order = place(pixels, kind == number, leak.model.grid, leak.model.patch_size)
        image = shuffle_patches(image, order[None], leak.model.patch_size)
    return image
