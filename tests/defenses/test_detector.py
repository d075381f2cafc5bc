"""The detector: known statistics, silence on an honest round, an alarm for each server, and its command."""

import pytest
import torch
from PIL import Image

from attacks.malicious import SERVERS
from attacks.malicious.server import Knowledge
from defenses.detector import (
    THRESHOLDS,
    check_model,
    findings_text,
    gradient_statistics,
    layer_statistics,
    suspicion,
    weight_statistics,
)
from models import build_model
from models.checkpoints import save_safetensors
from utils.errors import UserError

VIT = {"image_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 12}


def changed(model, scale: float = 1e-2):
    """Return its weights after a small step in a random direction."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + scale * value.std().nan_to_num(0.0) * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }


def test_statistics_of_a_layer_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(20, 16, generator=generator), torch.arange(20.0)
    before = {"fc.weight": weight.clone(), "fc.bias": torch.zeros(20)}
    weight = weight.clone()
    weight[:5], weight[6] = 0, 3 * weight[7]
    found = weight_statistics({"fc.weight": weight, "fc.bias": bias, "new.weight": torch.ones(2, 2)}, before)
    assert found["dead_rows"] == (0.25, "fc.weight") and found["equal_rows"] == (2 / 15, "fc.weight")
    assert found["bias_ladder"] == (1.0, "fc.bias")
    assert found["new_values"][0] == pytest.approx(4 / (320 + 20 + 4)) and found["new_values"][1] == "new.weight"
    same = weight_statistics(before, before)
    assert same["drift"][0] < -6 and same["dead_rows"][0] == 0 and same["new_values"][0] == 0


def test_what_stood_out_before_raises_no_alarm_and_what_newly_does_is_told():
    """A trained layer: long rows, parallel rows, large biases in order. Between honest rounds that stays."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 16, generator=generator)
    weight[0], weight[2] = 30 * weight[0], weight[1]
    before = {"fc.weight": weight, "fc.bias": torch.arange(20.0)}
    after = {name: value + 1e-3 * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    assert suspicion(weight_statistics(after, before)) == []
    assert suspicion(weight_statistics(after, {"other.weight": weight}))  # as a new layer it would be
    found = weight_statistics(after | {"fc.bias": torch.arange(20.0) * 100}, before)
    assert found["bias_outlier"][0] == pytest.approx(2, abs=0.01)
    known = weight_statistics(after, before, layer_statistics(before))
    assert known == weight_statistics(after, before)


def test_layers_that_were_zero_before_are_not_dead():
    layer = {"up.weight": torch.zeros(16, 16)}
    assert not any(value for value, _ in weight_statistics(layer, layer).values())


def test_one_image_in_the_gradient_is_seen():
    model = build_model("vit", **VIT).eval()
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    honest = gradient_statistics(model, images, labels, "head")
    knowledge = Knowledge((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    sent = SERVERS["class_fishing"](target=2).tamper(model, knowledge, generator=torch.Generator()).eval()
    assert honest["image_share"][0] < 0.9 < gradient_statistics(sent, images, labels, "head")["image_share"][0]
    none = gradient_statistics(sent, images, torch.full((4,), 7), "head")
    assert none["image_share"][0] == 1.0 and "zero for every image" in none["image_share"][1]


def test_an_honest_round_raises_no_alarm_and_each_server_does():
    model = build_model("vit", **VIT).eval()
    before = model.state_dict()
    assert suspicion(weight_statistics(changed(model), before)) == []
    knowledge = Knowledge((3, 16, 16), (0.5,) * 3, (0.5,) * 3, torch.randn(50, 3, 16, 16))
    for name in ("imprint", "trap_weights", "class_fishing", "feature_fishing"):
        sent = SERVERS[name]().tamper(model, knowledge, generator=torch.Generator().manual_seed(0))
        assert suspicion(weight_statistics(sent.state_dict(), before)), name


def test_a_check_says_what_it_found_and_where(tmp_path):
    model = build_model("vit", **VIT).eval()
    save_safetensors(tmp_path / "before.safetensors", model)
    with torch.no_grad():
        model.head.weight[1:] = 0
    save_safetensors(tmp_path / "received.safetensors", model)
    files = [tmp_path / f"{name}.safetensors" for name in ("received", "before")]
    found = check_model(*files)
    shown = findings_text(found)
    assert "verdict: tampered with" in shown and "alarm: dead_rows 0.917 at head.weight" in shown
    assert set(found["statistics"]) <= set(THRESHOLDS) and found["verdict"] == "tampered with"
    assert "verdict: looks honest" in findings_text(check_model(files[1], files[1]))


def test_a_check_with_pictures_takes_a_step_on_them_as_the_checkpoint_normalises(tmp_path):
    model = build_model("vit", **VIT, seed=0).eval()
    model.normalize = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}
    save_safetensors(tmp_path / "model.safetensors", model)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    found = check_model(tmp_path / "model.safetensors", tmp_path / "model.safetensors", tmp_path)
    assert 1 / 3 <= found["statistics"]["image_share"]["value"] < 1 and found["verdict"] == "looks honest"
    for number in range(2):
        (tmp_path / f"{number}.png").unlink()
    with pytest.raises(UserError, match="holds 1 image"):
        check_model(tmp_path / "model.safetensors", tmp_path / "model.safetensors", tmp_path)


def test_files_without_weights_are_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="holds no weights by name"):
        check_model(tmp_path / "empty.pt", tmp_path / "empty.pt")
    with pytest.raises(UserError, match="does not exist"):
        check_model(tmp_path / "none.pt", tmp_path / "empty.pt")
