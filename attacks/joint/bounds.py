"""Say before any work whether the equations of `joint` are enough, from names, shapes and modules alone."""

from dataclasses import dataclass

import torch
from torch import nn

from attacks.joint.block import PATCHES, Places
from attacks.linear.closed_form import check_closed_form
from attacks.linear.layer_scale import check_not_lost
from attacks.linear.mjp_equations import check_equations, most_hidden
from attacks.linear.softmax_attention import check_softmax
from attacks.threat_model.checks import check_dropout, check_patches, check_tokens, first_block_of
from attacks.threat_model.leak import Leak, RefusalError
from models.position import RotaryAttention

LAYERS = (PATCHES, *("blocks.0." + name for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")))


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


def most_masked(model: nn.Module) -> int:
    """Return the most hidden patches of one masked image, D - N - 4: one less than of visible ones alone."""
    return most_hidden(model.embed_dim, model.grid[0] * model.grid[1]) - 1


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


def check_joint(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError where `joint` cannot work: another kind of model, gradients that are missing, too many tokens. Of
    one image that hides nothing it asks what `closed_form` does, which then answers."""
    hides = getattr(leak.model, "hides_positions", False)
    if hides and leak.attacker_knowledge == "none":
        raise RefusalError(
            f"attack '{attack}' knows of MJP: give --attacker_knowledge method or more, or use 'closed_form'"
        )
    if masked_alone(leak) and not hides:
        check_closed_form(leak, {"underdetermined": False}, loss, attack)
        return
    check_patches(leak, attack)
    _check_block(leak, attack)
    if len(leak.model.blocks) < 2:
        raise RefusalError(f"attack '{attack}' needs two blocks or more: behind the last one patches have no gradient")
    for layer in LAYERS:
        for part in ("weight", "bias"):
            leak.gradient(f"{layer}.{part}", attack)
    if leak.model.num_prefix_tokens:
        leak.gradient("cls_token", attack)
    check_not_lost(leak.model, [f"{layer}.weight" for layer in LAYERS], attack)
    check_tokens(leak, attack)
    check_dropout(leak, attack, seed_helps=False)
    if masked_alone(leak):
        check_equations(leak, attack)
    elif shortage := count_of(leak).shortage():
        raise RefusalError(f"attack '{attack}' {shortage}")


def _check_block(leak: Leak, attack: str) -> None:
    """Raise UserError unless what the relations of joint_block are about is there: layers with biases, LayerNorms that
    pass every channel on, and attention that joint_images can predict."""
    model = leak.model
    block = first_block_of(model, attack)
    layers = {name: getattr(getattr(block, part), name, None) for part, name in
              (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))}  # fmt: skip
    missing = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear) or layer.bias is None]
    if missing or layers["fc1"].out_features != layers["fc2"].in_features:  # unequal: a gate between the two
        raise RefusalError(
            f"attack '{attack}' needs a first block with linear layers attn.qkv, attn.proj, mlp.fc1 and mlp.fc2, each "
            f"with a bias, and an activation alone between the last two"
        )
    if not isinstance(getattr(block.mlp, "norm", nn.Identity()), nn.Identity):
        raise RefusalError(f"attack '{attack}' needs an MLP without a norm inside, in the first block")
    norms = block.norm1, block.norm2
    if not all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine and norm.weight.all() for norm in norms):
        raise RefusalError(f"attack '{attack}' needs LayerNorms with a weight for every channel, none of them 0")
    if not isinstance(block.attn, RotaryAttention):
        check_softmax(block, attack)
    if not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity) or model.patch_embed.proj.bias is None:
        raise RefusalError(
            f"attack '{attack}' needs a patch projection with a bias, and tokens that enter the blocks as they are: "
            f"this model lacks the bias, or norms them first (norm_pre)"
        )
    if model.num_prefix_tokens > 1 or getattr(model, "index_embed", None) is not None:
        raise RefusalError(
            f"attack '{attack}' needs at most a class token in front of the patches, and one position for each"
        )
