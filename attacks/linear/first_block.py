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

import math

import torch
from torch import Tensor, nn

from attacks.certified import PEAK, Certificate
from attacks.exactness import MISFIT, OFF, claim, is_exact
from attacks.linear.layer_scale import check_not_lost, fold_layer_scale
from attacks.linear.patch_order import ARRANGED, arranged, order_by_borders, sees_places
from attacks.linear.token_equations import LAYERS, TokenEquations
from attacks.linear.token_span import token_positions
from attacks.solvers.levenberg_marquardt import levenberg_marquardt
from attacks.threat_model.checks import (
    check_dropout,
    check_embedding,
    check_tokens,
    checked,
    prefix_tokens,
)
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError, on_cpu
from attacks.threat_model.uses import MJP
from models.jigsaw import unpatchify

OTHER = 1e-6  # relative squared misfit from which on a minimum is none of a token, whatever the rounding
APART = 1e-3  # relative distance from which two solutions are two tokens


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

    Patches that were not found are given a mean of all. diagnostics: patches; found, places with a solution, which need
    not be a patch where the certificate claims nothing; span (dimension of the patches' affine hull); noise (largest
    predicted error of a pixel in a patch found, range 1; NaN without any); arrangement (relative squared misfit of the
    order; NaN where none was sought); exact, exact_up_to_order (all found, with their places or without;
    attacks/exactness.py). Raises UserError for models and leaks without these layers, with more patches than
    dimensions, for several images, and for gradients of zero.

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
    if len(found) == 1 and bool(known.all()) and sees_places(tokens):
        order, misfit = arranged(tokens, found[0], arrangements, generator)
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
