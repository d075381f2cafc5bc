"""Symmetric matrices that the tokens of a batch make diagonal, from the gradients of a ViT's first block.

Coordinates: the centred tokens z^ that enter the block lie in the span of rows Zb, z^ = alpha Zb; [x; 1] and what is
added for the place are linear in the same alpha. Centred tokens u^ = beta Ub lie in that of Ub, and as u^ is z^ plus
what attention returned, Ub = M1 Zb + M2 (P Ob + q): alpha = beta M1, and [o; 1] = beta M2 Ob. Tokens that are equal
share alpha, so all ranks are those of distinct tokens, and are read from the gradients. With K1 = sum g^T alpha,
K2 = sum (h / sigma1)^T alpha, K3 = sum g'^T beta, K4 = sum (delta / sigma2)^T beta, the relations of joint_block say

    Zb^T S1 = -(K1 - C gamma1 Wqkv^T K2 - K3 M1),      S1 = sum_t t  alpha^T alpha
    (I - Pi) Ub^T S2 = -(I - Pi) (K3 - C gamma2 W1^T K4),   S2 = sum_t t' beta^T beta

Pi projects on the columns of dL/dW2 and the vector of ones, which hold every g''. S1 and M1^T S2 M1 are diagonal in the
same tokens. Source: derived for this project; docs/method.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.joint.block import Block, Places, affine, common_ranks, first_block, prefix_tokens
from attacks.linear.mjp_equations import centre
from attacks.linear.row_spaces import Rows, least_squares, orthonormal, outside
from attacks.threat_model.leak import Leak, RefusalError

BLOCKS = 5  # whose forms are merged: more add nothing
TRUSTED = 1e-2  # asymmetry up to which errors are small enough to be predicted
SPARE = 10  # equations left over, where the free part of a merged form is cut
FLAT = 1e-10  # singular values of a table of positions below this share of the largest are none


@dataclass(frozen=True)
class Forms:
    """What the diagonalisation is about. matrices (F, r, r): each sum_t d_t alpha_t^T alpha_t over the distinct tokens,
    symmetric up to error; tokens: how many of them are patches; patches (r, P + 1): alpha @ patches is [x; 1]; places
    (r, D): alpha @ places is what is added to it, None where nothing is; down (s, r): beta -> alpha; lift (s, r): takes
    the vector dual to a token's alpha to a multiple of its beta, None where that is not known; mixed (s, D + 1): beta
    @ mixed is [o; 1]; span: the row space of the patches; link: largest relative misfit of the two changes of basis;
    entering (r, D): alpha @ entering is the centred token z^; block: the first one; merged: whether equal patches at
    different places count as one token."""

    matrices: Tensor
    tokens: int
    patches: Tensor
    places: Tensor | None
    down: Tensor
    lift: Tensor | None
    mixed: Tensor
    span: Rows
    link: float
    entering: Tensor
    block: Block
    merged: bool = False

    @property
    def asymmetry(self) -> float:
        """Return the largest antisymmetric part of a matrix, relative: what error there is shows in it."""
        return float(self.misfits.max())

    @property
    def misfits(self) -> Tensor:
        """Return the antisymmetric part of every matrix (F,), relative."""
        return (self.matrices - self.matrices.mT).norm(dim=(1, 2)) / self.matrices.norm(dim=(1, 2))


@dataclass(frozen=True)
class Basis:
    """The span of the tokens z^ that enter. tokens (r, D): Zb; patches (r, P + 1) and places (r, D) as in Forms;
    gradient (D, r): K1; link: relative misfit of the rows of Zb as sums of patches, positions and class token."""

    tokens: Tensor
    patches: Tensor
    places: Tensor | None
    gradient: Tensor
    link: float


def merged_forms(leak: Leak, places: Places | None, span: Rows) -> Forms:
    """Return one form of each of the first blocks for a batch, where rounding drowns the gradient of the attention's
    projection: its relation and that of the MLP are added, so that g' drops out and nothing is divided by it.

    With Y the directions of P o that are seen, (I - Pi) [Zb^T, Y^T] [S; F] = -(I - Pi) (K1 - C gamma1 Wqkv^T K2 -
    C gamma2 W1^T K4 M1) for S = sum_t (t + t') alpha^T alpha and a free F; likewise one block on, where the tokens that
    enter are u^ plus what the MLP added, and K1 is sum g''^T alpha. Of several ranks that there may be, those of the
    most symmetric forms are right.
    """
    start, tried = first_block(leak), []
    for ranks in common_ranks(start, span):
        tried.append(_merged_forms(leak, places, span, start, ranks))
        if tried[-1].asymmetry < TRUSTED:
            break
    return min(tried, key=lambda forms: forms.asymmetry)


def _merged_forms(
    leak: Leak, places: Places | None, span: Rows, start: Block, ranks: tuple[int | None, int | None]
) -> Forms:
    """Return the forms for tokens of these numbers, as common_ranks has them, behind the first block `start`."""
    model = leak.model
    block = Block(leak, 0, start.entering, start.passing, ranks=ranks)
    basis = _entering(leak, block, span, places)
    entering, gradient, misfits = basis.tokens, basis.gradient, [basis.link]
    down = torch.eye(len(entering), dtype=torch.float64)  # coordinates of the tokens that enter -> alpha
    matrices, changes, leaving = [], [], basis.tokens
    for step in range(min(BLOCKS, len(model.blocks) - 1)):  # of the last, patches have no gradient
        if step:
            previous, block = block, Block(leak, step, start.passing, start.passing, ranks=(ranks[1], ranks[1]))
            added = previous.active.basis
            change, misfit = changed(torch.cat([leaving, previous.added(added)]), block.tokens)
            misfits.append(misfit)
            own, rest = change[:, : len(leaving)], change[:, len(leaving) :]
            entering, down = own @ leaving + rest @ previous.added(added), own @ down
            gradient = previous.active.on(rest @ added) @ down
        seen = block.returned(block.mixed.basis)
        change, misfit = changed(torch.cat([entering, seen]), block.passed)
        misfits.append(misfit)
        through = block.through_attention(block.tokens.on(entering) @ down)
        lower = change[:, : len(entering)] @ down
        right = gradient - through - block.through_mlp(block.passed.on(block.passed.basis) @ lower)
        room = model.embed_dim - len(block.active.basis) - 1 - len(entering)  # unknowns that F may have
        free = seen if len(seen) <= room else seen[: max(0, room - SPARE)]
        reach = orthonormal(block.active.reach, torch.ones(model.embed_dim, 1, dtype=torch.float64))
        system = outside(torch.cat([entering, free]).T, reach)
        matrices.append(down.T @ -least_squares(system, outside(right, reach))[: len(entering)])
        changes.append(change)
        leaving, down = block.passed.basis, lower
    first = changes[0]
    tokens, width = len(basis.tokens) - model.num_prefix_tokens, len(basis.tokens)
    mixed = first[:, width:] @ start.mixed.basis
    down = first[:, :width]
    matrices = torch.stack(matrices)
    merged = not span.clean and tokens == len(span.basis) < start.entering - model.num_prefix_tokens
    told = span, max(misfits), basis.tokens, start, merged
    return Forms(matrices, tokens, basis.patches, basis.places, down, None, mixed, *told)


def changed(parts: Tensor, rows: Rows) -> tuple[Tensor, float]:
    """Return (the rows' basis (s, D) as combinations (s, k) of parts (k, D), relative misfit)."""
    change = least_squares(parts.T, rows.basis.T).T
    return change, float((change @ parts - rows.basis).norm() / len(change) ** 0.5)


def batch_forms(leak: Leak, places: Places | None, span: Rows) -> Forms:
    """Return the two forms of the first block for a batch of any number of images; span: rows of the patches."""
    model = leak.model
    block = first_block(leak)
    basis = _entering(leak, block, span, places)
    passed, mixed = block.passed, block.mixed

    parts = torch.cat([basis.tokens, block.returned(mixed.basis)])
    link = least_squares(parts.T, passed.basis.T).T  # (s, r + s)
    misfit = float((link @ parts - passed.basis).norm() / passed.basis.norm())
    down, outputs = link[:, : len(basis.tokens)], link[:, len(basis.tokens) :] @ mixed.basis  # M1, M2 Ob

    behind = mixed.on(outputs)  # K3
    through = block.through_attention(block.tokens.on(basis.tokens))
    first = -least_squares(basis.tokens.T, basis.gradient - through - behind @ down)
    reach = orthonormal(block.active.reach, torch.ones(model.embed_dim, 1, dtype=torch.float64))
    right = behind - block.through_mlp(passed.on(passed.basis))
    second = -least_squares(outside(passed.basis.T, reach), outside(right, reach))

    lift = (second + second.T) / 2 @ down
    matrices = torch.stack([first, down.T @ second @ down])
    tokens = len(basis.tokens) - model.num_prefix_tokens
    told = span, max(misfit, basis.link), basis.tokens, block
    return Forms(matrices, tokens, basis.patches, basis.places, down, lift, outputs, *told)


def _entering(leak: Leak, block: Block, span: Rows, places: Places | None) -> Basis:
    """Return the span of the tokens that enter the first block, apart by patches, positions and class token."""
    if not len(block.tokens.basis) or not len(span.basis):
        raise RefusalError("attack 'joint' sees no patch above the noise of this gradient")
    prefix, prefix_gradient = prefix_tokens(leak)
    patches = span.basis @ affine(leak.model.patch_embed.proj).T  # (r, D)
    if prefix_gradient is None:
        raise RefusalError("attack 'joint' needs the gradient of 'cls_token', which this leak does not have")
    if places is None:  # the parts are the span: nothing has to be fitted
        tokens = centre(torch.cat([patches, prefix]))
        images = torch.nn.functional.pad(span.basis, (0, 0, 0, len(prefix)))
        gradient = torch.cat([span.on(span.basis), prefix_gradient.T], dim=1)
        return Basis(tokens, images, None, gradient, 0.0)
    left, values, right = torch.linalg.svd(places.rows, full_matrices=False)
    rank = int((values > FLAT * values[0]).sum())
    scale = len(places.rows) ** 0.5
    told, table = left[:, :rank] * scale, right[:rank] * values[:rank, None] / scale  # rows = told @ table
    parts = centre(torch.cat([patches, table, prefix]))
    change = least_squares(parts.T, block.tokens.basis.T).T
    tokens = change @ parts
    link = float((tokens - block.tokens.basis).norm())
    ends = len(patches), len(patches) + rank
    columns, sums = [change[:, : ends[0]]], [span.on(span.basis)]
    if places.gradient is not None:
        columns.append(change[:, ends[0] : ends[1]])
        sums.append(places.gradient.T @ told)
    columns.append(change[:, ends[1] :])
    sums.append(prefix_gradient.T)
    known = torch.cat(columns, dim=1)  # (r, .)
    missing = len(known) - int(torch.linalg.matrix_rank(known, rtol=1e-9))
    if missing:
        raise RefusalError(
            f"attack 'joint' lacks the gradients of {missing} of {len(known)} distinct tokens: patches are equal, and "
            f"the gradient of the position embedding, which tells them apart, is not shared"
        )
    gradient = least_squares(known.T, torch.cat(sums, dim=1).T).T
    scale = len(tokens) ** 0.5
    return Basis(tokens, columns[0] @ span.basis, change[:, ends[0] : ends[1]] @ table, gradient, link / scale)
