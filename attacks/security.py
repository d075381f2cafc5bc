"""How much of an image its gradient's linear equations leave open, from shapes and ranks alone, without an image.

For chains of layers: the index of Chen and Campbell. Layer i of L (0 next to the image, L - 1 the classifier) misses
d_i = rank(U_i) - n_i of its n_i unknowns, and

    index = sum over i < L - 1 of d_i * (L - 1 - i) / (L - 1)  <= 0

0: recursion alone gives the image back. The more negative, the more is left to a prior; what is missing near the input
counts most. It says nothing about conditioning, noise or what a prior knows.

For ViTs: the same question to the attacks by equations, per patch, for a mask, a batch and withheld gradients.
Derived for this project; docs/method.md.
Source: Chen and Campbell, BMVC 2022, section 4 ("COPA" in their code, which rounds each term).
"""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from attacks.joint.bounds import Count
from attacks.recursive.layers import chain, predicted_rank
from attacks.threat_model.local_step import NOTHING, describe_frozen, frozen
from models.position import patch_rows
from models.vit import AprilBlock
from utils.channels import channels_of
from utils.errors import UserError

PATCHES = "patch_embed.proj.weight"
JOINT = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
FIRST_BLOCK = ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.0.attn.proj.weight")


def security(model: nn.Module, *, mask_ratio: float = 0.0, batch_size: int = 1, withhold: Sequence[str] = ()) -> dict:
    """The index of a chain, or the exposure of a ViT. Raises UserError for other models, and for a batch, a mask or
    withheld gradients with a chain, whose index is about one whole gradient."""
    withhold = [*withhold, *frozen(model)]  # a client that does not train a parameter does not share its gradient
    if len(frozen(model)) == len(list(model.parameters())):
        raise UserError(NOTHING)
    if isinstance(model, VisionTransformer):
        found = exposure(model, mask_ratio=mask_ratio, batch_size=batch_size, withhold=withhold)
        return ({"frozen": describe_frozen(model)} if frozen(model) else {}) | found
    if batch_size > 1 or mask_ratio or withhold:
        raise UserError(
            "the index of a chain of layers is about the whole gradient of one plain image: set batch_size 1 and "
            "mask_ratio 0, and withhold and freeze nothing"
        )
    side = model.arguments["image_size"]
    return index(model, (channels_of(model), side, side))


