"""models/timm_models.py: timm's networks by name, their own inputs, their weights from files and from seeds."""

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from data.transforms import eval_transform
from models import build_model
from models.checkpoints import save_checkpoint
from models.timm_models import PATCH, open_timm
from utils.errors import UserError


def images(side: int, number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))


def assert_same_logits(model, network) -> None:
    x = images(model.arguments["image_size"])
    with torch.no_grad():
        torch.testing.assert_close(model(x, None), network.eval()(x))


@pytest.mark.parametrize("channels", [1, 3])
def test_networks_for_grey_images_say_so_and_others_do_not(channels):
    model = open_timm("test_vit", in_chans=channels)
    assert (model.arguments.get("in_chans", 3), len(model.normalize["mean"])) == (channels, channels)
    assert ("in_chans" in model.arguments) == (channels == 1)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_mambaout"])
def test_random_weights_are_those_timm_draws_after_the_seed(name):
    torch.manual_seed(5)
    network = timm.create_model(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = open_timm(name, seed=5)
    assert torch.get_rng_state().equal(before)
    assert not model.training and not model.hides_positions
    assert_same_logits(model, network)
    config = resolve_model_data_config(network)
    assert model.arguments["image_size"] == config["input_size"][1]
    assert model.normalize == {key: config[key] for key in ("mean", "std")}
    features = model.features(images(model.arguments["image_size"]))
    assert features.shape == (2, network.head_hidden_size)


@pytest.mark.parametrize("layout", ["timm", "training", "parallel"])
def test_weights_come_from_a_file(tmp_path, layout):
    network = timm.create_model("test_vit", num_classes=7)
    weights = network.state_dict()
    content = {
        "timm": weights,
        "training": {"state_dict": weights, "epoch": 3},
        "parallel": {"model": {f"module.{key}": value for key, value in weights.items()}},
    }[layout]
    torch.save(content, tmp_path / "model.pth")
    model = open_timm("test_vit", checkpoint=tmp_path / "model.pth")
    assert model.arguments["num_classes"] == 7
    assert_same_logits(model, network)


def test_files_that_do_not_fit_are_explained(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth' does not fit timm model 'test_vit'"):
        open_timm("test_vit", checkpoint=tmp_path / "other.pth")
    own = build_model("vit", image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    save_checkpoint(tmp_path / "own.pt", {"arguments": own.arguments, "model": own.state_dict()})
    with pytest.raises(UserError, match="own.pt' was written by train.py .* leave out --timm"):
        open_timm("test_vit", checkpoint=tmp_path / "own.pt")
    with pytest.raises(UserError, match="does not exist"):
        open_timm("test_vit", checkpoint=tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("name", "side", "patch"),
    [("test_vit", 160, 16), ("mixer_s32_224", 224, 32), ("test_resnet", 160, PATCH), ("pvt_v2_b0", 224, PATCH)],
)
def test_the_puzzle_has_the_patches_of_the_model_or_of_16_pixels(name, side, patch):
    model = open_timm(name)
    assert model.patch_size == patch and model.grid == (side // patch, side // patch)


def test_sizes_may_be_chosen():
    model = open_timm("test_vit", image_size=64, cell=8)
    assert model.grid == (8, 8) and model(images(64)).shape == (2, 1000)
    assert open_timm("test_resnet", image_size=64)(images(64)).shape == (2, 1000)


def test_position_tables_are_found_where_there_are_any():
    model = open_timm("test_vit")
    assert model.patch_pos_embed().equal(model.network.pos_embed[0, -100:])
    with pytest.raises(UserError, match="no table of one position embedding per 8-pixel patch"):
        open_timm("test_vit", cell=8).patch_pos_embed()
    with pytest.raises(AttributeError):
        open_timm("test_resnet").pos_embed  # noqa: B018


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixer_b16_22", "unknown timm model 'mixer_b16_22': did you mean 'mixer_b16_224'"),
        ("test_vit.r160_in2k", "no weights have that tag: did you mean 'test_vit.r160_in1k'"),
        ("vit_small_patch14_dinov2", "has no classifier"),
    ],
)
def test_names_that_cannot_be_evaluated_are_explained(name, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        open_timm(name)


def test_masks_are_refused():
    with pytest.raises(ValueError, match="pass no mask"):
        open_timm("test_vit")(images(160), torch.zeros(2, 100, dtype=torch.bool))


@pytest.mark.parametrize("crop", [True, False])
def test_inputs_are_prepared_as_timm_does(crop):
    model = open_timm("test_resnet")
    config = resolve_model_data_config(model.network)
    if not crop:
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    theirs = timm.data.create_transform(**config, is_training=False)
    ours = eval_transform(160, **model.normalize, crop=crop, recipe=model.recipe)
    picture = Image.fromarray(
        torch.randint(0, 256, (190, 240, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    )
    assert ours(picture).equal(theirs(picture)) and ours(picture).shape == (3, 160, 160)


def test_a_classifier_that_is_asked_for_is_drawn_after_the_seed(tmp_path):
    network = timm.create_model("test_vit", num_classes=7)
    weights = network.state_dict()
    bare = {name: value for name, value in weights.items() if not name.startswith("head.")}
    for name, content in (("whole.pth", weights), ("bare.pth", bare)):
        torch.save(content, tmp_path / name)
        model = open_timm("test_vit", checkpoint=tmp_path / name, num_classes=3, seed=5)
        torch.manual_seed(5)
        head = timm.create_model("test_vit", num_classes=3).head.weight
        assert model.network.head.weight.equal(head) and "head.weight" in model.assumed["new"]
        assert model.network.blocks[0].attn.qkv.weight.equal(network.blocks[0].attn.qkv.weight)
    same = open_timm("test_vit", checkpoint=tmp_path / "whole.pth", num_classes=7)
    assert same.network.head.weight.equal(network.head.weight) and "new" not in same.assumed
