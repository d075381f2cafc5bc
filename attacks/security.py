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

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from attacks import ATTACKS
from attacks.joint.bounds import count_of, masked_alone, most_masked
from attacks.linear.mjp_equations import most_hidden
from attacks.linear.token_span import count_unknowns
from attacks.recursive.layers import chain, predicted_rank
from attacks.threat_model.applicable import preview_leak, reason, unmet_requirement
from attacks.threat_model.checks import PATCHES
from attacks.threat_model.leak import Leak
from attacks.threat_model.local_step import NOTHING, describe_frozen, frozen
from attacks.threat_model.uses import defaults
from models.position import RotaryAttention
from models.vit import AprilBlock
from utils.channels import channels_of
from utils.errors import UserError


def security(model: nn.Module, *, mask_ratio: float = 0.0, batch_size: int = 1, withhold: Sequence[str] = ()) -> dict:
    """Return the index of a chain, or the exposure of a ViT. Raises UserError for other models, and for a batch, a mask
    or withheld gradients with a chain, whose index is about one whole gradient."""
    if len(frozen(model)) == len(list(model.parameters())):
        raise UserError(NOTHING)
    if getattr(model, "blocks", None) is not None and PATCHES in dict(model.named_parameters()):
        found = exposure(model, mask_ratio=mask_ratio, batch_size=batch_size, withhold=withhold)
        return ({"frozen": describe_frozen(model)} if frozen(model) else {}) | found
    if batch_size > 1 or mask_ratio or withhold or frozen(model):
        raise UserError(
            "the index of a chain of layers is about the whole gradient of one plain image: set batch_size 1 and "
            "mask_ratio 0, and withhold and freeze nothing"
        )
    side = model.arguments["image_size"]
    return index(model, (channels_of(model), side, side))


