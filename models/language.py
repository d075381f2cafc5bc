"""Causal language models: every token is predicted from those before it; victims of attacks on sentences.

`causal_small` has the shape of models/text.py with a causal mask and a decoder of its own over the vocabulary (in
breaching `transformer3`: a post-norm encoder, learned positions, decoder not tied to the token table). `gpt2` is GPT-2
(Radford et al., 2019): LayerNorm in front of every part, GELU by tanh, and a decoder that is the token table itself, so
the gradient of that table is a sum of two. Weights of HuggingFace's GPT2LMHeadModel fit
(models/huggingface_weights.py).
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.text import Block, TextTransformer


class LanguageModel(TextTransformer):
    """forward(inputs, mask None or (1 or B, n) bool) -> logits (B, V, n - 1): those of token t + 1 at place t, with the
    classes second, as torch has it. The last token of a sentence is a target only. Options as of TextTransformer, which
    has as many classes here as tokens; num_classes is not used."""

    causal = True
    tied = False  # the decoder's matrix is one of its own

    def __init__(self, *, vocab_size: int, num_classes: int, **options):
        super().__init__(vocab_size=vocab_size, num_classes=vocab_size, **options)

    def attends(self, inputs: Tensor) -> Tensor:
        number = inputs.shape[1]
        earlier = torch.ones(number, number, dtype=torch.bool, device=inputs.device).tril()[None, None]
        padded = super().attends(inputs)
        return earlier if padded is None else earlier & padded

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Map tokens (B, n, D) to logits (B, V, n - 1), or what the decoder reads (B, n - 1, D)."""
        tokens = tokens[:, :-1]
        return tokens if pre_logits else self.head(self.head_drop(tokens)).movedim(-1, 1)


class PreNormBlock(Block):
    """A block of GPT-2: x = x + attention(norm1(x)), x = x + mlp(norm2(x)), with GELU by tanh."""

    def __init__(self, *sizes):
        super().__init__(*sizes, act_layer=partial(nn.GELU, approximate="tanh"))

    def attention_input(self, tokens: Tensor) -> Tensor:
        return self.norm1(tokens)

    def forward(self, tokens: Tensor, attends: Tensor | None) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), attn_mask=attends))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class GPT2(LanguageModel):
    """GPT-2: no token of its is padding, so its sentences of a batch are equally long, and it hides no positions.

    tied: the decoder is the token table. Weights start as GPT-2's: N(0, 0.02^2), what is added to the tokens divided by
    the square root of how often that happens.
    """

    pad = None
    block = PreNormBlock

    def __init__(self, *, embed_dim: int, depth: int, tied: bool = True, **options):
        if options.get("unknown"):
            raise ValueError("gpt2 has no padding, which MJP passes over: leave out unknown")
        super().__init__(embed_dim=embed_dim, depth=depth, **options)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-5)
        self.head, self.tied = nn.Linear(embed_dim, self.vocab_size, bias=False), tied
        for name, value in self.named_parameters():
            if value.dim() > 1:
                added = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
                nn.init.normal_(value, std=0.02 / (2 * depth) ** 0.5 if added else 0.02)
        if tied:
            self.head.weight = self.token_embed.weight

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(self.norm(tokens), pre_logits)


SHAPES = {  # breaching's transformer3, and the smallest GPT-2
    "causal_small": {"embed_dim": 96, "depth": 3, "num_heads": 8, "mlp_ratio": 16, "dropout": 0.0},
    "gpt2": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


def build_language(name: str, *, vocab_size: int = 30522, max_length: int = 512, **options) -> LanguageModel:
    """Return a language model of a named shape, any part of which `options` may change."""
    build = GPT2 if name == "gpt2" else LanguageModel
    return build(vocab_size=vocab_size, max_length=max_length, **{**SHAPES[name], **options})
