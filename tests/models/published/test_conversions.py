"""models/published: weights inside packages become those of timm, torchvision and HuggingFace, name by name."""

import pickle
import re

import numpy as np
import onnx
import pytest
import timm
import torch
import torchvision
from onnx import helper, numpy_helper

from models.published import PUBLISHED
from models.published.efficientnet_lite import convert_efficientnet
from models.published.lpips_trunk import check_alexnet, convert_alexnet
from models.published.minilm import convert_minilm
from models.published.vit_s14 import convert_vit_s14
from utils.errors import UserError


def test_a_vit_in_a_graph_whose_matrices_have_no_names(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, embed_dim=64, depth=2, num_heads=1)
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    table, nodes = weights["pos_embed"], []
    initializers = {"onnx::Concat_1": table[:, :1], "onnx::Reshape_2": table[:, 1:]}
    initializers["backbone.embeddings.cls_token"] = weights["cls_token"]
    for part in ("weight", "bias"):
        initializers[f"backbone.embeddings.patch_embeddings.projection.{part}"] = weights[f"patch_embed.proj.{part}"]
        initializers[f"backbone.layernorm.{part}"] = weights[f"norm.{part}"]

    def linear(place: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        name = f"onnx::MatMul_{99 - len(nodes)}"  # names in another order than their use
        initializers[name], initializers[f"backbone.{place}.bias"] = weight.T, bias
        nodes.append(helper.make_node("MatMul", ["x", name], [f"/backbone/{_path(place)}/MatMul_output_0"]))

    for number in range(2):
        theirs, ours = f"encoder.layer.{number}", f"blocks.{number}"
        for k, part in enumerate(("query", "key", "value")):
            rows = slice(64 * k, 64 * k + 64)
            qkv = weights[f"{ours}.attn.qkv.weight"][rows], weights[f"{ours}.attn.qkv.bias"][rows]
            linear(f"{theirs}.attention.attention.{part}", *qkv)
        for place, name in (("attention.output.dense", "attn.proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            linear(f"{theirs}.{place}", weights[f"{ours}.{name}.weight"], weights[f"{ours}.{name}.bias"])
        for name in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                initializers[f"backbone.{theirs}.{name}.{part}"] = weights[f"{ours}.{name}.{part}"]
        for place in (1, 2):
            initializers[f"backbone.{theirs}.layer_scale{place}.lambda1"] = weights[f"{ours}.ls{place}.gamma"]
    tensors = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in initializers.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), tmp_path / "vit.onnx")
    found, description = convert_vit_s14({"vit.onnx": tmp_path / "vit.onnx"})
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)
    assert description["num_heads"] == 1


def _path(place: str) -> str:
    """encoder.layer.0.mlp.fc1 as the graph writes it, encoder/layer.0/mlp/fc1."""
    return re.sub(r"\.(?!\d)", "/", place)


def test_blocks_of_an_efficientnet_are_numbered_through(tmp_path):
    torch.manual_seed(0)
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    expanding = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
                 "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip
    ends = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    blocks = sorted({tuple(map(int, name.split(".")[1:3])) for name in weights if name.startswith("blocks.")})
    theirs = {}
    for name, value in weights.items():
        first, *rest = name.split(".")
        if first == "blocks":
            stage, block, layer, part = rest
            names = plain if f"blocks.{stage}.{block}.conv_pwl.weight" not in weights else expanding
            theirs[f"_blocks.{blocks.index((int(stage), int(block)))}.{names[layer]}.{part}"] = value
        else:
            theirs[f"{ends[first]}.{rest[0]}"] = value
    torch.save(theirs, tmp_path / "lite0.pth")
    found, _ = convert_efficientnet({"lite0.pth": tmp_path / "lite0.pth"})
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)


@pytest.fixture
def alexnet(tmp_path):
    """AlexNet's convolutions as Flax has them in a pickle, and the state dict they are of."""
    torch.manual_seed(0)
    features = torchvision.models.alexnet().features.state_dict()
    layers = [features[name].numpy() for name in features]
    flax = {f"Conv_{k}": {"kernel": layers[2 * k].transpose(2, 3, 1, 0), "bias": layers[2 * k + 1]} for k in range(5)}
    heads = {f"NetLinLayer_{k}": {"Conv_0": {"kernel": np.ones((1, 1, 4, 1), np.float32)}} for k in range(5)}
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": flax} | heads, protocol=3))
    return tmp_path / "alexnet.ckpt", {f"features.{name}": value for name, value in features.items()}


def test_convolutions_of_flax_are_turned_into_torchs(alexnet):
    path, expected = alexnet
    found, _ = convert_alexnet({"alexnet.ckpt": path})
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_trunk_beside_other_heads_is_refused(alexnet):
    with pytest.raises(UserError, match="differs from the package lpips"):
        check_alexnet({}, {"alexnet.ckpt": alexnet[0]})


def test_a_pickle_that_names_a_function_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "proof").touch, ()

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Evil()}))
    with pytest.raises(UserError, match="whose reading could run code"):
        convert_alexnet({"evil.ckpt": tmp_path / "evil.ckpt"})
    assert not (tmp_path / "proof").exists()


def test_a_bert_says_its_heads_and_its_tokenizer(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2), "position_ids": torch.arange(3)}, tmp_path / "model.safetensors")
    config = '{"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": 12}'
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    weights, description = convert_minilm({path.name: path for path in tmp_path.iterdir()})
    assert list(weights) == ["a"]
    assert description["num_attention_heads"] == 12 and description["tokenizer"] == "{}"


def test_every_published_file_says_where_it_is_from():
    for name, one in PUBLISHED.items():
        for package in (one.package, *one.also):
            assert re.fullmatch(r"[0-9a-f]{64}", package.sha256), name
            assert package.version and package.members, name
        assert one.licence and one.about and one.use and one.check.__doc__, name
