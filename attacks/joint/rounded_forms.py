"""Forms of the hidden tokens of one masked image whose gradient is rounded to single precision, visible tokens known.

As in attacks/joint/forms.py the two relations of a block are added, so that nothing is divided by the gradient of the
attention's projection, which drowns. The V visible tokens (the class token first) are known: their g and the z that
enters a block, and from those their g'' and the z that enters the next. So coordinates alpha are a unit vector for each
visible token, and k numbers for each hidden one; only the hidden columns of a block's relation are solved, for hidden
rows,

    (I - Pi) [Zh^T, Y^T] [S; F] = -(I - Pi) (K1 - C gamma1 Wqkv^T K2 - C gamma2 W1^T K4),   S (k, k), F free,

with Y the few directions in which what attention returned to hidden tokens differs: the others only add their noise.

Hidden tokens are told from visible ones by the left null space of the visible columns of each change of basis, and the
hidden inputs of the MLP's second layer by projection on what is orthogonal to the visible g''. Source: derived for this
project; docs/method.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Block, affine
from attacks.joint.forms import BLOCKS, SPARE, Forms, changed
from attacks.linear.mjp_equations import centre
from attacks.linear.row_spaces import least_squares, orthonormal, outside, rows_of, with_bias
from attacks.threat_model.leak import Leak

FREE = 1e-2  # share of the largest part of P o from which on a direction of it is one of Y


@dataclass(frozen=True)
class Known:
    """The visible tokens of a masked image, the class token first. entering (V, D): z^; gradient (V, D): g; patches
    (V - 1, P); mixed (V, D): what the first attention returned."""

    entering: Tensor
    gradient: Tensor
    patches: Tensor
    mixed: Tensor


@dataclass(frozen=True)
class Tokens:
    """What enters a block: known (V, D), gradient (V, D): as in Known; hidden (k, D): z^ of the hidden ones, alpha @
    hidden; sums (D, k): sum g^T alpha over them."""

    known: Tensor
    gradient: Tensor
    hidden: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Passed:
    """What one block makes of its tokens. form (k, k); left (V, D) and hidden (k, D): u^; mixed (k, D + 1): [o; 1] of
    the hidden; beyond (V, D): g''; misfit: relative, of the change of basis."""

    form: Tensor
    left: Tensor
    hidden: Tensor
    mixed: Tensor
    beyond: Tensor
    misfit: float


def rounded_forms(leak: Leak, visible: Known, count: int) -> Forms:
    """Return one form of the hidden tokens, `count` or fewer of them distinct, for each of the first blocks."""
    model = leak.model
    embedding = with_bias(leak, PATCHES)
    shown = visible.gradient[1:].T  # (D, V - 1)
    span = rows_of(outside(embedding, orthonormal(shown)), count, leak.gradients[f"{PATCHES}.weight"].dtype)
    sums = least_squares(span.basis.T, (embedding - shown @ _one(visible.patches)).T).T  # K1
    weight = affine(model.patch_embed.proj)
    weight[:, -1] += model.unknown_pos_embed.detach().double().cpu().flatten()
    tokens = Tokens(visible.entering, visible.gradient, centre(span.basis @ weight.T), sums)
    limit, certain = len(visible.entering) + count, len(visible.entering) + len(span.basis)
    matrices, misfits, mixed, first = [], [], None, None
    steps = min(BLOCKS, len(model.blocks) - 1)  # of the last, patches have no gradient
    for step in range(steps):
        block = Block(leak, step, limit, limit, certain)
        first = first if step else block
        passed = _passed(block, tokens, None if step else _one(visible.mixed))
        matrices.append(passed.form)
        misfits.append(passed.misfit)
        mixed = passed.mixed if mixed is None else mixed
        if step + 1 < steps:
            tokens, misfit = _next(block, Block(leak, step + 1, limit, limit, certain), passed, count)
            misfits.append(misfit)
    own = torch.eye(len(span.basis), dtype=torch.float64)
    entering = centre(span.basis @ weight.T)
    told = span, max(misfits), entering, first
    return Forms(torch.stack(matrices), len(own), span.basis, None, own, None, mixed, *told)


def _passed(block: Block, tokens: Tokens, mixed: Tensor | None) -> Passed:
    """Return what a block makes of its tokens; mixed (V, D + 1): [o; 1] of the visible ones where they are known."""
    shown, width = len(tokens.known), block.leak.model.embed_dim
    entering = torch.cat([tokens.known, tokens.hidden])  # (T, D)
    room = width - 2 - len(entering)
    seen = block.returned(block.mixed.basis[:room])  # (r, D)
    change, misfit = changed(torch.cat([entering, seen]), block.passed)
    lower, rest = change[:, : len(entering)], change[:, len(entering) :]
    through = block.through_attention(block.tokens.on(entering))
    behind = block.through_mlp(block.passed.on(block.passed.basis) @ lower)
    right = torch.cat([tokens.gradient.T, tokens.sums], dim=1) - through - behind  # (D, T)
    reach = orthonormal(block.active.reach, torch.ones(width, 1, dtype=torch.float64))

    mixed_hidden = _hidden_part(lower, rest, shown) @ block.mixed.basis[: len(seen)]
    returned = block.returned(mixed_hidden)  # (k, D)
    axes = torch.linalg.svd(returned, full_matrices=False)
    room = max(0, width - reach.shape[1] - len(returned) - SPARE)
    free = axes.Vh[FREE * axes.S[0] < axes.S][:room]
    system = outside(torch.cat([tokens.hidden, free]).T, reach)
    form = -least_squares(system, outside(right[:, shown:], reach))[: len(returned)]
    hidden = tokens.hidden + returned
    if mixed is None:
        left = tokens.known + (torch.linalg.pinv(lower)[:shown] @ rest) @ seen
    else:
        left = tokens.known + block.returned(mixed)
    # g'' - (t + t') z^ - t' (u^ - z^) is known: outside the reach of g'' two numbers for each token.
    pairs = torch.stack([tokens.known, left - tokens.known], dim=2)  # (V, D, 2)
    flat = outside(pairs.transpose(0, 1).flatten(1), reach).view(width, shown, 2).transpose(0, 1)
    goal = outside(right[:, :shown], reach).T[..., None]  # (V, D, 1)
    ratios = torch.linalg.lstsq(flat, -goal).solution  # (V, 2, 1)
    beyond = right[:, :shown].T + (pairs @ ratios)[..., 0]
    return Passed(form, left, hidden, mixed_hidden, beyond, misfit)


def _next(block: Block, following: Block, passed: Passed, count: int) -> tuple[Tokens, float]:
    """Return (the tokens that enter the following block, relative misfit of the change of basis)."""
    mlp, norm = block.module.mlp, block.module.norm2
    scale, shift = (value.detach().double().cpu() for value in (norm.weight, norm.bias))
    normed = nn.functional.layer_norm(passed.left, scale.shape, scale, shift, norm.eps)
    active = _one(mlp.act(_one(normed) @ affine(mlp.fc1).T))  # (V, H + 1)
    known = passed.left + block.added(active)
    gradient = with_bias(block.leak, block.name + "mlp.fc2")
    inputs = rows_of(
        outside(gradient, orthonormal(passed.beyond.T)), count, block.dtype, len(passed.hidden)
    ).basis  # (k, H + 1)
    parts = torch.cat([known, passed.hidden, block.added(inputs)])
    change, misfit = changed(parts, following.tokens)
    ends = len(known), len(known) + len(passed.hidden)
    inputs = _hidden_part(change[:, : ends[1]], change[:, ends[1] :], ends[0]) @ inputs
    sums = least_squares(inputs.T, (gradient - passed.beyond.T @ active).T).T
    return Tokens(known, passed.beyond, passed.hidden + block.added(inputs), sums), misfit


def _hidden_part(lower: Tensor, rest: Tensor, shown: int) -> Tensor:
    """Return X (k, r) such that rows (lower, rest) (T, V + k + r) combined to be zero on the V visible columns and one
    on one hidden column are X on the others."""
    null = torch.linalg.svd(lower[:, :shown], full_matrices=True).U[:, shown:].T  # (T - V, T)
    return least_squares(null @ lower[:, shown:], null @ rest)


def _one(rows: Tensor) -> Tensor:
    return nn.functional.pad(rows, (0, 1), value=1.0)
