"""Assemble the images of a batch from its patches: which of them share an image.

That is in what attention returned. For a token t with query q_t, over the tokens s of its image, m_s = 1 or their
number,

    sum_s m_s exp(q_t k_s / sqrt(d)) (v_s - o_t) = 0        for every head,

linear in the m_s, and every row of the table is taken by as many patches as there are places with it. A token that two
images share was returned two things at once and has no such solution; the others say which image shares it.
"""

from dataclasses import dataclass

import scipy
import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Places, affine, prefix_tokens
from attacks.joint.diagonal import Tokens
from attacks.linear.row_spaces import least_squares
from attacks.linear.softmax_attention import heads_of
from attacks.threat_model.leak import Leak

SAME = 1e-2  # relative misfit of attention below which a token's answer counts as solved
ASKED, PATIENCE = 3, 12  # tokens asked for each image, while all images are found, and at most


@dataclass(frozen=True)
class Assembly:
    """Which token stands where. chosen (B, N): the token at every place; kinds (B, N): the row of the table there;
    images: how many different ones were found; misfit: largest relative misfit of what attention returned in an image;
    solved: whether that is rounding."""

    chosen: Tensor
    kinds: Tensor
    images: int
    misfit: float

    @property
    def solved(self) -> bool:
        """Return whether attention agrees with every image."""
        return self.misfit < SAME

    @property
    def used(self) -> int:
        """Return how many different tokens stand somewhere."""
        return len(self.chosen.unique())


def assemble(leak: Leak, tokens: Tokens, rows: Tensor, places: Places | None) -> Assembly:
    """Return which token stands at which place of which image; rows (n,): that of every token."""
    number, images = leak.model.grid[0] * leak.model.grid[1], leak.batch_size
    counts = torch.tensor([number]) if places is None else places.counts
    kinds = torch.zeros(number, dtype=torch.long) if places is None else places.kinds  # None: each image its own
    attention = Attention(leak, tokens, rows, places)
    single = len(tokens.patches) == images * number  # no two tokens are equal
    answers: list[tuple[float, Tensor, Tensor]] = []
    found: list[Tensor] = []
    for asked, anchor in enumerate(_anchors(tokens, rows)):
        if asked >= (ASKED if len(found) == images else PATIENCE) * images:
            break
        shares = attention.shares(anchor, counts, kinds is None)
        taken = _taken(shares, rows, counts) if kinds is None else counts
        members = _members(shares, rows, taken, 1 if single else number, int(images == 1))
        answers.append((attention.misfit(anchor, members), members, shares))
        found = _different(answers, images)
    if single and len(found) == images:
        found = _partition(found, answers, rows, counts, kinds is None)
    alone = sum((members > 0).long() for members in found) == 1
    worst = max(attention.disagreement(members, alone) for members in found)
    each = torch.stack([_own_kinds(members, rows, number) if kinds is None else kinds for members in found])
    chosen = torch.stack([_placed(*one) for one in zip(found, [rows] * len(found), each, strict=True)])
    # Equal images are one image with a weight: the gradient does not say which of them is there twice.
    several = torch.arange(images) % len(found)
    return Assembly(chosen[several], each[several], len(found), worst)


class Attention:
    """The first attention of a batch's tokens: prefix tokens (K) first, then the distinct patches (n)."""

    def __init__(self, leak: Leak, tokens: Tokens, rows: Tensor, places: Places | None):
        block = leak.model.blocks[0]
        self.heads, self.rows, self.returned = block.attn.num_heads, rows, tokens.mixed
        embed = affine(leak.model.get_submodule(PATCHES))
        patches = nn.functional.pad(tokens.patches, (0, 1), value=1.0) @ embed.T
        if places is not None:
            patches = patches + places.rows[rows]
        prefix, _ = prefix_tokens(leak)
        self.prefix = len(prefix)
        scale, shift = (value.detach().double().cpu() for value in (block.norm1.weight, block.norm1.bias))
        normed = nn.functional.layer_norm(torch.cat([prefix, patches]), scale.shape, scale, shift, block.norm1.eps)
        queries, keys, self.values = heads_of(block.attn, normed)  # (K + n, h, d)
        self.logits = torch.einsum("thd,shd->hts", queries, keys) * queries.shape[2] ** -0.5  # (h, K + n, K + n)

    def columns(self, anchor: int) -> Tensor:
        """Return exp(q_t k_s) (v_s - o_t) of every token s as columns (D, K + n), for the anchor t."""
        logits = self.logits[:, self.prefix + anchor]  # (h, K + n)
        weights = (logits - logits.max(dim=1, keepdim=True).values).exp()
        moved = self.values - self.returned[anchor].view(1, self.heads, -1)  # (K + n, h, d)
        return (weights.T[:, :, None] * moved).flatten(1).T

    def shares(self, anchor: int, counts: Tensor, own: bool = False) -> Tensor:
        """Return m (n,) of the anchor's image, by least squares; counts (R,): patches that have each row, or with a
        mask of its own may have: then only their number in all, that of the last row, is certain."""
        columns = self.columns(anchor)
        known, system = columns[:, : self.prefix].sum(dim=1), columns[:, self.prefix :]
        weight = float(system.norm(dim=0).mean())
        rows = nn.functional.one_hot(self.rows, len(counts)).T.double() * weight  # (R, n)
        if own:
            rows, counts = rows.sum(dim=0, keepdim=True), counts[-1:]
        right = torch.cat([-known, counts * weight])[:, None]
        return least_squares(torch.cat([system, rows]), right)[:, 0]

    def misfit(self, anchor: int, members: Tensor) -> float:
        """Return how far the anchor's equations are from zero for an image of these tokens (n,), relative."""
        columns = self.columns(anchor) * nn.functional.pad(members, (self.prefix, 0), value=1)
        return float(columns.sum(dim=1).norm() / columns.norm())

    def disagreement(self, members: Tensor, alone: Tensor) -> float:
        """Return the median relative misfit of an image's tokens (n,), of those alone (n,) bool in one image."""
        own = ((members > 0) & alone).nonzero()[:, 0].tolist()
        misfits = [self.misfit(token, members) for token in own]
        return float(torch.tensor(misfits).median()) if own else torch.nan


