"""What the gradients of a ViT behind Masked Jigsaw Puzzle say about its patches: linear equations, no prior.

k of the N patches are hidden; U are visible. `Span` says in which small space each patch lies, `FirstBlock` where in
it the visible ones are. docs/method.md derives both.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from attacks.exactness import CERTAIN
from attacks.linear.layer_scale import check_not_lost
from attacks.threat_model.checks import check_dropout, first_block_of
from attacks.threat_model.leak import Leak, RefusalError

BLOCK = "blocks.0."
FIRST_BLOCK = tuple(BLOCK + name for name in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"))
NOISE = 1.5  # singular values up to this multiple of the largest one that can only be noise are treated as noise


def check_equations(leak: Leak, attack: str) -> None:
    """Raise UserError unless `FirstBlock` has equations for the visible patches of a masked image: of its LayerScale,
    normed queries and normed outputs of attention they need to know nothing."""
    model = leak.model
    block = first_block_of(model, attack)
    if not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity):
        raise RefusalError(
            f"attack '{attack}' needs the position embedding's gradient to be that of what enters the first block, and "
            f"this model norms its tokens in between (norm_pre)"
        )
    biased = [name for name in ("patch_embed.proj", BLOCK + "attn.qkv") if model.get_submodule(name).bias is not None]
    if len(biased) < 2 or not block.norm1.elementwise_affine or not bool(block.norm1.weight.all()):
        raise RefusalError(
            f"attack '{attack}' needs biases of the patch projection and of the first queries, keys and values, and a "
            f"first LayerNorm with a weight for every channel, none of them 0"
        )
    for name in ("unknown_pos_embed", *FIRST_BLOCK):
        leak.gradient(name, attack)
    check_not_lost(model, FIRST_BLOCK, attack)
    check_dropout(leak, attack, seed_helps=False)
    patches, dimensions = model.grid[0] * model.grid[1], len(model.patch_embed.proj.weight)
    rows = model.pos_embed.shape[1]
    if model.num_prefix_tokens != 1 or rows != patches + 1 or patches > dimensions - 5:
        raise RefusalError(
            f"attack '{attack}' needs a class token alone before the patches, with a position row of its own, and at "
            f"most D - 5 patches: this model has {model.num_prefix_tokens} tokens before {patches} patches of "
            f"{dimensions} dimensions, and {rows} rows"
        )


def most_hidden(dimensions: int, patches: int) -> int:
    """Return with how many hidden patches at most the equations of the first block determine every visible one, and
    one is left over to measure noise with: D - N - 3."""
    return dimensions - patches - 3


def centre(rows: Tensor) -> Tensor:
    """Return the rows without their mean, as a LayerNorm sees them."""
    return rows - rows.mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Span:
    """What the patch-embedding gradient says: patches are `base` (N, P), one row for each, plus a combination of the
    rows of `basis` (r, P), r < k. rows (N, D): gradients of the visible tokens, zero for hidden ones; residual: share
    of the patch-embedding gradient outside the known rows."""

    rows: Tensor
    hidden: Tensor
    base: Tensor
    basis: Tensor
    residual: float

    @classmethod
    def of(cls, leak: Leak, rows: Tensor, hidden: Tensor, unknown: Tensor) -> "Span":
        """Return rows (N, D) and unknown (1, D): gradients of the patch tokens and of the unknown row; hidden (N,)
        bool."""
        weight = leak.gradient("patch_embed.proj.weight", "mjp_aware").double().cpu().flatten(1)  # (D, P)
        known = torch.cat([rows[~hidden], unknown])
        count, dim = int(hidden.sum()), known.shape[1]
        if len(hidden) >= dim:
            size = f"{len(hidden)} patches and {dim} embedding dimensions"
            raise RefusalError(
                f"attack 'mjp_aware' needs fewer patches than embedding dimensions, this model has {size}"
            )
        if not weight.any() or not known.any():
            raise RefusalError("the gradients are zero everywhere: nothing can be reconstructed from them")
        solution = torch.linalg.lstsq(known.T, weight, driver="gelsd").solution
        left = torch.linalg.qr(known.T).Q
        rest = weight - left @ (left.T @ weight)
        _, values, directions = torch.linalg.svd(rest, full_matrices=False)
        floor = values[count - 1] if count - 1 < len(values) else 0
        rank = min(count - 1, int((values > NOISE * floor).sum()))
        base = torch.empty(len(hidden), weight.shape[1], dtype=weight.dtype)
        base[~hidden], base[hidden] = solution[:-1], solution[-1]
        return cls(rows, hidden, base, directions[:rank], float(rest.norm() / weight.norm()))


class FirstBlock:
    """Equations of the first block for the coordinates C (U, r) of the visible patches in the span.

    With q_i and t_i as in attacks/linear/mjp_aware.py, the equations of patch i are target_i + t_i (start_i + C_i
    slope) = 0 up to noise of variance noise_i: `start`, `target` (U, D) and `slope` (r, D) are the token at C = 0, q_i
    and the directions of the span, as far as dL/dW_proj does not reach. t_i is `ratio` (U,) by what no choice of C can
    change. error (U,): the error of a pixel (range 1) that the noise means; certain (U,): whether that is negligible.
    """

    def __init__(self, leak: Leak, span: Span):
        self.span, self.heads, self.eps = span, leak.model.blocks[0].attn.num_heads, leak.model.blocks[0].norm1.eps
        weights = {name: value.detach().double().cpu() for name, value in leak.model.named_parameters()}
        gradient = {name: leak.gradient(name, "mjp_aware").double().cpu() for name in (*FIRST_BLOCK, "pos_embed")}
        self.scale, self.bias = weights[BLOCK + "norm1.weight"], weights[BLOCK + "norm1.bias"]
        self.qkv, self.qkv_bias = weights[BLOCK + "attn.qkv.weight"], weights[BLOCK + "attn.qkv.bias"]
        self.proj, self.embed = weights[BLOCK + "attn.proj.weight"], weights["patch_embed.proj.weight"].flatten(1)
        self._read_tokens(weights)
        self._read_gradients(gradient)
        self._eliminate(gradient[BLOCK + "attn.proj.weight"])
        # Error of a pixel (range 1) that this noise means for each visible patch: of C itself, and of t_i, which is
        # read off what C cannot change and scales what it can: in pictures of few colours nearly the whole token.
        tiny = torch.finfo(torch.float64).tiny
        pixel = torch.tensor(leak.std, dtype=torch.float64).square().mean() / span.base.shape[1]
        spread = torch.linalg.pinv(self.metric, hermitian=True).trace()
        reached = self.target / self.ratio.where(self.ratio != 0, 1)[:, None]
        moved = torch.linalg.lstsq(self.slope.T, reached.T, driver="gelsd").solution.square().sum(0) / self.fixed
        self.error = (self.noise / self.ratio.square().clamp_min(tiny) * (spread + moved) * pixel).sqrt()
        self.certain = self.error < CERTAIN

    def _read_tokens(self, weights: dict[str, Tensor]) -> None:
        """Read the tokens (1 + U, D) at C = 0, class token first, one hidden token, and the directions all can move
        in."""
        hidden = self.span.hidden
        places = weights["pos_embed"][0, 1:].clone()
        places[hidden] = weights["unknown_pos_embed"].flatten()
        self.offset = places + weights["patch_embed.proj.bias"]
        token = centre(weights["cls_token"][0] + weights["pos_embed"][0, :1])
        tokens = centre(self.span.base @ self.embed.T + self.offset)
        self.tokens, self.hidden_token = torch.cat([token, tokens[~hidden]]), tokens[hidden][:1]
        self.directions = centre(self.span.basis @ self.embed.T)

    def _read_gradients(self, gradient: dict[str, Tensor]) -> None:
        """Read for each known token h_i over its standard deviation, `through` (1 + U, 3 D), and q_i, `known`
        (1 + U, D)."""
        # Columns: vectors that see one visible token each, no other, and nothing of the hidden ones.
        seen = torch.cat([self.tokens, self.hidden_token, self.directions])
        selectors = torch.linalg.pinv(seen)[:, : len(self.tokens)]
        qkv = gradient[BLOCK + "attn.qkv.weight"] - gradient[BLOCK + "attn.qkv.bias"][:, None] * self.bias
        self.through = ((qkv / self.scale) @ selectors).T
        rows = torch.cat([gradient["pos_embed"][0, :1], self.span.rows[~self.span.hidden]])
        self.known = rows - centre(self.through @ self.qkv * self.scale)

    def _eliminate(self, proj: Tensor) -> None:
        """Project onto what dL/dW_proj, `proj`, cannot reach, and read t_i and the noise off the equations."""
        patches = len(self.span.hidden)
        left, values, _ = torch.linalg.svd(proj)
        # Singular values beyond the number of tokens are noise alone.
        rank = min(patches + 1, int((values > NOISE * values[patches + 1]).sum()))
        ones = torch.ones(len(left), 1, dtype=left.dtype)
        reach = torch.linalg.qr(torch.cat([left[:, :rank], ones], dim=1)).Q
        tokens, known, self.slope = (
            part - (part @ reach) @ reach.T for part in (self.tokens, self.known, self.directions)
        )
        self.start, self.target = tokens[1:], known[1:]
        self.class_ratio = -(tokens[0] @ known[0]) / tokens[0].square().sum()
        # t_i and the noise from what no choice of C can change.
        fixed = torch.linalg.qr(self.slope.T).Q
        start, target = (part - (part @ fixed) @ fixed.T for part in (self.start, self.target))
        self.fixed = start.square().sum(1)
        self.ratio = -(start * target).sum(1) / self.fixed
        self.freedom = len(left) - rank - 1 - len(self.directions) - 1
        misfit = (target + self.ratio[:, None] * start).square().sum(1)
        self.noise = (misfit / max(self.freedom, 1)).clamp_min(torch.finfo(left.dtype).tiny)
        self.metric = self.slope @ self.slope.T

    @classmethod
    def of(cls, leak: Leak, span: Span) -> "FirstBlock | None":
        """Return the equations of a leak that `check_equations` accepts, or None where a mask of this size leaves fewer
        of them than unknowns."""
        if bool(span.hidden.all()) or not len(span.basis):
            return None
        equations = cls(leak, span)
        return equations if equations.freedom >= 1 else None

    @cached_property
    def solution(self) -> Tensor:
        """C (U, r) by the equations alone, one small least-squares problem per patch."""
        wanted = -(self.target / self.ratio[:, None] + self.start)
        return torch.linalg.lstsq(self.slope.T, wanted.T, driver="gelsd").solution.T

    def ratios(self, coordinates: Tensor) -> Tensor:
        """Return (U,): the best t_i for these patches."""
        tokens = self.start + coordinates @ self.slope
        return -(tokens * self.target).sum(1) / tokens.square().sum(1)

    def misfit(self, coordinates: Tensor, ratio: Tensor | None) -> Tensor:
        """Return half the squared misfit over its variance; with `ratio` None at the best t_i, else a quadratic in
        C."""
        tokens = self.start + coordinates @ self.slope
        ratio = self.ratios(coordinates) if ratio is None else ratio
        return ((self.target + ratio[:, None] * tokens).square().sum(1) / self.noise).sum() / 2
