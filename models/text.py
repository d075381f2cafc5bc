"""Transformers that classify sentences, with the position embeddings of MJP.

Two shapes of one encoder (learned positions, LayerNorm behind every sum): the small classifier of the follow-up to MJP,
which reads the first token, and BERT's, with token types, a LayerNorm on the embeddings and a pooler (Devlin et al.,
2019); weights of HuggingFace's BERT fit (models/huggingface_weights.py). A batch is token ids (B, n), padded with PAD
at the end of shorter sentences; n is anything up to the number of position rows. A sentence starts and ends with a
special token ([CLS], [SEP]), which is never masked. Position rows count from 0, for [CLS]; all are places of the
puzzle.
"""

import math
from collections.abc import Callable

from timm.layers import Attention, DropPath, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.localization import Localization
from models.position import hide_positions, new_pos_embed

PAD = 0  # the id of padding, in our tokenizers and in BERT's


class Block(nn.Module):
    """A post-norm transformer block: x = norm1(x + attention(x)), x = norm2(x + mlp(x)) (Vaswani et al., 2017)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, dropout: float, drop_path: float, eps: float,
        act_layer: Callable[[], nn.Module] = nn.GELU,
    ):  # fmt: skip
        super().__init__()
        self.attn = Attention(dim, num_heads, qkv_bias=True, attn_drop=dropout, proj_drop=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def attention_input(self, tokens: Tensor) -> Tensor:
        """Return what queries, keys and values are made of, from the tokens (B, n, D) that enter the block."""
        return tokens

    def forward(self, tokens: Tensor, attends: Tensor | None) -> Tensor:
        """Return tokens (B, n, D); attends as of `TextTransformer.attends`."""
        tokens = self.norm1(tokens + self.drop_path(self.attn(tokens, attn_mask=attends)))
        return self.norm2(tokens + self.drop_path(self.mlp(tokens)))


class TextTransformer(nn.Module):
    """forward(inputs, mask None or (1 or B, n) bool) -> logits (B, classes).

    inputs: token ids (B, n) int64, or embeddings (B, n, D) in their place, which attacks optimise; those have no
    padding. mask: True = hidden, never true at special tokens and padding.
    unknown: add `unknown_pos_embed` (1, 1, D), the PE every masked token shares. localization: a kind of
    models/localization.py, over a line of places; window: within which 'relative' compares them. positions: 'learned'
    or 'none' (a bag of words). bert: BERT's shape, with weights from N(0, 0.02^2); else embeddings come from
    N(0, 2 / D) (He et al., 2015) and layers from Xavier's uniform distribution. pos_embed_std: of the position rows
    alone.
    """

    causal = False  # a place looks at all others
    pad: int | None = PAD  # the token that fills up shorter sentences; None: each is real
    block = Block
    num_prefix_tokens, patch_size = 0, 1  # [CLS] has a place of the table like any token; the puzzle moves tokens

    def __init__(
        self,
        *,
        vocab_size: int,
        max_length: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        unknown: bool = False,
        localization: str = "none",
        unit_targets: bool = False,
        window: int = 16,
        positions: str = "learned",
        pos_embed_std: float | None = None,
        bert: bool = False,
    ):
        super().__init__()
        if positions not in ("learned", "none"):
            raise ValueError(f"a text model has positions 'learned' or 'none', not '{positions}'")
        if positions == "none" and (unknown or localization != "none"):
            raise ValueError("positions 'none' have no row per token: turn off unknown, localization")
        std, eps = (0.02, 1e-12) if bert else (math.sqrt(2 / embed_dim), 1e-5)
        self.vocab_size, self.max_length, self.grid, self.embed_dim = vocab_size, max_length, (max_length,), embed_dim
        self.grad_checkpointing = False
        self.token_embed = nn.Embedding(vocab_size, embed_dim)
        self.type_embed = new_pos_embed(1, embed_dim, std) if bert else None
        self.embed_norm = nn.LayerNorm(embed_dim, eps=eps) if bert else nn.Identity()
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * place / max(1, depth - 1) for place in range(depth)]
        self.blocks = nn.ModuleList(self.block(embed_dim, num_heads, mlp_ratio, dropout, rate, eps) for rate in rates)
        self.pooler = nn.Linear(embed_dim, embed_dim) if bert else None
        self.head_drop = nn.Dropout(dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02) if bert else nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.token_embed.weight, std=std)
        # Our parameters come last, so every ablation starts from the same shared weights.
        row_std = std if pos_embed_std is None else pos_embed_std
        self.pos_embed = new_pos_embed(max_length, embed_dim, row_std) if positions == "learned" else None
        self.unknown_pos_embed = new_pos_embed(1, embed_dim, row_std) if unknown else None
        options = {"unit_targets": unit_targets, "window": window}
        kind = localization
        self.localization = Localization(kind, embed_dim, self.grid, **options) if kind != "none" else None

    @property
    def hides_positions(self) -> bool:
        """Return whether `forward` takes a mask: the model has an unknown position embedding."""
        return self.unknown_pos_embed is not None

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "unknown_pos_embed", "type_embed"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def embed(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map token ids or embeddings to tokens (B, n, D) entering the first block."""
        if mask is not None and not self.hides_positions:
            raise ValueError("this model has no unknown position embedding: build it with unknown=True or pass no mask")
        tokens = self.token_embed(inputs) if inputs.dim() == 2 else inputs
        number = tokens.shape[1]
        if number > self.max_length:
            raise ValueError(
                f"a sentence of {number} tokens is longer than the {self.max_length} position rows: cut it"
            )
        if self.pos_embed is not None:
            tokens = tokens + hide_positions(self.pos_embed[:, :number], self.unknown_pos_embed, mask, 0)
        tokens = tokens if self.type_embed is None else tokens + self.type_embed
        return self.pos_drop(self.embed_norm(tokens))

    def attends(self, inputs: Tensor) -> Tensor | None:
        """Return which places may be looked at, (B or 1, 1, 1 or n, n) bool, None for all."""
        if inputs.dim() != 2 or self.pad is None:
            return None
        return (inputs != self.pad)[:, None, None]

    def forward_features(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map inputs to tokens (B, n, D) after the last block."""
        attends = self.attends(inputs)
        tokens = self.embed(inputs, mask)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, attends, use_reentrant=False)
            else:
                tokens = block(tokens, attends)
        return tokens

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens to logits (B, classes), or what the classifier reads (B, D)."""
        first = tokens[:, 0] if self.pooler is None else self.pooler(tokens[:, 0]).tanh()
        return first if pre_logits else self.head(self.head_drop(first))

    def features(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map inputs to the vector (B, D) the classifier reads."""
        return self.forward_head(self.forward_features(inputs, mask), pre_logits=True)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(inputs, mask))

    def patch_pos_embed(self) -> Tensor:
        """Return the PE rows of all places, (N, D): no unknown row."""
        return self.pos_embed[0]

    def unseen(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Return (B, N) bool: places of the table without a visible token, because it is masked or the sentence is
        over."""
        away = mask | (inputs == PAD)
        return nn.functional.pad(away, (0, self.max_length - away.shape[1]), value=True)


SHAPES = {  # the small one as in the follow-up's attack, and BERT-base
    "text_small": {"embed_dim": 96, "depth": 2, "num_heads": 2},
    "bert": {"embed_dim": 768, "depth": 12, "num_heads": 12, "bert": True},
}


def build_text(name: str, *, vocab_size: int = 30522, max_length: int = 512, **options) -> TextTransformer:
    """Return a text model of a named shape, any part of which `options` may change."""
    return TextTransformer(vocab_size=vocab_size, max_length=max_length, **{**SHAPES[name], **options})
