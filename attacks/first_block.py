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
border compatibility orders them. With rotary positions nothing is added, but the order shows in what attention
returned: the arrangement is sought under which the first attention gives just that.

Source: derived for this project; docs/method.md.
"""

import copy
import math
import warnings

import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from attacks.jigsaw_solver import place
from attacks.leak import Leak, Reconstruction
from attacks.least_squares import CHUNK, least_squares
from attacks.mjp_equations import CERTAIN
from attacks.start import pixel_box
from attacks.token_span import FLOOR, SPREAD, span_of_rows, token_positions
from models.jigsaw import patchify, shuffle_patches, unpatchify
from models.position import RotaryAttention
from utils.errors import UserError

PATCHES, QKV = "patch_embed.proj", "blocks.0.attn.qkv"
MIXED, MLP1, MLP2 = "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"
LAYERS = (PATCHES, QKV, MIXED, MLP1, MLP2)
SOLVED = (
    1e-8  # relative squared misfit of a token: solutions are at rounding (1e-11 in float32), other minima above 1e-5
)
APART = 1e-3  # relative distance from which two solutions are two tokens
OUTSIDE = 0.1  # weight of leaving the pixel range, against relative misfits
ARRANGED = 1e-6  # relative squared misfit of what attention returns


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

    starts: random starts a round, shared among what is not found yet; rounds: at most; steps: of Levenberg-Marquardt.
    arrangements: starts of the search for the order under rotary positions. Patches that were not found are given a
    mean of all. diagnostics: patches; found, of them; span (dimension of the patches' affine hull); noise (largest
    predicted error of a pixel in a patch found, range 1; NaN without any); arrangement (relative squared misfit of the
    order; NaN where none was sought); exact (all found, without error worth the name, every place known). Raises
    UserError for models and leaks without these layers, with more patches than dimensions, and for several images.
    """
    if leak.batch_size != 1 or leak.local is not None:
        raise UserError(
            "attack 'first_block' solves for one image behind one gradient: use batch_size 1, local_steps 1"
        )
    tokens = TokenEquations(leak)
    rows, kind = torch.unique(token_positions(leak, tokens.number), dim=0, return_inverse=True)
    found = _collect(tokens, rows, kind, starts, rounds, steps, generator)
    patches = tokens.point.repeat(tokens.number, 1)
    known, misfit, errors = torch.zeros(tokens.number, dtype=torch.bool), math.nan, []
    for number, solutions in enumerate(found):
        places = (kind == number).nonzero()[:, 0]
        patches[places[: len(solutions)]] = tokens.patches(solutions)
        known[places[: len(solutions)]] = True
        if len(solutions):
            errors.append(float(tokens.error(solutions, rows[number].expand(len(solutions), -1)).max()) * max(leak.std))
    image = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
    shared = torch.bincount(kind)[kind] > 1
    if isinstance(tokens.block.attn, RotaryAttention) and bool(known.all()):
        order, misfit = _arrange(tokens, found[0], arrangements, generator)
        image = unpatchify(patches[None, order], leak.model.patch_size, leak.model.grid)
    elif shared.any() and not shared.all():
        image = order_by_borders(leak, image, shared, kind)
    noise, placed = max(errors, default=math.nan), misfit < ARRANGED or not shared.any()
    diagnostics = {
        "patches": tokens.number,
        "found": int(known.sum()),
        "span": len(tokens.basis),
        "noise": noise,
        "arrangement": misfit,
        "exact": bool(known.all() and placed) and noise < CERTAIN,
    }
    return Reconstruction(image, diagnostics)


