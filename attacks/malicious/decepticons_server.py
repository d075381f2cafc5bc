"""A server that turns the feed-forward layers of a text transformer into bins of tokens: parameters alone change.

    embedding    one coordinate of all tokens and positions is emptied, for a tag
    block 0      attends to all tokens alike and writes one number of the whole sentence into that coordinate
    fc1 rows     h = s (u . x - c_k), s so large that GELU is a step: bins of one random direction u of a token; what
                 they add goes along one direction, so that all rows of a block get the same gradient from behind
    later blocks pass tokens on, but for the last, which attends to all alike: the loss depends on every token

Every LayerNorm is the plain one. A token that is alone in a bin comes back as an affine function of its embedding, its
position and the tag. Source: the idea is that of Fowl et al., "Decepticons: Corrupted Transformers Breach Privacy in
Federated Learning for Language Models", ICLR 2023; thresholds, tag and read-out are this project's.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.malicious.bins import expected_share, thresholds
from attacks.malicious.server import Knowledge, Server, require
from models.text import TextTransformer
from utils.errors import UserError

SAMPLES = 20_000  # tokens by which thresholds are set where the server has no sentences


@dataclass(frozen=True)
class TokenBins:
    """The server's secrets. functional (D,): the direction u; edges (G, K): thresholds of every block of bins."""

    functional: Tensor
    edges: Tensor


@dataclass(frozen=True, kw_only=True)
class Decepticons(Server):
    power = "malicious_parameters"
    attack = "decepticons"
    steep: float = 1e5
    """Steepness s of a row: tokens within a few parts of 1 / s of a threshold are lost."""
    gain: float = 1e-3
    """Size of what the active rows together add to a token."""

    def __post_init__(self):
        require(0 < self.steep < math.inf, "steep", "above 0 and finite", self.steep)
        require(0 < self.gain < math.inf, "gain", "above 0 and finite", self.gain)

    def check(self, model: nn.Module) -> None:
        if not isinstance(model, TextTransformer) or model.pos_embed is None:
            raise UserError("server 'decepticons' needs one of our text models with positions")
        if len(model.blocks) < 2:
            raise UserError("server 'decepticons' needs two blocks: the last one passes gradients to all tokens")

    def rows(self, model: nn.Module) -> int:
        """Return how many bins the model holds."""
        return (len(model.blocks) - 1) * model.blocks[0].mlp.fc1.out_features

    @torch.no_grad()
    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        """Return the changed model. knowledge.public: token ids (M, n) of sentences of the same kind, or none."""
        self.check(model)
        model = copy.deepcopy(model)
        functional = _transparent(model, generator)
        values = _tokens(model, knowledge.public, generator) @ functional
        blocks, width = len(model.blocks) - 1, model.blocks[0].mlp.fc1.out_features
        number = blocks * width
        edges = thresholds(values, 0.0, 1.0, torch.full((number,), 1 / number, dtype=torch.float64)).reshape(blocks, -1)
        leave = torch.randn(model.embed_dim, generator=generator, dtype=torch.float64)
        leave[-1] = 0
        for block, own in zip(model.blocks[:-1], edges, strict=True):
            first, second = block.mlp.fc1, block.mlp.fc2
            first.weight.copy_(self.steep * functional.expand_as(first.weight))
            first.bias.copy_(-self.steep * own)
            size = self.gain / (self.steep * width * leave.norm())
            second.weight.copy_((size * leave)[:, None].expand_as(second.weight))
            second.bias.zero_()
        model.token_bins = TokenBins(functional, edges)
        return model

    def guarantee(self, images: int, public: int | None = None, *, rows: int | None = None) -> float | None:
        """Return the expected share of `images` tokens that are alone in one of so many rows."""
        return None if rows is None else expected_share([1 / rows] * rows, images, public)


def _transparent(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Let tokens reach the bins as they are, with a tag of their sentence; return the direction u (D,), of length 1."""
    for layer in (part for part in model.modules() if isinstance(part, nn.LayerNorm)):
        layer.weight.fill_(1)
        layer.bias.zero_()
    rows = (model.token_embed.weight, model.pos_embed, model.unknown_pos_embed, model.type_embed)
    for table in (value for value in rows if value is not None):
        table[..., -1] = 0
    dim = model.embed_dim
    read, direction = (torch.randn(dim, generator=generator, dtype=torch.float64) for _ in range(2))
    for place, block in enumerate(model.blocks):
        block.attn.qkv.weight[: 2 * dim] = 0  # no queries, no keys: every token attends to all alike
        block.attn.qkv.bias.zero_()
        block.attn.proj.bias.zero_()
        if place < len(model.blocks) - 1:
            block.attn.proj.weight.zero_()
    first = model.blocks[0].attn
    first.qkv.weight[2 * dim] = (read / read.norm()).to(first.qkv.weight)
    first.proj.weight[-1, 0] = 2 * dim**0.5  # the mean over n tokens is about n^-1/2 of a coordinate's size
    return direction / direction.norm()


def _tokens(model: nn.Module, public: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return what the first bins read of public sentences, or of random ones, (M, D)."""
    if public is None:
        number = min(model.max_length, 32)
        public = torch.randint(1, model.vocab_size, (SAMPLES // number, number), generator=generator)
    block, found = model.blocks[0], []
    device = next(model.parameters()).device
    for ids in public.split(64):
        tokens = model.embed(ids.to(device))
        found.append(block.norm1(tokens + block.attn(tokens)).flatten(0, 1)[ids.flatten().to(device) > 0])
    return torch.cat(found).double().cpu()