def _anchors(tokens: Tokens, rows: Tensor) -> list[int]:
    """Return the tokens in the order in which to ask for their image: rows with the most first, the surest first."""
    sizes = torch.bincount(rows)
    if len(sizes) == 1:
        return tokens.error.argsort().tolist()
    worst = torch.zeros(len(sizes), dtype=tokens.error.dtype).scatter_reduce(0, rows, tokens.error, "amax")
    order = sorted(range(len(sizes)), key=lambda row: (-int(sizes[row]), float(worst[row])))
    return [token for row in order for token in (rows == row).nonzero()[:, 0].tolist()]


def _different(answers: list[tuple[float, Tensor, Tensor]], images: int) -> list[Tensor]:
    """Return the images (n,) among the answers, at most so many, the surest first; one that mixes others is none."""
    found: list[Tensor] = []
    for misfit, members, _ in sorted(answers, key=lambda answer: answer[0]):
        common = [int(torch.minimum(members, one).sum()) for one in found]
        most = int(members.sum()) / 2 if misfit >= SAME else int(members.sum())
        if len(found) < images and max(common, default=0) < most:
            found.append(members)
    return found


def _taken(shares: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Return how many patches (R,) of an image with a mask of its own have each row, by shares (n,): at most one each
    of its place's, and the unknown one at the end all others."""
    taken = torch.tensor([int((shares[rows == row] > 0.5).any()) for row in range(len(counts))])
    taken[-1] = counts[-1] - taken[:-1].sum()
    return taken


def _own_kinds(members: Tensor, rows: Tensor, number: int) -> Tensor:
    """Return the row (N,) at every place of an image with a mask of its own: the unknown one where no token stands."""
    kinds = torch.full((number,), number)
    visible = rows[members > 0]
    visible = visible[visible < number]
    return kinds.index_put((visible,), visible)


def _members(shares: Tensor, rows: Tensor, counts: Tensor, most: int, least: int = 0) -> Tensor:
    """Return how often (n,) each token is in an image: whole numbers up to `most`, counts (R,) for the tokens of a row,
    nearest to shares (n,); least: how often each is for certain, as in the only image there is."""
    members = torch.zeros(len(shares), dtype=torch.long)
    for row, count in enumerate(counts.tolist()):
        own = (rows == row).nonzero()[:, 0]
        if len(own) * least <= count:
            members[own] = least
        for _ in range(count - int(members[own].sum()) if len(own) else 0):
            left = (shares[own] - members[own]).masked_fill(members[own] >= most, -torch.inf)
            members[own[left.argmax()]] += 1
    return members


def _partition(found: list[Tensor], answers: list, rows: Tensor, counts: Tensor, own: bool = False) -> list[Tensor]:
    """Return the images (n,) such that each token is in one: linear assignment, row by row, to those found first, by
    the shares of all answers that agree with one of them by more than half. own: each has a mask of its own, so that
    not all have a token of every row, and the unknown one at the end has the others."""
    votes = torch.zeros(len(found), len(rows), dtype=torch.float64)
    for _, members, shares in answers:
        common = torch.stack([torch.minimum(members, one).sum() for one in found])
        if 2 * int(common.max()) > int(members.sum()):
            votes[common.argmax()] += shares.clamp(-1, 2)
    whole = torch.zeros_like(votes, dtype=torch.long)
    for row, count in enumerate(counts.tolist()):
        mine = (rows == row).nonzero()[:, 0]
        left = own and row == len(counts) - 1
        seats = torch.arange(len(found)).repeat_interleave(count - whole.sum(dim=1) if left else count)
        if len(mine) > len(seats) if own and not left else len(mine) != len(seats):
            return found  # places are wrong: nothing to share out
        seat, token = scipy.optimize.linear_sum_assignment(-votes[seats][:, mine].numpy())
        whole[seats[torch.from_numpy(seat)], mine[torch.from_numpy(token)]] = 1
    return list(whole)


def _placed(members: Tensor, rows: Tensor, kinds: Tensor) -> Tensor:
    """Return the token (N,) at every place of an image; kinds (N,): the row of every place."""
    chosen = torch.zeros(len(kinds), dtype=torch.long)
    for row in kinds.unique().tolist():
        own = (rows == row).nonzero()[:, 0]
        places = (kinds == row).nonzero()[:, 0]
        there = own.repeat_interleave(members[own])[: len(places)]
        chosen[places[: len(there)]] = there
    return chosen