class TokenEquations:
    """The equations of one token. point (P,), basis (r, P): its patch is point + c basis; mean (D,), mixes (s, D): what
    its attention returns is mean + e mixes. Unknowns are [c, e]."""

    def __init__(self, leak: Leak):
        model = leak.model
        self.block, self.class_token = check_block(model), model.cls_token
        self.number = model.grid[0] * model.grid[1]
        # Lower than for linear equations: a direction of rounding only adds freedom, a lost one costs its patches.
        floor = 0.1 * FLOOR.get(leak.gradients[f"{QKV}.weight"].dtype, 1e-3)  # half precision
        rows = {}
        for layer in LAYERS:
            weight, bias = (leak.gradient(f"{layer}.{part}", "first_block") for part in ("weight", "bias"))
            matrix = torch.cat([weight.flatten(1), bias[:, None]], dim=1).double().cpu()
            tokens = self.number + model.num_prefix_tokens * (layer != PATCHES)
            rows[layer] = span_of_rows(matrix, tokens, floor)
        self.point, self.basis = affine_hull(rows[PATCHES])
        self.mean, self.mixes = affine_hull(rows[MIXED])
        self.spans = [rows[layer] for layer in (QKV, MLP1, MLP2)]
        self.embed = model.patch_embed.proj.weight.detach().double().cpu().flatten(1)
        self.offset = model.patch_embed.proj.bias.detach().double().cpu()
        self.low, self.high = (
            patchify(bound.expand(1, *leak.image_shape).contiguous(), model.patch_size)[0, 0]
            for bound in pixel_box(leak, self.point)
        )
        self.spread = SPREAD * (self.basis.shape[1] / max(1, len(self.basis))) ** 0.5 / min(leak.std)

    def patches(self, unknowns: Tensor) -> Tensor:
        """(V, P)"""
        return self.point + unknowns[..., : len(self.basis)] @ self.basis

    def returned(self, unknowns: Tensor) -> Tensor:
        """(V, D): what attention adds to the tokens."""
        return self.block.attn.proj(self.mean + unknowns[..., len(self.basis) :] @ self.mixes)

    def tokens(self, unknowns: Tensor) -> Tensor:
        """(V, D): the tokens, without a position."""
        return self.patches(unknowns) @ self.embed.T + self.offset

    def residual(self, unknowns: Tensor, position: Tensor) -> Tensor:
        """How far one token's inputs are from the spans of their layers, each in parts of its length, and its pixels
        from their range."""
        patch, token = self.patches(unknowns), self.tokens(unknowns) + position
        hidden = self.block.norm2(token + self.returned(unknowns))
        inputs = (self.block.norm1(token), hidden, self.block.mlp.act(self.block.mlp.fc1(hidden)))
        parts = [_outside(one, span) for one, span in zip(inputs, self.spans, strict=True)]
        outside = (patch - self.high).clamp_min(0) + (self.low - patch).clamp_min(0)
        return torch.cat([*parts, OUTSIDE * outside])

    def error(self, unknowns: Tensor, position: Tensor) -> Tensor:
        """(V,): predicted root mean square error of a solution's pixels (normalised), from its misfit and from how well
        the equations determine it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as in least_squares
            slope = vmap(jacfwd(self.residual), chunk_size=CHUNK)(unknowns, position)
        values, axes = torch.linalg.eigh(slope.mT @ slope)
        equations = sum(span.shape[1] - len(span) for span in self.spans)
        variance = vmap(self.residual)(unknowns, position).square().sum(dim=1) / max(1, equations - unknowns.shape[1])
        spread = (axes[:, : len(self.basis)].square() / values.clamp_min(1e-24)[:, None]).sum(dim=(1, 2))
        return (variance * spread / self.basis.shape[1]).sqrt()

    def start(self, number: int, found: Tensor, generator: torch.Generator) -> Tensor:
        """Random unknowns (number, n), half of them away from the tokens found, whose directions they leave alone."""
        noise = torch.randn(number, len(self.basis) + len(self.mixes), generator=generator, dtype=torch.float64)
        scale = self.spread * 3 ** (2 * torch.rand(number, 1, generator=generator, dtype=torch.float64) - 1)
        patch, mixed = noise[:, : len(self.basis)] * scale, noise[:, len(self.basis) :]
        if len(found):
            seen = found[:, : len(self.basis)]
            taken = torch.linalg.qr((seen - seen.mean(dim=0)).T).Q[:, : len(found) - 1]
            patch[::2] = seen.mean(dim=0) + patch[::2] - (patch[::2] @ taken) @ taken.T
        return torch.cat([patch, 0.3 * mixed], dim=1)


def check_block(model: nn.Module) -> nn.Module:
    """The first block in float64 on the CPU. Raises UserError unless it is LayerNorm, attention, LayerNorm, MLP."""
    block = model.blocks[0] if hasattr(model, "blocks") else None
    plain = all(
        isinstance(getattr(block, name, None), kind)
        for name, kind in {"norm1": nn.LayerNorm, "norm2": nn.LayerNorm, "ls1": nn.Identity, "ls2": nn.Identity}.items()
    )
    if not plain or not hasattr(block, "mlp") or not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity):
        raise UserError("attack 'first_block' needs a ViT whose first block is LayerNorm, attention, LayerNorm, MLP")
    number, width = model.grid[0] * model.grid[1], model.embed_dim
    if number > width:
        raise UserError(
            f"attack 'first_block' needs no more patches than embedding dimensions, this model has {number} patches "
            f"and {width} dimensions"
        )
    return copy.deepcopy(block).double().cpu().eval().requires_grad_(False)


def affine_hull(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(point (P,), orthonormal directions (k - 1, P)) of all a with [a; 1] in the span of rows (k, P + 1)."""
    last = rows[:, -1]
    point = rows[:, :-1].T @ last / last.square().sum()
    flat = torch.linalg.svd(last[None]).Vh[1:] @ rows[:, :-1]
    return point, torch.linalg.qr(flat.T).Q.T