def index(model: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """Return per layer: name, rank, unknowns, deficiency (d_i), weight and index; and in all: index, and index_rounded,
    each term rounded half to even as in the paper's code. Raises UserError naming a layer that has no linear system."""
    *layers, last = chain(model, image_shape, "hybrid")
    rows = []
    for place, layer in enumerate(layers):
        rank, weight = predicted_rank(layer), (len(layers) - place) / len(layers)
        missing = rank - layer.unknowns
        row = {"layer": layer.name, "rank": rank, "unknowns": layer.unknowns, "deficiency": missing}
        rows.append(row | {"weight": weight, "index": missing * weight})
    total, rounded = sum(row["index"] for row in rows), sum(round(row["index"]) for row in rows)
    return {"index": total, "index_rounded": rounded, "layers": rows}


def exposure(model: nn.Module, *, mask_ratio: float = 0.0, batch_size: int = 1, withhold: Sequence[str] = ()) -> dict:
    """Return what each attack's equations leave open of a patch, in numbers (of P pixel values): N patches, D
    dimensions, k hidden patches, e = D - 1 independent equations (D where no LayerNorm comes first).

    Whether an attack applies, and why not, is what its own check says of a leak of these shapes (`why`); exact: it
    applies, and leaves nothing open of a visible patch.

    Whatever is done with it, the patch projection's gradient says that a patch lies in the span of all, B * N of them,
    if these are no more than e. closed_form: with at most one hidden patch nothing if N <= e, else P * (N - e) / N on
    average. With k >= 2 every patch is known up to the span of the k - 1 differences of hidden ones. mjp_aware: the
    first block determines as many of these coordinates as `most_hidden` says, less one. token_span: for one image
    `count_unknowns` of the coordinates in the span; hidden patches share a row of the position table, and it tells
    apart what the rows tell apart. joint: nothing, for all images together, where its check has nothing to say, and of
    one masked image where no more than `most_masked` patches are hidden: larger batches do not protect below that, and
    largest_batch says how many images, of one client or of several, that is.
    """
    preview = preview_leak(model, batch_size, reveal_labels=True, local=None, withhold=withhold)
    patches, (width, *kernel) = model.grid[0] * model.grid[1], model.patch_embed.proj.weight.shape
    values, equations = math.prod(kernel), width - (not isinstance(model.blocks[0], AprilBlock))
    by_index = "index_embed" in preview.gradients  # it keeps the positions of hidden patches
    table = isinstance(getattr(model, "pos_embed", None), nn.Parameter)
    table = table and getattr(model, "pos_embed_rows", None) is None
    shared = by_index or (table and "pos_embed" in preview.gradients)
    hidden = int(mask_ratio * patches) if model.hides_positions and not by_index else 0
    together = batch_size * patches
    in_span = min(together, values) if together <= equations and PATCHES in preview.gradients else values
    if not shared:
        closed = in_span
    elif hidden < 2:
        closed = values * max(0, patches - equations) / patches
    else:
        closed = min(hidden - 1, values) if patches <= equations else values
    known = max(0, most_hidden(width, patches) - 1)

    def row(attack: str, count: Callable[[], float]) -> dict:
        """Return what the attack leaves open, by `count` where it can be run at all."""
        why = unmet_requirement(attack, preview, {})
        option = {"underdetermined": True} if "underdetermined" in defaults(ATTACKS[attack]) else {}
        alone = batch_size == 1 and not (why and unmet_requirement(attack, preview, option))
        left = min(count(), in_span) if alone or not why else in_span
        return {"attack": attack, "open_visible": left, "open_hidden": left, "exact": not why and left == 0} | {
            "why": reason(attack, why)
        }

    rows = [
        row("closed_form", lambda: closed),
        row("mjp_aware", lambda: closed if hidden < 2 else max(0, closed - known)),
        row("token_span", lambda: _open_to_span(model, hidden)),
        row("joint", lambda: 0 if not masked_alone(preview) or hidden < 2 or hidden <= most_masked(model) else in_span),
    ]
    rows[1]["open_hidden"] = min(closed, in_span) if rows[1]["open_visible"] < in_span else in_span
    tied = getattr(model, "pos_embed_rows", None) is not None
    position = "shared" if shared else "tied" if tied else "withheld" if table else "none"
    facts = {
        "patches": patches, "embed_dim": width, "values_per_patch": values, "hidden": hidden, "images": batch_size,
        "equations": equations, "position_gradients": position, "largest_batch": _largest_batch(preview, width),
        "places": "open" if tied or (getattr(model, "pos_embed", None) is None and not _turned(model)) else "told",
    }  # fmt: skip
    return facts | {"attacks": rows}


def _turned(model: nn.Module) -> bool:
    """Return whether the first attention turns queries and keys by place, which tells the order of patches."""
    return isinstance(model.blocks[0].attn, RotaryAttention)


def _open_to_span(model: nn.Module, hidden: int) -> int:
    """Return the coordinates of a patch that token_span's equations leave open; hidden patches share one row."""
    counts = count_unknowns(model)
    rank = model.grid[0] * model.grid[1] - hidden if hidden else counts.determined
    return counts.coordinates - min(counts.determined, rank)


def _largest_batch(preview: Leak, width: int) -> int:
    """Return the most images behind one gradient that `joint` takes, 0 where it takes none."""

    def taken(number: int) -> bool:
        return not unmet_requirement("joint", replace(preview, batch_size=number), {})

    if not taken(2):
        return int(taken(1))
    count = count_of(replace(preview, batch_size=2))
    most = max(number for number in range(2, width) if not replace(count, images=number).shortage())
    return most if taken(most) else 2


def security_text(found: dict) -> str:
    """Return the result of `security` as lines of text."""
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
        lines += [f"{'':<12} {row['why']}"] * bool(row["why"])
    lines.append(
        "by count, in exact arithmetic: rounding or noise in a real gradient can hide weak directions, and an attack"
    )
    lines.append("then says exact false of what it measured")
    return "\n".join(lines)
