"""A pre-norm block of a ViT as linear relations between what its layers were given and what came back.

For one token: z enters the block, o is what attention returns before its projection (P, q), u = z + P o + q, and
a = act(W1 LN2(u) + b1), out = u + W2 a + b2. With g, g', g'' the gradients of the loss by z, u and out, h the one by
the output of query, key and value (Wqkv), delta the one by that of W1, sigma the deviations in the two LayerNorms (LN1,
LN2), C the removal of the mean over channels, and hats for centred tokens, LayerNorm's backward pass says

    g  = g'  - t  z^ + C diag(gamma1) Wqkv^T h / sigma1          t  a number for each token
    g' = g'' - t' u^ + C diag(gamma2) W1^T delta / sigma2        t' another
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attacks.linear.mjp_equations import centre
from attacks.linear.row_spaces import FAINT, Rows, behind_norm, rows_of, with_bias
from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.leak import Leak

PATCHES = "patch_embed.proj"


class Block:
    """Weights of block `number` in float64 and the row spaces of its layers' gradients. entering, passing: the largest
    possible numbers of distinct tokens that enter it and that leave its attention; certain: how many there are at
    least; ranks: how many enter and leave, where it is not to be read from each gradient; faint: whether all directions
    above noise count, those of tokens that are nearly equal too."""

    def __init__(
        self,
        leak: Leak,
        number: int,
        entering: int,
        passing: int,
        certain: int = 0,
        ranks: tuple[int | None, int | None] = (None, None),
        faint: bool = False,
    ):
        self.leak, self.name, self.module = leak, f"blocks.{number}.", leak.model.blocks[number]
        self.entering, self.passing, self.certain = entering, passing, certain
        self.ranks, self.faint = ranks, faint
        self.dtype = leak.gradients[f"{PATCHES}.weight"].dtype

    @cached_property
    def tokens(self) -> Rows:
        """Rows (3 D, D) of query, key and value: the centred tokens z^ that enter."""
        return self._behind("attn.qkv", self.module.norm1, self.entering, self.ranks[0])

    @cached_property
    def mixed(self) -> Rows:
        """Rows (D, D + 1) of the attention's projection: [o; 1]."""
        return rows_of(with_bias(self.leak, self.name + "attn.proj"), self.passing, self.dtype, faint=self.faint)

    @cached_property
    def passed(self) -> Rows:
        """Rows (H, D) of the MLP's first layer: the centred tokens u^ that leave attention."""
        return self._behind("mlp.fc1", self.module.norm2, self.passing, self.ranks[1])

    @cached_property
    def active(self) -> Rows:
        """Rows (D, H + 1) of the MLP's second layer: [a; 1]; its columns hold every g''."""
        gradient = with_bias(self.leak, self.name + "mlp.fc2")
        return rows_of(gradient, self.passing, self.dtype, self.certain, self.ranks[1], self.faint)

    def augmented(self, layer: str, rank: int, least: int = 0) -> Rows:
        """Return the rows (m, n + 1) of any of its layers with their bias column, at most `rank` of them, and at least
        so many, those that noise drowns among them."""
        gradient, least = with_bias(self.leak, self.name + layer), min(rank, max(least, self.certain))
        return rows_of(gradient, rank, self.dtype, least, faint=self.faint)

    def _behind(self, layer: str, norm: nn.LayerNorm, limit: int, rank: int | None) -> Rows:
        gradient = behind_norm(self.leak, self.name + layer, norm)
        return rows_of(gradient, limit, self.dtype, self.certain, rank, self.faint)

    def returned(self, mixed: Tensor) -> Tensor:
        """Return centred (P o + q) (V, D) for rows [o; 1] (V, D + 1), scaled as they are."""
        return centre(mixed @ affine(self.module.attn.proj).T)

    def added(self, active: Tensor) -> Tensor:
        """Return centred (W2 a + b2) (V, D) for rows [a; 1] (V, H + 1), scaled as they are."""
        return centre(active @ affine(self.module.mlp.fc2).T)

    def through_attention(self, gradient: Tensor) -> Tensor:
        """Return C diag(gamma1) Wqkv^T h (D, k) for columns h (3 D, k)."""
        return _through(self.module.attn.qkv, self.module.norm1, gradient)

    def through_mlp(self, gradient: Tensor) -> Tensor:
        """Return C diag(gamma2) W1^T delta (D, k) for columns delta (H, k)."""
        return _through(self.module.mlp.fc1, self.module.norm2, gradient)


def first_block(leak: Leak, faint: bool = False) -> Block:
    """Return the first block behind a batch, with ranks as they are read; faint: as Block has it."""
    images, prefix = leak.batch_size, leak.model.num_prefix_tokens
    number = images * leak.model.grid[0] * leak.model.grid[1]
    return Block(leak, 0, number + prefix, number + images * prefix, faint=faint)