def index(model: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """Per layer: name, rank, unknowns, deficiency (d_i), weight and index; and in all: index, and index_rounded, each
    term rounded half to even as in the paper's code. Raises UserError naming a layer that has no linear system."""
    *layers, last = chain(model, image_shape, "hybrid")
    rows = []
    for place, layer in enumerate(layers):
        rank, weight = predicted_rank(layer), (len(layers) - place) / len(layers)
        missing = rank - layer.unknowns
        row = {"layer": layer.name, "rank": rank, "unknowns": layer.unknowns, "deficiency": missing}
        rows.append(row | {"weight": weight, "index": missing * weight})
    total, rounded = sum(row["index"] for row in rows), sum(round(row["index"]) for row in rows)
    return {"index": total, "index_rounded": rounded, "layers": rows}


def exposure(
    model: VisionTransformer, *, mask_ratio: float = 0.0, batch_size: int = 1, withhold: Sequence[str] = ()
) -> dict:
    """Return what each attack's equations leave open of a patch, in numbers (of P pixel values): N patches, D
    dimensions, k hidden patches, e = D - 1 independent equations (D where no LayerNorm comes first).

    closed_form: with at most one hidden patch nothing if N <= e, else P * (N - e) / N on average. With k >= 2 every
    patch is known up to the span of the k - 1 differences of hidden ones. adaptive: the first block's gradients add
    D - N - 3 equations for these coordinates of a visible patch, of which the attack keeps one to measure noise with.
    Without the gradient of a position row for every patch, and for several images, a patch is known to lie in the span
    of all, B * N of them, if these are no more than e. token_span: for one image D - N - 2 equations for the r = N - 1
    coordinates in that span (P at most), which tell apart what the position embeddings, as weights, tell apart: as many
    directions as the affine rank of what is added to the tokens. joint: nothing, for all images together, where its
    equations are enough (attacks/joint/bounds.py): larger batches do not protect below that, and largest_batch says how
    many images, of one client or of several, that is.
    """
    patches, values, width = model.grid[0] * model.grid[1], 3 * model.patch_size**2, model.embed_dim
    plain = isinstance(model.blocks[0], AprilBlock)
    equations = width if plain else width - 1

    def kept(*names: str) -> bool:
        return any(fnmatch(name, pattern) for name in names for pattern in withhold)

    own_rows = isinstance(model.pos_embed, nn.Parameter) and getattr(model, "pos_embed_rows", None) is None
    by_index = getattr(model, "index_embed", None) is not None and not kept(
        "index_embed"
    )  # it keeps the positions of hidden patches
    positions = by_index or (own_rows and not kept("pos_embed"))
    hidden = int(mask_ratio * patches) if model.hides_positions and not by_index else 0
    facts = {
        "patches": patches, "embed_dim": width, "values_per_patch": values, "hidden": hidden, "images": batch_size,
        "equations": equations, "position_gradients": "shared" if positions else "withheld" if own_rows else "none",
    }  # fmt: skip
    together = batch_size * patches
    in_span = min(together, values) if together <= equations else values
    if kept(PATCHES):
        in_span = closed = adaptive = values
    elif batch_size > 1 or not positions:
        closed = adaptive = in_span
    elif hidden < 2:
        closed = adaptive = values * max(0, patches - equations) / patches
    elif patches > equations:
        closed = adaptive = values
    else:
        closed = min(hidden - 1, values)
        adaptive = closed if kept(*FIRST_BLOCK) else max(0, closed - max(0, width - patches - 4))
    rows = [_open("closed_form", closed, closed), _open("mjp_aware", adaptive, closed)]
    if batch_size == 1 and not plain and not kept(PATCHES, "patch_embed.proj.bias", *FIRST_BLOCK[:2]) and hidden < 2:
        coordinates = min(patches - 1, values)
        told = min(coordinates, _affine_rank(model), max(0, width - patches - 2))
        rows.append(_open("token_span", coordinates - told, coordinates - told))
    if not plain and not kept(PATCHES, *(f"blocks.0.{name}.weight" for name in JOINT)):
        table = getattr(model, "pos_embed", None)
        shared = positions or (table is not None and isinstance(table, nn.Parameter) and not kept("pos_embed"))
        rank = 0 if table is None else _affine_rank(model) + 1
        prefix = model.num_prefix_tokens
        count = Count(batch_size, patches, prefix, width, values, rank + (hidden > 0), shared)
        alone = batch_size == 1 and own_rows and positions
        enough = patches < width and hidden <= max(0, width - patches - 4) if alone else not count.shortage()
        left = 0 if enough else in_span
        rows.append(_open("joint", left, left))
        alone_enough = patches < width and own_rows and positions
        fitting = [number for number in range(1, width) if not replace(count, images=number).shortage()]
        facts["largest_batch"] = max(fitting, default=int(alone_enough))
    return facts | {"attacks": rows}


def _open(attack: str, visible: float, hidden: float) -> dict:
    return {"attack": attack, "open_visible": visible, "open_hidden": hidden, "exact": visible == 0}


def _affine_rank(model: VisionTransformer) -> int:
    """Dimensions in which what is added to the patch tokens differs from patch to patch."""
    if model.pos_embed is None:
        return 0
    table = patch_rows(model).detach().double()
    return int(torch.linalg.matrix_rank(table - table.mean(dim=0), rtol=1e-6))


def security_text(found: dict) -> str:
    """The result of `security` as lines of text."""
    if "attacks" not in found:
        lines = [f"{'layer':<10}{'rank':>8}{'unknowns':>10}{'missing':>9}{'weight':>8}{'index':>10}"]
        for row in found["layers"]:
            numbers = f"{row['rank']:>8}{row['unknowns']:>10}{row['deficiency']:>9}"
            lines.append(f"{row['layer']:<10}{numbers}{row['weight']:>8.3g}{row['index']:>10.1f}")
        says = (
            "linear systems alone give the image" if found["index"] == 0 else "a prior has to fill in what is missing"
        )
        return "\n".join([*lines, f"index {found['index']:.6g} (rounded by layer {found['index_rounded']}): {says}"])
    facts = (f"{key.replace('_', ' ')} {value}" for key, value in found.items() if key not in ("attacks", "frozen"))
    lines = [*([found["frozen"]] if "frozen" in found else []), ", ".join(facts)]
    for row in found["attacks"]:
        left = f"{row['open_visible']:.4g} of {found['values_per_patch']} numbers open per visible patch"
        more = f", {row['open_hidden']:.4g} per hidden one" * bool(found["hidden"])
        lines.append(f"{row['attack']:<12} {left}{more}{': visible patches exact' * row['exact']}")
    lines.append(
        "by count, in exact arithmetic: rounding or noise in a real gradient can hide weak directions, and an attack"
    )
    lines.append("then says exact false of what it measured")
    return "\n".join(lines)
