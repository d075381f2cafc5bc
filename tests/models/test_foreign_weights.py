"""models/checkpoints.py: weights of timm, torchvision and the authors of Swin, in the wrappings they come in."""

import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from models.checkpoints import load_model
from tests.models.small_models import assert_same_weights, picture, small


@torch.inference_mode()
def assert_same_logits(model: nn.Module, expected: nn.Module, side: int = 224) -> None:
    images = picture(side, 1)
    logits = expected(images)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)
    assert logits.std() > 1e-3


@pytest.fixture(scope="module")
def timm_swin() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=10).eval()


def test_timm_deit_gives_timms_logits(tmp_path):
    torch.manual_seed(0)
    expected = timm.create_model("deit_tiny_patch16_224", pretrained=False, num_classes=10).eval()
    torch.save({"model": expected.state_dict(), "epoch": 3}, tmp_path / "deit.pth")
    model = load_model(tmp_path / "deit.pth")
    assert model.arguments["image_size"] == 224
    assert_same_logits(model, expected)


def test_timm_swin_gives_timms_logits(tmp_path, timm_swin):
    torch.save({"model": timm_swin.state_dict()}, tmp_path / "swin.pth")
    model = load_model(tmp_path / "swin.pth")
    assert model.arguments["name"] == "swin_tiny"
    assert_same_logits(model, timm_swin)


def test_swin_in_the_layout_of_its_authors_loads(tmp_path, timm_swin):
    weights = {}
    for key, value in timm_swin.state_dict().items():
        key = re.sub(r"layers.(\d).downsample", lambda stage: f"layers.{int(stage[1]) - 1}.downsample", key)
        weights[key.replace("head.fc.", "head.")] = value
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    torch.save({"model": weights}, tmp_path / "swin.pth")
    assert_same_weights(load_model(tmp_path / "swin.pth"), timm_swin.state_dict())


def test_swin_with_another_window_gives_timms_logits(tmp_path):
    torch.manual_seed(0)
    size = {"img_size": 128, "window_size": 4, "num_classes": 10}
    expected = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **size).eval()
    torch.save({"model": expected.state_dict()}, tmp_path / "swin.pth")
    assert_same_logits(load_model(tmp_path / "swin.pth", image_size=128), expected, side=128)


def test_torchvision_resnet_gives_torchvisions_logits(tmp_path):
    torch.manual_seed(0)
    expected = torchvision.models.resnet50(weights=None, num_classes=10).eval()
    torch.save(expected.state_dict(), tmp_path / "resnet.pth")
    model = load_model(tmp_path / "resnet.pth")
    assert model.arguments["name"] == "resnet50"
    assert_same_logits(model, expected, side=64)


@pytest.mark.parametrize("architecture", ["vit", "swin"])
@pytest.mark.parametrize("layout", ["state_dict of DDP", "bare", "safetensors"])
def test_other_wrappings_of_foreign_weights_load(tmp_path, timm_swin, architecture, layout):
    weights = (small() if architecture == "vit" else timm_swin).state_dict()
    path = tmp_path / "model.pth"
    if layout == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(weights, path)
    elif layout == "bare":
        torch.save(weights, path)
    else:
        torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    heads = {"num_heads": 1} if architecture == "vit" else {}
    assert_same_weights(load_model(path, **heads), weights)
