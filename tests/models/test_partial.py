"""Parts of a network that clients train: the right parameters, and modules that start as the network was."""

import json

import pytest
import torch

from attacks.threat_model.recorded import open_leak
from attacks.threat_model.sharing import SHARES
from leak_file import save
from models import build_model
from models.lora import LoraLinear
from models.partial import Adapters, Lora, head_of
from utils.errors import UserError

VIT = {"image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def trained(model) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("part", SHARES)
def test_a_part_starts_as_the_network_it_is_put_in(part):
    model, images = build_model("vit", **VIT).eval(), torch.rand(2, 3, 16, 16)
    shared = SHARES[part]().apply(model, 0)
    assert torch.equal(shared(images), model(images))
    assert trained(model) == {name for name, _ in model.named_parameters()}  # the model itself is not changed


def test_each_part_trains_what_it_says():
    model = build_model("vit", **VIT)
    assert trained(SHARES["head"]().apply(model, 0)) == {"head.weight", "head.bias"}
    assert trained(model) - trained(SHARES["without_positions"]().apply(model, 0)) == {"pos_embed"}
    names = trained(Lora(rank=4).apply(model, 0))
    assert "blocks.0.attn.qkv.lora_a" in names and all(
        name.rpartition(".")[2] in ("lora_a", "lora_b") for name in names
    )
    names = trained(Adapters(rank=4, train_head=True).apply(model, 0))
    assert "head.bias" in names and "blocks.1.adapter.up.weight" in names and "norm.weight" not in names


def test_lora_adds_the_scaled_product_and_its_first_matrix_has_no_gradient_at_first():
    layer = torch.nn.Linear(6, 5)
    lora, inputs = LoraLinear(layer, 2, alpha=8.0, b_std=0.3), torch.rand(3, 6)
    torch.testing.assert_close(lora(inputs), layer(inputs) + 4.0 * inputs @ lora.lora_a.T @ lora.lora_b.T)
    first = LoraLinear(layer, 2, alpha=8.0, b_std=0.0)
    first(inputs).sum().backward()
    assert not first.lora_a.grad.any() and first.lora_b.grad.any()


PEFT = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "fc1"], "modules_to_save": ["head"], "bias": "none"}


@pytest.mark.parametrize(("more", "scale"), [({}, 2.0), ({"use_rslora": True, "modules_to_save": None}, 4.0)])
def test_rank_scale_and_layers_come_from_the_configuration_of_peft(tmp_path, more, scale):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | more))
    model = Lora(config=str(tmp_path)).apply(build_model("vit", **VIT), 0)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    assert set(layers) == {f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "mlp.fc1")}
    assert {(len(layer.lora_a), layer.scaling) for layer in layers.values()} == {(4, scale)}
    assert ("head.bias" in trained(model)) == (not more)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"r": 4}, {}, "it has no 'lora_alpha'"),
        (PEFT | {"r": "many"}, {}, "invalid literal for int"),
        (PEFT | {"use_dora": True}, {}, "has use_dora: only a plain LoRA"),
        (PEFT | {"layers_to_transform": 0}, {}, "has layers_to_transform: only a plain LoRA"),
        (PEFT | {"target_modules": "all-linear"}, {}, "a pattern: only a plain LoRA"),
        (PEFT | {"modules_to_save": ["norm"]}, {}, "trains norm whole"),
        (PEFT, {"alpha": 8.0}, "config says alpha already"),
        (PEFT | {"peft_type": "ADALORA"}, {}, "is an adapter of kind ADALORA: only a plain LoRA"),
        (PEFT | {"init_lora_weights": "pissa_niter_4"}, {}, "has init_lora_weights: only a plain LoRA"),
        (PEFT | {"target_modules": ["qkv", "proj"]}, {}, "a LoRA beside 'patch_embed.proj', a Conv2d: only linear"),
    ],
)
def test_configurations_of_peft_that_do_not_fit_are_one_line(tmp_path, config, options, words):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        Lora(config=str(tmp_path), **options).apply(build_model("vit", **VIT), 0)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_dropout_of_an_adapter_is_kept_for_who_reads_its_gradient(tmp_path):
    for dropout in (0.0, 0.1):
        (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT | {"lora_dropout": dropout}))
        assert Lora(config=str(tmp_path)).apply(build_model("vit", **VIT), 0).lora_dropout == dropout


@pytest.mark.parametrize("part", [SHARES["head"](), Lora(rank=4, b_std=0.1), Adapters(rank=4)])
def test_leak_files_of_a_part_are_read_with_the_same_part(part, tmp_path):
    model = part.apply(build_model("vit", **VIT), 0)
    torch.nn.functional.cross_entropy(model(torch.rand(2, 3, 16, 16)), torch.tensor([0, 1])).backward()
    save(tmp_path / "leak.safetensors", model, batch_size=2, image_shape=(3, 16, 16))
    leak = open_leak(tmp_path / "leak.safetensors", model, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert leak.gradients.keys() == trained(model)
    assert all(torch.equal(value, model.get_parameter(name).grad) for name, value in leak.gradients.items())


def test_the_head_of_a_network_is_found_by_its_classes():
    assert head_of(build_model("lenet", num_classes=5)) == "fc"


@pytest.mark.parametrize(
    "part, model, words",
    [
        (Lora(rank=25), "vit", "the rank of LoRA must be from 1 to 24"),
        (Lora(targets="*.nothing"), "vit", "no linear layer of this VisionTransformer is called like '*.nothing'"),
        (Adapters(rank=0), "vit", "the rank of adapters must be from 1 to the embedding dimension 24, got 0"),
        (Adapters(), "lenet", "adapters go behind the blocks of a ViT, and this ConvolutionalNet has none"),
        (SHARES["without_positions"](), "lenet", "has no position embeddings to keep"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, model, words):
    with pytest.raises(UserError) as error:
        part.apply(build_model(model, **(VIT if model == "vit" else {"num_classes": 5})), 0)
    assert words in str(error.value)
