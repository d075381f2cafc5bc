"""Which attacks by equations apply to the ViTs people use, and that those which do give the image."""

import pytest
import torch
from torch import nn

from attacks import ATTACKS
from attacks.applicable import expected, obstacle
from attacks.victim import prepare, share
from defenses import no_defense
from models.jigsaw import Jigsaw
from tests.attacks.test_exactness import decibels
from tests.attacks.timm_victims import of_timm
from utils.errors import UserError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}  # and 4 patches
ALL, SPAN, ROWS = ("closed_form", "token_span", "first_block"), ("closed_form", "first_block"), ("closed_form",)
# timm's name, options, and the attacks that apply.
VICTIMS = {
    "ViT": ("vit_tiny_patch16_224", {}, ALL),
    "DINOv2": ("vit_small_patch14_dinov2", {"init_values": 0.1}, ALL),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}, ALL),
    "DeiT-III": ("deit3_small_patch16_224", {"init_values": 0.1}, ALL),
    "DeiT distilled": ("deit_tiny_distilled_patch16_224", {}, ALL),
    "CLIP": ("vit_base_patch32_clip_224", {}, ALL),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, ALL),
    "pooled": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, ALL),
    "without qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}, ALL),
    "normed queries": ("vit_tiny_patch16_224", {"qk_norm": True}, ALL),
    "normed MLP": ("vit_tiny_patch16_224", {"scale_mlp_norm": True, "scale_attn_norm": True}, ALL),
    "no bias behind attention": ("vit_tiny_patch16_224", {"proj_bias": False}, ALL),
    "flexible size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, ALL),
    "without class row": ("vit_tiny_patch16_224", {"no_embed_class": True}, ALL),
    "gated MLP": ("vit_tiny_patch16_224", {"mlp_layer": "swiglu"}, ("closed_form", "token_span")),
    "parallel": ("vit_tiny_patch16_224", {"block_fn": "parallel"}, ROWS),
    "post-norm blocks": ("vit_tiny_patch16_224", {"block_fn": "post"}, ROWS),
}
PARTS = {"swiglu": "SwiGLU", "parallel": "ParallelScalingBlock", "post": "ResPostBlock"}


def side_of(name: str) -> int:
    """Two patches of the size that the name of the model says, in pixels."""
    return 2 * int(name.partition("_patch")[2].split("_")[0])


def trained(model: nn.Module) -> nn.Module:
    """No LayerNorm is the identity and no bias zero, as after training."""
    own = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=own, dtype=value.dtype)
            value += (
                (0.1 if value.dim() == 1 else 0.05 * value.std())
                * noise
                * (1 if value.dim() > 1 else value.abs().mean() + 0.1)
            )
    return model


def build(name: str, options: dict) -> nn.Module:
    from timm.layers import SwiGLU
    from timm.models import vision_transformer

    found = {"SwiGLU": SwiGLU}
    options = {
        key: found.get(PARTS[value]) or getattr(vision_transformer, PARTS[value]) if value in PARTS else value
        for key, value in options.items()
    }
    return trained(of_timm(name, side_of(name), img_size=side_of(name), **TINY | options))


@pytest.mark.parametrize("kind", VICTIMS)
def test_what_applies_gives_the_image(kind):
    name, options, applying = VICTIMS[kind]
    model = build(name, options)
    preview = expected(model, 1, reveal_labels=True, local=None)
    says = {attack: obstacle(attack, preview, {}) for attack in ALL}
    assert {attack for attack, why in says.items() if not why} == set(applying), says
    side = side_of(name)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    private = prepare(model, image, torch.tensor([1]), Jigsaw(model.grid, 0.0, seed=0), 0)
    leak = share(model, private, lambda gradients, step: no_defense(gradients), True)
    for attack in ALL:
        given = {"starts": 24, "rounds": 8} if attack == "first_block" else {}
        if says[attack]:
            with pytest.raises(UserError) as caught:
                ATTACKS[attack](leak, generator=torch.Generator().manual_seed(0), **given)
            assert str(caught.value) == says[attack]
            continue
        found = ATTACKS[attack](leak, generator=torch.Generator().manual_seed(0), **given)
        quality = decibels(found.images, private.shown, leak.std)
        assert found.diagnostics["exact"] and quality > 60, f"{attack}: {quality:.1f} dB, {found.diagnostics}"
