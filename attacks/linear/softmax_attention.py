"""Attention of a ViT's block as attacks predict it: softmax over all tokens, queries and keys normed where they are."""

import copy

import torch
from torch import Tensor, nn

from attacks.threat_model.checks import SAME, evaluating
from attacks.threat_model.leak import RefusalError


def heads_of(attention: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (T, heads, D / heads) of tokens (T, D), as attention is given them, in their
    precision and on their device."""
    layer = attention.qkv
    own = {"weight": layer.weight.detach().to(tokens)}
    if layer.bias is not None:
        own["bias"] = layer.bias.detach().to(tokens)
    parts = nn.functional.linear(tokens, **own).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    queries, keys = (
        part if norm is None else copy.deepcopy(norm).to(tokens).requires_grad_(False)(part)
        for part, norm in zip(parts[:2], norms, strict=True)
    )
    return queries, keys, parts[2]


def norms_queries(attention: nn.Module) -> bool:
    """Return whether queries or keys are normed before they meet."""
    return any(not isinstance(getattr(attention, name, nn.Identity()), nn.Identity) for name in ("q_norm", "k_norm"))


def is_softmax(block: nn.Module) -> bool:
    """Return whether a block's attention is a projection of softmax(q k^T / sqrt(d)) v: tried on tokens of noise."""
    attention = block.attn
    like, own = next(block.parameters()), torch.Generator().manual_seed(0)
    tokens = torch.randn(6, block.norm1.normalized_shape[-1], generator=own).to(like)
    try:
        with torch.no_grad(), evaluating(block):
            queries, keys, values = (part.transpose(0, 1) for part in heads_of(attention, tokens))  # (h, T, d)
            weights = (queries @ keys.mT * queries.shape[2] ** -0.5).softmax(dim=2)
            expected = attention.proj((weights @ values).transpose(0, 1).flatten(1))
            found = attention(tokens[None])[0]
    except (AttributeError, RuntimeError, TypeError):  # attention of other kinds has other parts
        return False
    return bool((found - expected).abs().max() <= SAME * expected.abs().max())


def check_softmax(block: nn.Module, attack: str) -> None:
    """Raise UserError unless a block's attention is a projection of softmax(q k^T / sqrt(d)) v."""
    if not is_softmax(block):
        raise RefusalError(
            f"attack '{attack}' predicts what the first attention returns, as a projection of softmax(q k^T) v, and "
            f"this {type(block.attn).__name__} computes something else"
        )
