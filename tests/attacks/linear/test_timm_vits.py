"""Which attacks by equations apply to the ViTs people use, and that those which do give the image."""

import math

import pytest
import torch
from torch import nn

from attacks import ATTACKS
from attacks.threat_model.applicable import preview_leak, unmet_requirement
from attacks.threat_model.client import prepare, share
from defenses import no_defense
from models import build_model
from models.jigsaw import Jigsaw, patchify
from tests.attacks.test_exactness import decibels
from tests.attacks.timm_victims import of_timm
from utils.errors import UserError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}  # and 4 patches
ALL = ("closed_form", "mjp_aware", "joint", "token_span", "first_block")
BLOCKS = ("token_span", "first_block")  # attacks that look into the first block
# timm's name, options, and those of ALL that do not apply.
VICTIMS = {
    "ViT": ("vit_tiny_patch16_224", {}, ()),
    "DINOv2": ("vit_small_patch14_dinov2", {"init_values": 0.1}, ()),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}, ()),
    "DeiT-III": ("deit3_small_patch16_224", {"init_values": 0.1}, ()),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {}, ()),
    "CLIP": ("vit_base_patch32_clip_224", {}, ()),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, ()),
    "BEiT": ("beit_base_patch16_224", {"init_values": 0.1, "use_abs_pos_emb": True}, ()),
    "BEiT with relative positions": ("beit_base_patch16_224", {"init_values": 0.1}, ALL[:-1]),
    "EVA-02": ("eva02_tiny_patch14_224", {}, ("first_block",)),
    "pooled": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, ()),
    "without qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}, ()),
    "normed queries": ("vit_tiny_patch16_224", {"qk_norm": True}, ()),
    "normed MLP": ("vit_tiny_patch16_224", {"scale_mlp_norm": True, "scale_attn_norm": True}, ()),
    "no bias behind attention": ("vit_tiny_patch16_224", {"proj_bias": False}, ()),
    "flexible size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, ()),
    "without class row": ("vit_tiny_patch16_224", {"no_embed_class": True}, ()),
    "DINOv3, turned by rotary positions": ("vit_small_patch16_dinov3", {"init_values": 0.1}, ALL[:-1]),
    "gated MLP": ("vit_tiny_patch16_224", {"mlp_layer": "swiglu"}, ("first_block",)),
    "parallel": ("vit_tiny_patch16_224", {"block_fn": "parallel"}, BLOCKS),
    "post-norm blocks": ("vit_tiny_patch16_224", {"block_fn": "post"}, BLOCKS),
    "convolutions before patches": ("cait_xxs24_224", {"patch_size": 16}, ALL),
}
# Options of our own ViT, which MJP can hide positions of, and the attacks that do not apply to: one image with half its
# patches hidden; two images without a mask.
MASKED = {
    "ViT": ({}, (), ()),
    "LayerScale": ({"init_values": 0.1}, (), ()),
    "a channel scaled by 0": ({"init_values": 0.1}, ("mjp_aware", "joint"), ("joint",)),
    "normed queries": ({"qk_norm": True}, (), ()),
    "normed outputs of attention": ({"scale_attn_norm": True}, ("joint",), ("joint",)),
    "normed MLP": ({"scale_mlp_norm": True}, ("joint",), ("joint",)),
    "no bias behind attention": ({"proj_bias": False}, ("joint",), ("joint",)),
    "gated MLP": ({"mlp_layer": "swiglu"}, ("joint",), ("joint",)),
    "norm before the blocks": ({"pre_norm": True}, ("mjp_aware", "joint"), ("joint",)),
    "without qkv bias": ({"qkv_bias": False}, ("mjp_aware", "joint"), ("joint",)),
    "parallel": ({"block_fn": "parallel"}, ("mjp_aware", "joint"), ("joint",)),
    "post-norm blocks": ({"block_fn": "post"}, ("mjp_aware", "joint"), ("joint",)),
    "registers": ({"reg_tokens": 2}, ("mjp_aware", "joint"), ("joint",)),
    "without class row": ({"no_embed_class": True}, ("mjp_aware", "joint"), ()),
    "without class token": ({"class_token": False, "global_pool": "avg"}, ("mjp_aware", "joint"), ()),
}
PARTS = {"swiglu": "SwiGLU", "parallel": "ParallelScalingBlock", "post": "ResPostBlock"}


def side_of(name: str) -> int:
    """Two patches of the size that the name of the model says, in pixels."""
    return 2 * int((name.partition("_patch")[2] or "16").split("_")[0])


def trained(model: nn.Module) -> nn.Module:
    """No LayerNorm is the identity and no bias zero, as after training."""
    own = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=own, dtype=value.dtype)
            value += (
                (0.1 if value.dim() == 1 else 0.05 * value.std() or 0.5)
                * noise
                * (1 if value.dim() > 1 else value.abs().mean() + 0.1)
            )
    return model


