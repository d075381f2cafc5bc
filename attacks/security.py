"""How much of an image its gradient's linear equations leave open, from shapes and ranks alone, without an image.

For chains of layers: the index of Chen and Campbell. Layer i of L (0 next to the image, L - 1 the classifier) misses
d_i = rank(U_i) - n_i of its n_i unknowns, and

    index = sum over i < L - 1 of d_i * (L - 1 - i) / (L - 1)  <= 0

0: recursion alone gives the image back. The more negative, the more is left to a prior; what is missing near the input
counts most. It says nothing about conditioning, noise or what a prior knows.

For ViTs: the same question to the closed-form and the adaptive attack, per patch, for a mask, a batch and withheld
position gradients. Derived for this project; docs/method.md.
Source: Chen and Campbell, BMVC 2022, section 4 ("COPA" in their code, which rounds each term).
"""

from collections.abc import Sequence
from fnmatch import fnmatch

from torch import nn

from attacks.layers import chain, predicted_rank
from models.vit import AprilBlock, VisionTransformer
from utils.errors import UserError


def security(model: nn.Module, *, mask_ratio: float = 0.0, batch_size: int = 1, withhold: Sequence[str] = ()) -> dict:
    """The index of a chain, or the exposure of a ViT. Raises UserError for other models, and for a batch, a mask or
    withheld gradients with a chain, whose index is about one whole gradient."""
    if isinstance(model, VisionTransformer):
        return exposure(model, mask_ratio=mask_ratio, batch_size=batch_size, withhold=withhold)
    if batch_size > 1 or mask_ratio or withhold:
        raise UserError(
            "the index of a chain of layers is about the whole gradient of one plain image: set batch_size 1 and "
            "mask_ratio 0, and withhold nothing"
        )
    side = model.arguments["image_size"]
    return index(model, (3, side, side))


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
    """What each attack's equations leave open of a patch, in numbers (of P pixel values): N patches, D dimensions, k
    hidden patches, e = D - 1 independent equations (D where no LayerNorm comes first).

    closed_form: with at most one hidden patch nothing if N <= e, else P * (N - e) / N on average. With k >= 2 every
    patch is known up to the span of the k - 1 differences of hidden ones. adaptive: the first block's gradients add
    D - N - 3 equations for these coordinates of a visible patch, of which the attack keeps one to measure noise with.
    Position gradients withheld, or several images: a patch is known to lie in the span of all, B * N of them, if these
    are no more than e.
    """
    patches, values = model.grid[0] * model.grid[1], 3 * model.patch_size**2
    width = model.embed_dim
    equations = width if isinstance(model.blocks[0], AprilBlock) else width - 1

    def kept(name: str) -> bool:
        return any(fnmatch(name, pattern) for pattern in withhold)

    by_index = model.index_embed is not None and not kept("index_embed")  # it keeps the positions of hidden patches
    withheld = kept("pos_embed") and not by_index
    hidden = int(mask_ratio * patches) if model.hides_positions and not by_index else 0
    facts = {
        "patches": patches, "embed_dim": width, "values_per_patch": values, "hidden": hidden, "images": batch_size,
        "equations": equations, "position_gradients": "withheld" if withheld else "shared",
    }  # fmt: skip
    if kept("patch_embed.proj.weight"):
        visible = closed = adaptive = values
    elif batch_size > 1 or withheld:
        together = batch_size * patches
        visible = closed = adaptive = min(together, values) if together <= equations else values
    elif hidden < 2:
        visible = closed = adaptive = values * max(0, patches - equations) / patches
    elif patches > equations:
        visible = closed = adaptive = values
    else:
        visible = closed = min(hidden - 1, values)
        blind = kept("blocks.0.attn.qkv.weight") or kept("blocks.0.attn.proj.weight")
        adaptive = visible if blind else max(0, visible - max(0, width - patches - 4))
    rows = [
        {"attack": "closed_form", "open_visible": closed, "open_hidden": visible, "exact": closed == 0},
        {"attack": "adaptive", "open_visible": adaptive, "open_hidden": visible, "exact": adaptive == 0},
    ]
    return facts | {"attacks": rows}


def describe(found: dict) -> str:
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
    lines = [", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items() if key != "attacks")]
    for row in found["attacks"]:
        left = f"{row['open_visible']:.4g} of {found['values_per_patch']} numbers open per visible patch"
        more = f", {row['open_hidden']:.4g} per hidden one" * bool(found["hidden"])
        lines.append(f"{row['attack']:<12} {left}{more}{': visible patches exact' * row['exact']}")
    return "\n".join(lines)
