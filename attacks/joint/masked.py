"""One image masked by MJP: the visible tokens by linear equations, then the hidden ones by the pencil of batches.

The gradients of the position rows give g of every visible token, and attacks/linear/mjp_equations.py its patch. One
layer on the same works again: g' of the visible is known, so that what attention returned to them is known up to the
span of the hidden tokens (U0 + C V); vectors that see one visible token alone select its delta, and outside the columns
of dL/dW2 the relation g'' = g' + t' u^ - C diag(gamma2) W1^T delta / sigma2 is linear in t' and t' C. With z, o, u, g'
and delta of the visible tokens known, they are taken out of every gradient from the left, by projection on what is
orthogonal to their g' or delta: a subtraction would leave its rounding. What is left is about the hidden tokens alone,
and attacks/joint/forms.py applies with D less the visible ones. Source: derived for this project; docs/method.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Block, affine
from attacks.joint.bounds import most_masked
from attacks.joint.diagonal import Tokens, tokens_of
from attacks.joint.forms import Forms
from attacks.linear.closed_form import token_gradients
from attacks.linear.mjp_equations import FirstBlock, Span, centre
from attacks.linear.row_spaces import behind_norm, least_squares, orthonormal, outside, rows_of, with_bias
from attacks.threat_model.leak import Leak, RefusalError


@dataclass(frozen=True)
class Visible:
    """The class token first, then the visible patches (V - 1 of them). entering, leaving (V, D): z^ and u^; gradient,
    behind, beyond (V, D): g, g', g''; mixed (V, D + 1): [o; 1]; hidden_mixed (k, D + 1): rows that the hidden tokens'
    [o; 1] span; selected (V, H): delta / sigma2; misfit: largest relative misfit of the relations for u^."""

    entering: Tensor
    leaving: Tensor
    gradient: Tensor
    behind: Tensor
    beyond: Tensor
    mixed: Tensor
    hidden_mixed: Tensor
    selected: Tensor
    misfit: float


def masked_equations(leak: Leak) -> FirstBlock:
    """Return the equations of the visible patches of one masked image. Raises UserError where those of the hidden ones
    are fewer than the unknowns."""
    rows, hidden = token_gradients(leak)
    if leak.attacker_knowledge in ("mask", "permutation"):
        hidden = leak.mask.flatten().cpu()
    unknown = leak.gradient("unknown_pos_embed", "joint").double().cpu().reshape(1, -1)
    span = Span.of(leak, rows, hidden, unknown)
    if not len(span.basis):
        raise RefusalError(
            "attack 'joint' tells hidden patches apart, and those of this image are all equal up to rounding: use "
            "'closed_form', which solves for one patch at all hidden places"
        )
    equations = FirstBlock.of(leak, span)
    count, most = int(hidden.sum()), most_masked(leak.model)
    if equations is None or count > most:
        raise RefusalError(
            f"attack 'joint' needs at most D - N - 4 = {most} hidden patches for {len(hidden)} patches and "
            f"{leak.model.embed_dim} embedding dimensions, and {count} are hidden"
        )
    return equations


def masked_tokens(leak: Leak) -> tuple[Tokens, Forms]:
    """Return (the tokens of one masked image, visible ones in the order of their places and then the distinct hidden
    ones; the forms of the hidden ones). Raises UserError where the equations are fewer than the unknowns."""
    equations = masked_equations(leak)
    span, hidden = equations.span, equations.span.hidden
    count, number = int(hidden.sum()), len(hidden)
    patches = span.base[~hidden] + equations.solution @ span.basis
    block = Block(leak, 0, number + 1, number + 1)
    visible = _visible(block, equations, patches, count)
    forms = _hidden_forms(leak, block, visible, patches, count)
    found = tokens_of(forms)
    pixel = 1 / torch.tensor(leak.std, dtype=torch.float64).square().mean().sqrt()
    tokens = Tokens(
        torch.cat([patches, found.patches]),
        torch.cat([visible.mixed[1:, :-1], found.mixed]),
        None,
        torch.cat([equations.error * pixel, found.error]),
    )
    return tokens, forms


def _visible(block: Block, equations: FirstBlock, patches: Tensor, count: int) -> Visible:
    """Return what the first block does to the visible tokens, given their patches (V - 1, P)."""
    shown = ~equations.span.hidden
    entering = torch.cat([equations.tokens[:1], centre(patches @ equations.embed.T + equations.offset[shown])])
    gradient = torch.cat([block.leak.gradients["pos_embed"].double().cpu()[0, :1], equations.span.rows[shown]])
    ratio = torch.cat([equations.class_ratio[None], equations.ratio])
    behind = equations.known + ratio[:, None] * entering  # (V, D): g'

    projection = with_bias(block.leak, block.name + "attn.proj")  # (D, D + 1)
    left = orthonormal(behind.T)
    hidden = rows_of(outside(projection, left), count, block.dtype).basis  # (k, D + 1)
    base = least_squares(behind.T, projection)  # (V, D + 1): [o; 1] up to the span of the hidden
    last = hidden[:, -1]
    base = base + (1 - base[:, -1:]) * (last / last.square().sum()) @ hidden
    flat = torch.linalg.svd(last[None]).Vh[1:] @ hidden  # (k - 1, D + 1): directions that leave the 1 alone
    start, directions = entering + block.returned(base), block.returned(flat)

    cleared = behind_norm(block.leak, block.name + "mlp.fc1", block.module.norm2)
    unseen = torch.cat([equations.hidden_token, equations.directions, block.returned(hidden)])
    selectors = torch.linalg.pinv(torch.cat([start, unseen]))[:, : len(start)]  # (D, V)
    selected = (cleared @ selectors).T
    known = behind - block.through_mlp(selected.T).T  # g'' - t' u^
    reach = orthonormal(block.active.reach, torch.ones(len(left), 1, dtype=left.dtype))
    target, tokens, slope = (outside(part.T, reach).T for part in (known, start, directions))
    fixed = orthonormal(slope.T)
    still, moved = (outside(part.T, fixed).T for part in (target, tokens))
    ratio = -(still * moved).sum(dim=1) / moved.square().sum(dim=1)  # t'
    change = least_squares(slope.T, -(target / ratio[:, None] + tokens).T).T  # C
    misfit = float(((still + ratio[:, None] * moved).norm(dim=1) / still.norm(dim=1)).max())
    leaving = start + change @ directions
    beyond = known + ratio[:, None] * leaving
    return Visible(entering, leaving, gradient, behind, beyond, base + change @ flat, hidden, selected, misfit)


def _hidden_forms(leak: Leak, block: Block, visible: Visible, patches: Tensor, count: int) -> Forms:
    """Return the two forms of the hidden tokens, with the visible ones taken out."""
    model = leak.model
    embedding = with_bias(leak, PATCHES)
    shown = visible.gradient[1:].T  # (D, V - 1)
    span = rows_of(outside(embedding, orthonormal(shown)), count, block.dtype)
    ones = nn.functional.pad(patches, (0, 1), value=1.0)
    gradient = least_squares(span.basis.T, (embedding - shown @ ones).T).T  # K1
    weight = affine(model.patch_embed.proj)
    weight[:, -1] += model.unknown_pos_embed.detach().double().cpu().flatten()
    entering = centre(span.basis @ weight.T)  # (r, D)
    known = len(visible.entering)
    through = block.tokens.on(torch.cat([visible.entering, entering]))[:, known:]  # K2

    left = orthonormal(visible.behind.T)
    cleared = behind_norm(leak, block.name + "mlp.fc1", block.module.norm2)
    passed = rows_of(outside(cleared, orthonormal(visible.selected.T)), count, block.dtype)
    parts = torch.cat([entering, block.returned(visible.hidden_mixed)])
    link = least_squares(parts.T, passed.basis.T).T
    misfit = float((link @ parts - passed.basis).norm() / passed.basis.norm())
    down, mixed = link[:, : len(entering)], link[:, len(entering) :] @ visible.hidden_mixed

    projection = outside(with_bias(leak, block.name + "attn.proj"), left)
    behind = least_squares(mixed.T, projection.T).T  # K3 outside the span of the visible g'
    after = least_squares(passed.basis.T, (cleared - visible.selected.T @ visible.leaving).T).T  # K4
    right = gradient - block.through_attention(through) - behind @ down
    first = -least_squares(outside(entering.T, left), outside(right, left))
    columns = rows_of(_without_visible(leak, block, visible), count, block.dtype).reach
    reach = orthonormal(columns, left, torch.ones(len(left), 1, dtype=left.dtype))
    second = -least_squares(outside(passed.basis.T, reach), outside(behind - block.through_mlp(after), reach))

    lift = (second + second.T) / 2 @ down
    matrices = torch.stack([first, down.T @ second @ down])
    link = max(misfit, visible.misfit)
    return Forms(matrices, len(entering), span.basis, None, down, lift, mixed, span, link, entering, block)


def _without_visible(leak: Leak, block: Block, visible: Visible) -> Tensor:
    """Return [dL/dW2 | dL/db2] (D, H + 1) of the hidden tokens: the MLP's inputs of the visible ones are computed."""
    mlp, norm = block.module.mlp, block.module.norm2
    scale, shift = (value.detach().double().cpu() for value in (norm.weight, norm.bias))
    normed = nn.functional.layer_norm(visible.leaving, scale.shape, scale, shift, norm.eps)
    active = mlp.act(nn.functional.pad(normed, (0, 1), value=1.0) @ affine(mlp.fc1).T)
    return with_bias(leak, block.name + "mlp.fc2") - visible.beyond.T @ nn.functional.pad(active, (0, 1), value=1.0)