def parts(options: dict) -> dict:
    """The options with timm's classes in place of their names."""
    from timm.layers import SwiGLU
    from timm.models import vision_transformer

    found = {"SwiGLU": SwiGLU}
    return {
        key: found.get(PARTS[value]) or getattr(vision_transformer, PARTS[value]) if value in PARTS else value
        for key, value in options.items()
    }


def build(name: str, options: dict) -> nn.Module:
    return trained(of_timm(name, side_of(name), **{"img_size": side_of(name)} | TINY | parts(options)))


def attacked(model: nn.Module, batch: int, ratio: float, attacks: tuple[str, ...]):
    """Yield (attack, why it does not apply, private batch, its reconstruction or None), after a look at the claim: what
    is refused is refused in the same words."""
    preview = preview_leak(model, batch, reveal_labels=True, local=None)
    side = model.arguments["image_size"]
    image = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    private = prepare(model, image, torch.arange(batch), Jigsaw(model.grid, ratio, "uniform", seed=0), 0)
    leak = share(model, private, lambda gradients, step: no_defense(gradients), True)
    for attack in attacks:
        options = {"starts": 24, "rounds": 8} if attack == "first_block" else {}
        options |= {"hidden_steps": 0} if attack == "mjp_aware" and ratio else {}
        why = unmet_requirement(attack, preview, options)
        if why:
            with pytest.raises(UserError) as caught:
                ATTACKS[attack](leak, generator=torch.Generator().manual_seed(0), **options)
            assert str(caught.value) == why
            yield attack, why, private, None
        else:
            yield attack, why, private, ATTACKS[attack](leak, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("kind", VICTIMS)
def test_what_applies_gives_the_image(kind):
    name, options, refused = VICTIMS[kind]
    model = build(name, options)
    for attack, why, private, found in attacked(model, 1, 0.0, (*ALL, "april")):
        if found is None:
            assert attack == "april" or attack in refused, why
            continue
        assert attack not in refused
        quality = decibels(found.images, private.model_input, (1.0, 1.0, 1.0))
        assert found.diagnostics["exact"] and quality > 60, f"{attack}: {quality:.1f} dB, {found.diagnostics}"


def masked_victim(kind: str, unknown: bool) -> nn.Module:
    options = parts(MASKED[kind][0])
    model = trained(build_model("vit", image_size=24, patch_size=8, unknown=unknown, **TINY | {"embed_dim": 64},
                                **options).double())  # fmt: skip
    if kind == "a channel scaled by 0":
        with torch.no_grad():
            model.blocks[0].ls1.gamma[3] = 0
    return model.eval()


@pytest.mark.parametrize("kind", MASKED)
def test_what_applies_gives_a_masked_image_up_to_the_order_of_its_hidden_patches(kind):
    model = masked_victim(kind, unknown=True)
    for attack, why, private, found in attacked(model, 1, 0.5, ("mjp_aware", "joint")):
        assert (found is None) == (attack in MASKED[kind][1]), f"{attack}: {why}"
        if found is None:
            continue
        true, seen = (patchify(images, 8)[0] for images in (private.model_input, found.images))
        hidden = private.mask[0]
        nearest = torch.cdist(true[hidden], seen[hidden]).square().amin(dim=1)
        visible = -10 * math.log10(float((true - seen)[~hidden].square().mean()))
        assert hidden.sum() == 4 and visible > 60, f"{attack}: {visible:.1f} dB, {found.diagnostics}"
        if attack == "joint":
            assert -10 * math.log10(float(nearest.mean()) / true.shape[1]) > 60, found.diagnostics


@pytest.mark.parametrize("kind", MASKED)
def test_what_applies_gives_two_images_at_once(kind):
    model = masked_victim(kind, unknown=False)
    for _, why, private, found in attacked(model, 2, 0.0, ("joint",)):
        assert (found is None) == bool(MASKED[kind][2]), why
        if found is None:
            continue
        errors = (
            torch.cdist(private.model_input.flatten(1), found.images.flatten(1)).square()
            / private.model_input[0].numel()
        )
        assert found.diagnostics["exact"] and -10 * math.log10(float(errors.amin(dim=1).max())) > 60


def test_april_gives_the_image_of_the_only_kind_that_it_applies_to():
    options = {"image_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = trained(build_model("vit", april=True, **options).double()).eval()
    ((_, why, private, found),) = attacked(model, 1, 0.0, ("april",))
    assert not why and found.diagnostics["exact"] and decibels(found.images, private.model_input, (1.0, 1.0, 1.0)) > 60
