"""models/layouts.py, inference.py, descriptions.py: networks of others compute what they do in their own libraries."""

import argparse
import json

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from models import build_model
from models.checkpoints import load_model, save_checkpoint, weights_of
from models.descriptions import BERT_HEADS, VIT_HEADS, read_description
from models.official import to_official
from models.timm_models import open_timm
from models.vit import SIZES
from tests.models.small_models import assert_same_weights, picture, small
from utils.errors import UserError


def save_huggingface(golden, name, folder, **changes):
    """A folder as `save_pretrained` leaves it."""
    data, config = golden("huggingface_vit"), golden("huggingface_vit.json")[name] | changes
    weights = {key.removeprefix(f"{name}/sd/"): torch.tensor(data[key]).float() for key in data if f"{name}/sd/" in key}
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return torch.tensor(data["images"]), torch.tensor(data[f"{name}/logits"]), weights


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_huggingface_vits_give_its_logits(golden, tmp_path, name):
    images, logits, weights = save_huggingface(golden, name, tmp_path / name)
    model = load_model(tmp_path / name)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)
    assert model.arguments["num_heads"] == 4 and model.classes is None and "num_heads" not in model.assumed
    save_checkpoint(tmp_path / "own.pt", {"arguments": model.arguments, "model": model.state_dict()})
    assert load_model(tmp_path / "own.pt")(images).equal(model(images))
    torch.save(weights, tmp_path / "alone.pth")  # without its configuration
    with pytest.raises(UserError, match=r"how many attention heads .*\(width 16, depth 2\): pass --num_heads N"):
        load_model(tmp_path / "alone.pth")
    alone = load_model(tmp_path / "alone.pth", num_heads=4)
    torch.testing.assert_close(alone(images), logits, rtol=0, atol=1e-3)


def test_names_of_huggingface_in_memory_are_those_of_its_files(golden, tmp_path):
    """Version 5 keeps other names in memory than in files; torch.save(model.state_dict()) has these."""
    images, logits, weights = save_huggingface(golden, "vit", tmp_path / "vit")
    new = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj"}
    new |= {"attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}
    new |= {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "encoder.layer.": "layers."}
    for old, name in new.items():
        weights = {key.replace(old, name): value for key, value in weights.items()}
    assert "vit.layers.1.mlp.fc2.weight" in weights
    torch.save(weights, tmp_path / "a.pth")
    torch.testing.assert_close(load_model(tmp_path / "a.pth", num_heads=4)(images), logits, rtol=0, atol=1e-3)


def test_what_huggingface_says_beside_the_weights_is_used(golden, tmp_path):
    labels = {"0": "cat", "1": "dog", "2": "owl"}
    save_huggingface(golden, "vit", tmp_path / "vit", id2label=labels)
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]})
    )
    model = load_model(tmp_path / "vit")
    assert model.classes == ["cat", "dog", "owl"]
    assert model.normalize == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.5)}
    assert model.normalize_from == "preprocessor_config.json"


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [("vit", {"hidden_act": "quick_gelu"}, "quick_gelu"), ("vit", {"num_attention_heads": 3}, "attention heads")],
)
def test_what_would_compute_something_else_is_refused(golden, tmp_path, name, changes, words):
    save_huggingface(golden, name, tmp_path / name, **changes)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / name)


def test_a_distilled_vit_of_huggingface_says_what_would_open_it(golden, tmp_path):
    _, _, weights = save_huggingface(golden, "vit", tmp_path / "vit")
    weights["vit.embeddings.distillation_token"] = weights["vit.embeddings.cls_token"]
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match="distillation token, .*--timm NAME .* --model timm:NAME"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize("old", [False, True])
def test_torchvision_vits_give_its_logits(tmp_path, old):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 24}
    theirs = torchvision.models.VisionTransformer(num_classes=3, **sizes).eval()
    for value in theirs.parameters():
        torch.nn.init.normal_(value, std=0.3)
    weights = theirs.state_dict()
    if old:  # names before torchvision 0.13
        weights = {
            k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in weights.items()
        }
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "a.pth")
    model = load_model(tmp_path / "a.pth", num_heads=4)
    torch.testing.assert_close(model(picture(16)), theirs(picture(16)), rtol=0, atol=1e-5)


def test_torchvision_weights_open_in_a_timm_model(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=160, patch_size=16, num_layers=6, num_heads=2, hidden_dim=64, mlp_dim=192, num_classes=4
    ).eval()
    torch.nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    model = open_timm("test_vit", checkpoint=tmp_path / "a.pth", class_token=True)
    torch.testing.assert_close(model(picture(160)), theirs(picture(160)), rtol=0, atol=1e-4)


def test_known_shapes_are_those_of_timm():
    for size in SIZES.values():
        assert VIT_HEADS[size["embed_dim"], size["depth"]] == size["num_heads"]
    for name in (
        "vit_large_patch16_224",
        "vit_huge_patch14_224",
        "vit_giant_patch14_224",
        "vit_so400m_patch14_siglip_224",
    ):
        with torch.device("meta"):
            network = timm.create_model(name)
        assert VIT_HEADS[network.embed_dim, len(network.blocks)] == network.blocks[0].attn.num_heads
    assert VIT_HEADS[1280, 32] == 16  # 80 dimensions a head
    assert BERT_HEADS[384, 6] == BERT_HEADS[384, 12] == 12  # 32 dimensions a head: MiniLM


