"""A server that turns the adapters of a frozen ViT into bins: nothing but their gradient is shared.

It sends the agreed architecture with weights of its own. With an orthonormal basis of the embedding space cut into
pixels, places, a tag and an exit direction v:

    tokens        z = Q x + place code + tag; the patch projection keeps all pixels where D >= P + codes + 2, else the
                  lowest cosines of a patch
    first block   attends to all tokens alike and writes one number of the whole picture along the tag: patches of one
                  picture can be told to be so
    blocks        pass tokens on unchanged, but for the last, which attends as before: the class token, and through it
                  the loss, depends on every patch
    adapter rows  h = w . x + M (code_i . z - 1) - c_k: a bin of brightness that only tokens with the code of place i
                  reach; what they add goes along v, which no row reads, so all rows get the same gradient from behind

MJP gives every hidden token the unknown row for its place. The server chooses that row too: hidden patches of all
pictures share one group of bins, larger by the option `unknown`.

Source: the idea of reading patches from adapters, and positions from the position embedding, is PEFTLeak's (Sami et
al., CVPR 2025); the tag, the codes and the group of hidden patches are this project's.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.malicious.bins import expected_share, thresholds
from attacks.malicious.imprint_server import SPREAD
from attacks.malicious.server import Knowledge, Server, require
from models.jigsaw import patchify
from models.vit import VisionTransformer
from utils.errors import UserError

CODE = 4.0  # length of a place code
BEYOND = 4.0  # times the range of thresholds by which a token of another place stays below all of them


@dataclass(frozen=True)
class Plan:
    """The server's secrets. decode (P, D): from tokens to pixels; functional (D,): of a token; tag (D,); edges: of the
    places (N, K) and of the unknown row (K',), empty where there is none; exit (D,): the direction v."""

    decode: Tensor
    functional: Tensor
    tag: Tensor
    edges: Tensor
    unknown_edges: Tensor
    exit: Tensor


@dataclass(frozen=True, kw_only=True)
class AdapterImprint(Server):
    power = "malicious_parameters"
    attack = "adapter_imprint"
    unknown: float = 0.5
    """Share of the rows for hidden patches, where the model hides positions (MJP)."""
    gain: float = 1e-3
    """Size of what an active row adds to a token."""

    def __post_init__(self):
        require(0 < self.unknown < 1, "unknown", "between 0 and 1", self.unknown)
        require(0 < self.gain < math.inf, "gain", "above 0 and finite", self.gain)

    def check(self, model: nn.Module) -> None:
        if not isinstance(model, VisionTransformer) or not isinstance(model.pos_embed, nn.Parameter):
            raise UserError("server 'adapter_imprint' needs one of our ViTs with learned position embeddings")
        if any(not hasattr(block, "adapter") for block in model.blocks):
            raise UserError("server 'adapter_imprint' needs a model with adapters: use --share adapters")
        if model.index_embed is not None or model.pos_embed_rows is not None or len(model.blocks) < 2:
            raise UserError("server 'adapter_imprint' needs two blocks or more, no index embedding and no tied rows")
        places, rows = self.rows(model)
        if places < 2 or (model.hides_positions and rows < 2):
            number, ready = model.grid[0] * model.grid[1], _rank(model) * (len(model.blocks) - 1)
            raise UserError(
                f"server 'adapter_imprint' needs two rows or more for each of {number} places, and the adapters have "
                f"{ready} in all: use a higher --share_options.rank"
            )
        free = model.embed_dim - 2 - _code_size(model)[0]
        if free < 3:
            raise UserError(f"server 'adapter_imprint' needs more embedding dimensions than {model.embed_dim}")

    def rows(self, model: nn.Module) -> tuple[int, int]:
        """Return how many rows each place gets, and the unknown row."""
        total, number = _rank(model) * (len(model.blocks) - 1), model.grid[0] * model.grid[1]
        unknown = int(self.unknown * total) if model.hides_positions else 0
        return (total - unknown) // number, unknown

    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        self.check(model)
        model = copy.deepcopy(model)
        size, kept_codes = math.prod(knowledge.image_shape[:1]) * model.patch_size**2, _code_size(model)
        kept = min(size, model.embed_dim - 2 - kept_codes[0])
        basis = torch.linalg.qr(torch.randn(model.embed_dim, model.embed_dim, generator=generator).double()).Q
        pixels, codes, tag, leave = basis.split([kept, kept_codes[0], 1, model.embed_dim - kept - kept_codes[0] - 1], 1)
        low = _cosines(knowledge.image_shape[0], model.patch_size)[:kept]  # (kept, P)
        table, closest = kept_codes[1] @ codes.T, kept_codes[2]  # (N + 1, D): the last is the unknown row's
        direction = low.sum(dim=1)  # brightness of what is kept
        direction = direction / direction.norm()
        functional = pixels @ direction
        places, unknown = self.rows(model)
        patches = None
        if knowledge.public is not None:
            patches = patchify(knowledge.public, model.patch_size).double().cpu() @ low.T @ direction  # (M, N)
        spread = 1.5 * SPREAD["brightness"] * size**0.5
        even = [torch.full((count,), 1 / max(count, 1), dtype=torch.float64) for count in (places, unknown)]
        number = len(table) - 1
        edges = [thresholds(None if patches is None else patches[:, i], 0.0, spread, even[0]) for i in range(number)]
        loose = None if patches is None else patches.flatten()
        hidden = thresholds(loose, 0.0, spread, even[1]) if unknown else torch.zeros(0, dtype=torch.float64)
        plan = Plan(low.T @ pixels.T, functional, tag[:, 0], torch.stack(edges), hidden, leave[:, 0])
        _transparent(model, plan, pixels @ low, CODE * table, generator)
        steep = BEYOND * float(max(plan.edges.abs().max(), hidden.abs().max() if unknown else 0)) / (1 - closest)
        _rows(model, plan, table, steep, self.gain)
        model.adapter_plan = plan
        return model

    def guarantee(self, images: int, public: int | None = None, *, rows: int | None = None) -> float | None:
        """Return the expected share of the patches of one place; rows: of this place."""
        return None if rows is None else expected_share([1 / rows] * rows, images, public)


def _rank(model: nn.Module) -> int:
    return model.blocks[0].adapter.down.out_features


def _code_size(model: nn.Module) -> tuple[int, Tensor, float]:
    """Return (dimensions, codes (N + 1, dimensions) of length 1, largest inner product of two of them): one axis each
    where the dimensions suffice, else two circles for row and column; the last code, of the unknown row, is an axis."""
    number = model.grid[0] * model.grid[1]
    size = model.patch_embed.proj.weight[0].numel()
    if size + number + 3 <= model.embed_dim:
        return number + 1, torch.eye(number + 1, dtype=torch.float64), 0.0
    rows, columns = model.grid
    angles = [2 * math.pi * torch.arange(count, dtype=torch.float64) / count for count in (rows, columns)]
    circles = [torch.stack([angle.cos(), angle.sin()], dim=1) / 2**0.5 for angle in angles]
    first = circles[0][:, None].expand(rows, columns, 2)
    second = circles[1][None].expand(rows, columns, 2)
    codes = nn.functional.pad(torch.cat([first, second], dim=2).reshape(number, 4), (0, 1))
    codes = torch.cat([codes, torch.eye(5, dtype=torch.float64)[4:]])
    products = codes @ codes.T - 2 * torch.eye(number + 1, dtype=torch.float64)
    return 5, codes, float(products.max().clamp_min(0))


def _cosines(channels: int, side: int) -> Tensor:
    """Return the orthonormal cosines of a patch (P, P), one a row, the lowest frequencies first."""
    steps = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi * steps[:, None] * (steps + 0.5) / side) * (2 / side) ** 0.5  # (frequency, pixel)
    waves[0] /= 2**0.5
    planes = torch.einsum("ux,vy->uvxy", waves, waves).reshape(side**2, side, side)
    order = (steps[:, None].square() + steps.square()).flatten().argsort(stable=True)
    both = torch.einsum("fxy,cd->fcdxy", planes[order], torch.eye(channels, dtype=torch.float64))
    return both.reshape(side**2 * channels, channels * side**2)


