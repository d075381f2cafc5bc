"""Who took part, from the gradient of one layer; and leak files with the names that peft gives to LoRA."""

import copy

import pytest
import torch

from attacks.membership import distances, span_of
from attacks.threat_model.client import prepare, share
from attacks.threat_model.recorded import open_leak
from leak_file import save
from models import build_model
from models.jigsaw import Jigsaw
from models.partial import All, Head, Lora
from utils.errors import UserError

SCALE = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
VIT = {"image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 12}
LORA = {"rank": 40, "b_std": 0.02}


def leak_of(part: All, number: int, **terms):
    """Return (private pictures, what one step on them shares, other pictures)."""
    model = part.apply(build_model("vit", **VIT).eval(), 0)
    pictures = torch.rand(number + 20, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    private = prepare(model, pictures[:number], torch.arange(number) % 12, Jigsaw(model.grid, 0.0, seed=0), 0)
    leak = share(model, private, lambda gradients, step: gradients, False, **SCALE, **terms)
    return pictures[:number], leak, pictures[number:]


@pytest.mark.parametrize(
    "part, number, layer, inputs",
    [(Head(), 5, "head", 1), (Lora(**LORA), 1, "blocks.0.attn.qkv", 17), (All(), 1, "head", 1)],
)
def test_members_lie_in_the_span_of_the_layer_that_is_shared(part, number, layer, inputs):
    members, leak, others = leak_of(part, number)
    span = span_of(leak)
    assert (span.layer, span.inputs, len(span.rows)) == (layer, number * inputs, number * inputs)
    near, away = (distances(span, leak.model, some.split(3)) for some in (members, others))
    assert near.shape == (number,) and near.max() < 1e-3 and 20 * near.max() < away.min()


def test_another_layer_may_be_asked():
    members, leak, others = leak_of(Lora(**LORA), 1)
    span = span_of(leak, "blocks.0.mlp.fc1")
    near, away = (distances(span, leak.model, [some]) for some in (members, others))
    assert span.layer == "blocks.0.mlp.fc1" and near.max() < 0.1 * away.min()


@pytest.mark.parametrize(
    "part, number, layer, words",
    [
        (All(), 3, "blocks.0.attn.qkv", "51 inputs of 'blocks.0.attn.qkv' span all of its 49"),
        (Lora(rank=8), 1, None, "is zero (LoRA's first matrix is until"),
        (Head(), 5, "haed", "did you mean 'head'"),
    ],
)
def test_layers_that_tell_nothing_are_refused_in_one_line(part, number, layer, words):
    with pytest.raises(UserError) as error:
        span_of(leak_of(part, number)[1], layer)
    assert words in str(error.value)


def peft_names_fit(folder, model) -> bool:
    """Return whether a leak opens with a network whose own names are peft's, as peft itself makes it."""
    network = torch.nn.Module()
    network.base_model = torch.nn.Module()
    network.base_model.model = copy.deepcopy(model)
    network.arguments = model.arguments
    gradients = {name: torch.ones_like(value) for name, value in network.named_parameters()}
    save(folder / "own.safetensors", gradients, batch_size=1, image_shape=(3, 16, 16), **SCALE)
    return open_leak(folder / "own.safetensors", network, **SCALE).gradients.keys() == gradients.keys()


@pytest.mark.parametrize("adapter", [".default", ""])
def test_a_leak_of_peft_is_one_of_our_lora(tmp_path, adapter):
    """The names are those of peft 0.21: get_peft_model's, and without the adapter's those of its state dict."""
    members, leak, others = leak_of(Lora(**LORA, train_head=True), 1)

    def peft(name: str) -> str:
        if ".lora_" in name:
            return f"base_model.model.{name[:-1]}{name[-1].upper()}{adapter}.weight"
        if name.startswith("head."):
            return f"base_model.model.head.modules_to_save.default.{name.removeprefix('head.')}"
        inside = [".attn.qkv.", ".attn.proj.", ".fc1.", ".fc2."]
        return "base_model.model." + next((name.replace(p, f"{p}base_layer.") for p in inside if p in name), name)

    before = {peft(name): value for name, value in leak.model.state_dict().items()}
    before |= {f"base_model.model.head.original_module.{part}": torch.zeros(1) for part in ("weight", "bias")}
    gradients = {peft(name): value for name, value in leak.gradients.items()}
    about = {"batch_size": 1, "image_shape": (3, 16, 16)}
    save(tmp_path / "peft.safetensors", gradients, before=before, **about, **SCALE)
    blank = Lora(**LORA, train_head=True).apply(build_model("vit", seed=9, **VIT).eval(), 3)
    opened = open_leak(tmp_path / "peft.safetensors", blank, **SCALE)
    assert opened.gradients.keys() == leak.gradients.keys()
    assert all(opened.gradients[name].equal(value) for name, value in leak.gradients.items())
    span = span_of(opened, "blocks.0.attn.qkv")
    near, away = (distances(span, opened.model, [some]) for some in (members, others))
    assert peft_names_fit(tmp_path, leak.model)
    assert near.max() < 0.1 * away.min()


def test_leaks_of_two_adapters_of_peft_are_refused_in_one_line(tmp_path):
    _, leak, _ = leak_of(Lora(**LORA), 1)
    names = {name: f"{name[:-1]}{name[-1].upper()}" for name in leak.gradients}  # ...lora_a -> ...lora_A
    gradients = {
        f"base_model.model.{peft}.{adapter}.weight": leak.gradients[name]
        for name, peft in names.items()
        for adapter in ("default", "second")
    }
    save(tmp_path / "two.safetensors", gradients, batch_size=1, image_shape=(3, 16, 16), **SCALE)
    with pytest.raises(UserError) as error:
        open_leak(tmp_path / "two.safetensors", leak.model, **SCALE)
    assert "holds two adapters of peft ('blocks.0.attn.proj.lora_a' twice)" in str(error.value)