def _outside(value: Tensor, span: Tensor) -> Tensor:
    """What of [value; 1] is not in the span of orthonormal rows, in parts of its length."""
    value = torch.cat([value, value.new_ones(1)])
    return (value - (value @ span.T) @ span) / value.norm()


def _collect(
    tokens: TokenEquations,
    rows: Tensor,
    kind: Tensor,
    starts: int,
    rounds: int,
    steps: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """Per distinct position row, the solutions (at most as many as places share it, n)."""
    wanted = torch.bincount(kind).tolist()
    size = len(tokens.basis) + len(tokens.mixes)
    found = [torch.empty(0, size, dtype=torch.float64) for _ in wanted]
    for _ in range(rounds):
        missing = [number for number, count in enumerate(wanted) if len(found[number]) < count]
        if not missing:
            break
        each = max(2, starts // len(missing))
        start = torch.cat([tokens.start(each, found[number], generator) for number in missing])
        ends, misfits = least_squares(tokens.residual, start, rows[missing].repeat_interleave(each, dim=0), steps)
        for number, points, errors in zip(missing, ends.split(each), misfits.split(each), strict=True):
            for best in errors.argsort().tolist():
                apart = (found[number] - points[best]).norm(dim=1) > APART * points[best].norm()
                if errors[best] < SOLVED and bool(apart.all()) and len(found[number]) < wanted[number]:
                    found[number] = torch.cat([found[number], points[best][None]])
    return found


@torch.no_grad()
def _arrange(tokens: TokenEquations, found: Tensor, tries: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """((N,): the solution that stands in each place, relative squared misfit): the order under which the first
    attention returns to every token what the equations say it did. Best swap at a time, from random orders."""
    block, number = tokens.block, tokens.number
    content, returned = tokens.tokens(found), tokens.returned(found)
    pairs = torch.combinations(torch.arange(number))
    prefix = tokens.class_token.detach().double().cpu()
    swaps = torch.arange(number).repeat(len(pairs), 1)
    swaps[torch.arange(len(pairs)), pairs[:, 0]], swaps[torch.arange(len(pairs)), pairs[:, 1]] = pairs.T[1], pairs.T[0]
    scale = (returned - returned.mean(dim=0)).square().sum()

    def misfits(orders: Tensor) -> Tensor:
        parts = []
        for some in orders.split(256):
            whole = torch.cat([prefix.expand(len(some), -1, -1), content[some]], dim=1)
            mixed = block.attn(block.norm1(whole))[:, -number:]
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


def order_by_borders(leak: Leak, image: Tensor, shared: Tensor, kind: Tensor) -> Tensor:
    """Order patches whose places share a position by how their borders continue those of the others."""
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    for number in kind[shared].unique().tolist():
        pixels = patchify(image * std + mean, leak.model.patch_size)[0]
        order = place(pixels, kind == number, leak.model.grid, leak.model.patch_size)
        image = shuffle_patches(image, order[None], leak.model.patch_size)
    return image
