"""A causal language model: every token is predicted from those before it, as in GPT; a victim of attacks on sentences.

The shape is that of models/text.py with a causal mask and a decoder of its own over the vocabulary (in breaching
`transformer3`: a post-norm encoder, learned positions, decoder not tied to the token table).
"""

import torch
from torch import Tensor

from models.text import TextTransformer


class LanguageModel(TextTransformer):
    """forward(inputs, mask None or (1 or B, n) bool) -> logits (B, V, n - 1): those of token t + 1 at place t, with the
    classes second, as torch has it. The last token of a sentence is a target only. Options as of TextTransformer, which
    has as many classes here as tokens; num_classes is not used."""

    causal = True

    def __init__(self, *, vocab_size: int, num_classes: int, **options):
        super().__init__(vocab_size=vocab_size, num_classes=vocab_size, **options)

    def attends(self, inputs: Tensor) -> Tensor:
        number = inputs.shape[1]
        earlier = torch.ones(number, number, dtype=torch.bool, device=inputs.device).tril()[None, None]
        padded = super().attends(inputs)
        return earlier if padded is None else earlier & padded

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, n, D) -> logits (B, V, n - 1), or what the decoder reads (B, n - 1, D)."""
        tokens = tokens[:, :-1]
        return tokens if pre_logits else self.head(self.head_drop(tokens)).movedim(-1, 1)