def common_ranks(block: Block, span: Rows) -> list[tuple[int | None, int | None]]:
    """Return how many tokens (enter the first block of a batch, leave its attention) in all layers' gradients alike,
    None where each is to be read, the likeliest first; span: the row space of the patches.

    In single precision equal patches at different places are tokens that differ by less than noise in most gradients,
    and show in some layers more than in others: ranks read from each leave no relation between them. Where the first of
    them is faint they are taken for one token everywhere: as many tokens enter as there are patches of different
    content, and leave as stand out of the noise, the prefix tokens of all images among them, which may be faint too.
    """
    images, prefix = block.leak.batch_size, block.leak.model.num_prefix_tokens
    if span.clean:
        return [(None, None)]
    entering, passed = len(span.basis) + prefix, block.passed
    if entering == block.entering:  # all are different
        return [(block.entering, block.passing)]
    strong = int((passed.values >= FAINT * passed.noise).sum())
    leaving = (max(strong, min(entering + more, len(passed.values))) for more in ((images - 1) * prefix, 0))
    cuts = [(entering, number) for number in dict.fromkeys(leaving)]
    seen = len(block.tokens.values) > entering and block.tokens.values[entering] >= FAINT * block.tokens.noise
    return [(None, None), *cuts] if seen else [*cuts, (None, None)]


def _through(layer: nn.Linear, norm: nn.LayerNorm, gradient: Tensor) -> Tensor:
    weight, scale = (value.detach().double().cpu() for value in (layer.weight, norm.weight))
    return centre((gradient.T @ weight) * scale).T


def affine(layer: nn.Module) -> Tensor:
    """Return [W | b] (m, n + 1) of a layer, in float64 on the CPU."""
    weight, bias = (value.detach().double().cpu() for value in (layer.weight, layer.bias))
    return torch.cat([weight.flatten(1), bias[:, None]], dim=1)


@dataclass(frozen=True)
class Places:
    """What can be added to a patch token. rows (R, D): the distinct rows, with MJP's unknown one if there is one;
    counts (R,): how many patches of an image have each, or may have at most where each image has a mask of its own;
    kinds (N,): the row of every place, None there. Both are None where the leak does not show which places were masked.
    gradient (R, D): of the rows, summed over images; None where it is not shared."""

    rows: Tensor
    counts: Tensor | None
    kinds: Tensor | None
    gradient: Tensor | None

    @classmethod
    def of(cls, leak: Leak, read: bool = True) -> "Places | None":
        """Return the places of a leak's model, None where nothing is added to the tokens. read: the mask, which takes
        gradients; without it all rows are there."""
        model = leak.model
        if getattr(model, "pos_embed", None) is None:
            return None
        number, prefix = model.grid[0] * model.grid[1], model.num_prefix_tokens
        table = model.pos_embed.detach().double().cpu()[0]
        tied = getattr(model, "pos_embed_rows", None)
        skipped = prefix if tied is not None else len(table) - number  # rows of prefix tokens
        rows = table[skipped:]
        kinds = torch.arange(number) if tied is None else tied[prefix:].cpu() - prefix
        gradient = leak.gradients.get("pos_embed")
        gradient = None if gradient is None else gradient.double().cpu()[0, skipped:]
        if getattr(model, "hides_positions", False):
            rows = torch.cat([rows, model.unknown_pos_embed.detach().double().cpu()[0]])
            unknown = leak.gradients.get("unknown_pos_embed")
            shared = gradient is not None and unknown is not None
            gradient = torch.cat([gradient, unknown.double().cpu()[0]]) if shared else None
            if leak.aggregate is not None:  # of clients with a mask each: which, the tokens say
                return cls(rows, torch.tensor([1] * number + [number]), None, gradient)
            told = leak.attacker_knowledge in ("mask", "permutation")
            mask = (leak.mask if told else hidden_rows(leak)) if read else None
            kinds = None if mask is None else torch.where(mask.flatten().cpu(), number, kinds)
        counts = None if kinds is None else torch.bincount(kinds, minlength=len(rows))
        if counts is not None:  # rows that no patch has: those of masked places
            used = counts > 0
            rows, gradient = rows[used], None if gradient is None else gradient[used]
            kinds, counts = (used.cumsum(0) - 1)[kinds], counts[used]
        return cls(rows, counts, kinds, gradient)


def prefix_tokens(leak: Leak) -> tuple[Tensor, Tensor | None]:
    """Return (tokens (K, D) in front of the patches, their gradient summed over images or None); K is 0 or 1."""
    model = leak.model
    if not model.num_prefix_tokens:
        empty = torch.zeros(0, model.embed_dim, dtype=torch.float64)
        return empty, empty
    token = model.cls_token.detach().double().cpu()[0]  # (1, D)
    if getattr(model, "pos_embed", None) is not None:
        number = model.grid[0] * model.grid[1]
        table = model.pos_embed.detach().double().cpu()[0]
        if getattr(model, "pos_embed_rows", None) is not None or len(table) > number:
            token = token + table[:1]
    gradient = leak.gradients.get("cls_token")
    return token, None if gradient is None else gradient.double().cpu()[0]


def entering(leak: Leak, patches: Tensor, added: Tensor) -> Tensor:
    """Return the centred tokens z^ (K + n, D) that enter the first block: prefix tokens first, then patches (n, P) with
    what is added to each (n, D)."""
    prefix, _ = prefix_tokens(leak)
    embedded = nn.functional.pad(patches, (0, 1), value=1.0) @ affine(leak.model.get_submodule(PATCHES)).T
    return centre(torch.cat([prefix, embedded + added]))
