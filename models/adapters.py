"""Adapters: small trainable layers, one behind every block of a frozen ViT (Houlsby et al., ICML 2019)."""

import torch
from torch import Tensor, nn

from utils.errors import UserError


class Adapter(nn.Module):
    """tokens (B, T, D) -> tokens + up(relu(down(tokens))), D -> rank -> D. It starts as the identity: up is zero."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.up(self.down(tokens).relu())


def add_adapters(model: nn.Module, rank: int, seed: int) -> nn.Module:
    """Put an adapter behind every block of a ViT, in place. Raises UserError for models without blocks of tokens."""
    blocks, width = getattr(model, "blocks", None), getattr(model, "embed_dim", None)
    if blocks is None or not len(blocks) or not isinstance(width, int):
        raise UserError(f"adapters go behind the blocks of a ViT, and this {type(model).__name__} has none")
    if not 1 <= rank <= width:
        raise UserError(f"the rank of adapters must be from 1 to the embedding dimension {width}, got {rank}")
    like = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for block in blocks:
            block.adapter = Adapter(width, rank).to(like)
            block.register_forward_hook(_behind)
    return model


def _behind(block: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    return block.adapter(output)