@torch.no_grad()
def _transparent(model: nn.Module, plan: Plan, encode: Tensor, table: Tensor, generator: torch.Generator) -> None:
    """Let tokens Q x + code reach the adapters unchanged, and let the first block write the tag. encode (D, P)."""
    projection = model.patch_embed.proj
    projection.weight.copy_(encode.reshape(projection.weight.shape))
    if projection.bias is not None:
        projection.bias.zero_()
    prefix = model.num_prefix_tokens
    model.pos_embed[0, prefix:] = table[:-1].to(model.pos_embed)
    model.pos_embed[0, :prefix] = 0
    if model.unknown_pos_embed is not None:
        model.unknown_pos_embed[0, 0] = table[-1].to(model.pos_embed)
    model.cls_token[0, 0] = plan.functional.to(model.cls_token)  # no code: it reaches no row
    for block in model.blocks[:-1]:
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    first = model.blocks[0].attn
    first.qkv.weight.zero_()  # no queries, no keys: every token attends to all alike
    if first.qkv.bias is not None:
        first.qkv.bias.zero_()
    pixels = torch.randn(encode.shape[1], generator=generator).double()
    reading = encode @ pixels
    first.qkv.weight[2 * model.embed_dim] = (reading / reading.norm()).to(first.qkv.weight)
    first.proj.weight[:, 0] = plan.tag.to(first.proj.weight)


@torch.no_grad()
def _rows(model: nn.Module, plan: Plan, table: Tensor, steep: float, gain: float) -> None:
    """Set the adapters' rows: those of the places one after the other, then those of the unknown row, over layers."""
    groups = [(code, edges) for code, edges in zip(table[:-1], plan.edges, strict=True)]
    if len(plan.unknown_edges):
        groups.append((table[-1], plan.unknown_edges))
    weight = torch.cat([(plan.functional + steep / CODE * code).expand(len(edges), -1) for code, edges in groups])
    bias = torch.cat([-steep - edges for _, edges in groups])
    rank, at = _rank(model), 0
    for block in model.blocks:
        down, up = block.adapter.down, block.adapter.up
        number = min(rank, len(weight) - at)
        down.weight.zero_()
        down.bias.fill_(-1.0)
        down.weight[:number] = weight[at : at + number].to(down.weight)
        down.bias[:number] = bias[at : at + number].to(down.bias)
        up.weight.copy_((gain * plan.exit)[:, None].expand_as(up.weight))
        up.bias.zero_()
        at += number
