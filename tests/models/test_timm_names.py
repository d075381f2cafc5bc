"""The names registered with timm are models/vit.py, and take weights in every layout."""

from pathlib import Path

import pytest
import timm
import torch

import models.timm_names  # noqa: F401, registers its names with timm
from models import build_model
from models.official import to_official

ROOT = Path(__file__).parents[2]
SMALL = {"depth": 1, "num_classes": 4, "img_size": 32}


def test_the_three_sizes_are_listed():
    assert timm.list_models("mjp_*") == [f"mjp_deit_{size}_patch16_224" for size in ("base", "small", "tiny")]
    config = timm.get_pretrained_cfg("mjp_deit_small_patch16_224")
    assert config.input_size == (3, 224, 224) and config.crop_pct == 0.875 and config.num_classes == 1000


@pytest.mark.parametrize("layout", ["ours", "official", "checkpoint"])
def test_weights_of_every_layout_load(layout):
    own = build_model("deit_tiny", depth=1, num_classes=4, image_size=32, unknown=True, seed=3).eval()
    weights = own.state_dict()
    weights = {"ours": weights, "official": to_official(weights), "checkpoint": {"model": weights, "epoch": 3}}[layout]
    overlay = {"state_dict": weights, "num_classes": 4, "input_size": (3, 32, 32)}
    model = timm.create_model("mjp_deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    images, mask = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.eye(4)[:1] > 0
    assert model.eval()(images, mask).equal(own(images, mask))


def test_positions_are_resized_to_another_grid():
    own = build_model("deit_tiny", depth=1, num_classes=4, image_size=32, unknown=True)
    overlay = {"state_dict": own.state_dict(), "num_classes": 4, "input_size": (3, 32, 32)}
    options = SMALL | {"img_size": 64}
    model = timm.create_model("mjp_deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert model.grid == (4, 4) and model.pos_embed.shape == (1, 17, 192)
    assert model.unknown_pos_embed.equal(own.unknown_pos_embed)


def test_modules_that_ask_timm_for_names_register_ours():
    """Nothing else does it for them: `import models` loads no model."""
    asking = [path for path in (ROOT / "models").glob("*.py") if "timm.is_model(" in path.read_text()]
    assert {path.stem for path in asking} == {"descriptions", "timm_models"}
    assert all("import models.timm_names" in path.read_text() for path in asking)
