"""Say before any work whether the equations of `joint` are enough, from names, shapes and modules alone."""

from dataclasses import dataclass

import torch
from torch import nn

from attacks.joint_block import PATCHES, Places
from attacks.leak import Leak
from attacks.victim import active_dropout
from utils.errors import UserError

LAYERS = (PATCHES, *("blocks.0." + name for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")))
PLAIN = ("ls1", "ls2", "drop_path1", "drop_path2")  # of a block: must do nothing


@dataclass(frozen=True)
class Count:
    """What is known of a leak's size. images, patches (of an image), prefix (tokens in front of them), width (D),
    values (of a patch), rows (rank of the table of positions, 0 without one), shared: whether its gradient is."""

    images: int
    patches: int
    prefix: int
    width: int
    values: int
    rows: int
    shared: bool

    @property
    def span(self) -> int:
        """Return the largest rank of the gradient of the patch projection."""
        return min(self.images * self.patches, self.values + 1)

    def shortage(self) -> str:
        """Return which equations are fewer than their unknowns, with numbers, or nothing."""
        together, limit = self.images * (self.patches + self.prefix), self.width - 1
        batch = f"{self.images} images of {self.patches} patches behind {self.width} embedding dimensions"
        if 2 * together > limit:
            return f"needs 2 B (N + {self.prefix}) <= D - 1: {2 * together} is more than {limit} for {batch}"
        if self.rows and self.span + self.rows + self.prefix > limit:
            found = self.span + self.rows + self.prefix
            return f"has to tell patches from {self.rows} positions, {found} directions of {limit}, for {batch}"
        known = self.span + self.rows * self.shared + self.prefix
        if self.images * self.patches + self.prefix > known:
            return f"knows {known} sums over {self.images * self.patches + self.prefix} tokens, for {batch}"
        return ""


def masked_alone(leak: Leak) -> bool:
    """Return whether this is one image whose position rows have gradients of their own: no pencil for its visible
    patches is needed then."""
    learned = "pos_embed" in leak.gradients and getattr(leak.model, "pos_embed_rows", None) is None
    unknown = not getattr(leak.model, "hides_positions", False) or "unknown_pos_embed" in leak.gradients
    return leak.batch_size == 1 and learned and unknown


def count_of(leak: Leak) -> Count:
    """Return the sizes that the bounds are about."""
    model, places = leak.model, Places.of(leak, read=False)
    rows = 0 if places is None else int(torch.linalg.matrix_rank(places.rows, rtol=1e-10))
    return Count(
        images=leak.batch_size,
        patches=model.grid[0] * model.grid[1],
        prefix=model.num_prefix_tokens,
        width=model.embed_dim,
        values=leak.gradient(f"{PATCHES}.weight", "joint")[0].numel(),
        rows=rows,
        shared=places is not None and places.gradient is not None,
    )


def check_joint(leak: Leak) -> None:
    """Raise UserError where `joint` cannot work: another kind of model, gradients that are missing, too many tokens."""
    _check_model(leak.model)
    for layer in LAYERS:
        for part in ("weight", "bias"):
            leak.gradient(f"{layer}.{part}", "joint")
    if leak.model.num_prefix_tokens:
        leak.gradient("cls_token", "joint")
    if leak.training and leak.dropout_seed is None and (layer := active_dropout(leak.model)):
        raise UserError(f"attack 'joint' would have to know what the client's dropout in '{layer}' drew")
    if getattr(leak.model, "hides_positions", False) and leak.tier == "T0":
        raise UserError("attack 'joint' knows of MJP: give it tier T1 to T3, or use 'closed_form' for tier T0")
    count = count_of(leak)
    if masked_alone(leak):
        if count.patches >= count.width:
            raise UserError(
                f"attack 'joint' needs fewer patches than embedding dimensions, this model has {count.patches} patches "
                f"and {count.width} dimensions"
            )
    elif shortage := count.shortage():
        raise UserError(f"attack 'joint' {shortage}")


def _check_model(model: nn.Module) -> None:
    block = model.blocks[0] if hasattr(model, "blocks") and len(model.blocks) else None
    identities = [getattr(block, name, None) for name in PLAIN if "drop" not in name] + [
        getattr(model, "norm_pre", None)
    ]
    plain = all(isinstance(getattr(block, name, None), nn.LayerNorm) for name in ("norm1", "norm2"))
    plain = plain and all(module is None or isinstance(module, nn.Identity) for module in identities)
    layers = [getattr(getattr(block, part, None), name, None) for part, name in
              (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))]  # fmt: skip
    plain = plain and all(isinstance(layer, nn.Linear) and layer.bias is not None for layer in layers)
    plain = plain and isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity)
    plain = plain and layers[2].out_features == layers[3].in_features  # no gate between the two
    if not plain or not bool(block.norm1.weight.all() and block.norm2.weight.all()):
        raise UserError("attack 'joint' needs a ViT whose first block is LayerNorm, attention, LayerNorm, MLP")
    embed, side = model.patch_embed, model.patch_size
    cut = tuple(embed.proj.weight.shape[1:]) == (3, side, side) and tuple(embed.proj.stride) == (side, side)
    if not cut or embed.proj.bias is None or not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity):
        raise UserError("attack 'joint' needs a projection with bias that reads each pixel once, and no norm behind it")
    if model.num_prefix_tokens > 1 or getattr(model, "index_embed", None) is not None:
        raise UserError("attack 'joint' needs at most a class token in front of the patches, and one position for each")