def test_a_known_shape_is_an_assumption_and_a_configuration_is_none(tmp_path):
    model = small(embed_dim=192, depth=12, num_heads=3, image_size=16)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert loaded.arguments["num_heads"] == 3 and loaded.assumed["num_heads"].startswith(
        "3 attention heads, as published"
    )
    for key, config in {
        "hyper_parameters": {"model": {"num_heads": 6}},
        "args": argparse.Namespace(num_heads=6),
        "config": {"MODEL": {"VIT": {"NUM_HEADS": 6}}},
        "cfg": {"num_attention_heads": 6},
    }.items():
        torch.save({"model": model.state_dict(), key: config}, tmp_path / "b.pth")
        loaded = load_model(tmp_path / "b.pth")
        assert loaded.arguments["num_heads"] == 6 and "num_heads" not in loaded.assumed, key
    torch.save({"model": model.state_dict(), "args": {"num_heads": 6}}, tmp_path / "c.pth")
    assert load_model(tmp_path / "c.pth", num_heads=2).arguments["num_heads"] == 2  # who says it is believed


def test_a_timm_name_in_the_file_tells_heads_and_normalisation(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32)
    content = {"arch": "vit_tiny_patch16_224", "state_dict": network.state_dict()}
    content["args"] = argparse.Namespace(model="vit_tiny_patch16_224", mean=None, std=None)
    torch.save(content, tmp_path / "a.pth")
    model = load_model(tmp_path / "a.pth")
    assert model.arguments["num_heads"] == 3 and not model.assumed
    assert model.normalize == {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert model.normalize_from == "timm's configuration of vit_tiny_patch16_224, which the file names"
    content["args"] = argparse.Namespace(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    torch.save(content, tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth").normalize["mean"] == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("content", "normalize", "classes"),
    [
        ({"pretrained_cfg": {"mean": (0.5, 0.5, 0.5), "std": [0.5, 0.5, 0.5]}}, 0.5, None),
        ({"args": {"mean": [123, 116, 103], "std": [58, 57, 57]}}, None, None),
        ({"mean": [0.1], "std": [0.2]}, None, None),
        ({"classes": ["b", "a"]}, None, ["b", "a"]),
        ({"class_to_idx": {"b": 0, "a": 1}}, None, ["b", "a"]),
        ({"config": {"id2label": {1: "a", 0: "b"}}}, None, ["b", "a"]),
        ({"config": {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}}, None, None),
        ({"class_to_idx": {"b": 0, "a": 2}}, None, None),
    ],
)
def test_what_a_file_says_of_inputs_and_classes(content, normalize, classes):
    said = read_description(content, "a.pth")
    assert (said.normalize and said.normalize["mean"][0]) == normalize and said.classes == classes


def test_a_change_of_the_image_size_is_said(tmp_path):
    model = small()
    save_checkpoint(tmp_path / "own.pt", {"arguments": model.arguments, "model": model.state_dict()})
    assert (
        "for images of 32 pixels and is used at 64"
        in load_model(tmp_path / "own.pt", image_size=64).assumed["image_size"]
    )
    assert not load_model(tmp_path / "own.pt", image_size=32).assumed
    assert "160 pixels and is used at 224" in open_timm("test_vit", image_size=224).assumed["image_size"]


def test_a_vit_without_blocks_that_are_known_is_not_asked_for_its_heads(tmp_path):
    weights = {key.replace("blocks.", "encoder.stage."): value for key, value in small().state_dict().items()}
    torch.save(weights, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match="no blocks known here .*timm"):
        load_model(tmp_path / "foreign.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value.to(torch.int8), "'blocks.0.mlp.fc1.weight' .* int8 numbers, as quantised weights do"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "'blocks.0.mlp.fc1.weight' .* qint8"),
        (lambda value: value.to(torch.float8_e4m3fn), "'blocks.0.mlp.fc1.weight' .* float8_e4m3fn"),
        (lambda value: value + 0j, "'blocks.0.mlp.fc1.weight' .* complex64 numbers"),
        (
            lambda value: value.index_fill(0, torch.tensor([3]), torch.nan),
            "'blocks.0.mlp.fc1.weight' .* is NaN or infinite",
        ),
        (lambda value: value / 0, "'blocks.0.mlp.fc1.weight' .* is NaN or infinite"),
        (lambda value: value > 0, "'blocks.0.mlp.fc1.weight' .* bool"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_numbers_that_are_no_weights_are_refused(tmp_path, change, words):
    model = small()
    weights = model.state_dict()
    weights["blocks.0.mlp.fc1.weight"] = change(weights["blocks.0.mlp.fc1.weight"])
    torch.save({"model": weights}, tmp_path / "foreign.pth")
    save_checkpoint(tmp_path / "own.pt", {"arguments": model.arguments, "model": weights})
    for name in ("foreign.pth", "own.pt"):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / name, num_heads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(tmp_path, dtype):
    model = small()
    weights = {name: value.to(dtype) for name, value in model.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", num_heads=1), {k: v.float() for k, v in weights.items()})


def test_relatives_of_bert_are_named():
    weights = {f"roberta.{name}": torch.ones(2, 2) for name in ("embeddings.word_embeddings.weight",)}
    with pytest.raises(UserError, match="model 'roberta', which is not known here"):
        weights_of(weights, "a.pth")


def test_heads_that_a_file_does_not_say_are_listed_as_assumed(tmp_path):
    model = build_model("deit_tiny", num_classes=3, image_size=32)
    torch.save({"model": to_official(model.state_dict())}, tmp_path / "others.pth")
    loaded = load_model(tmp_path / "others.pth")
    assert loaded.arguments["num_heads"] == 3 and "3" in loaded.assumed["num_heads"]
    assert "num_heads" not in load_model(tmp_path / "others.pth", num_heads=3).assumed
