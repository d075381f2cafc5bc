"""Leak files against models: who has the file has what the in-process attacker has, bit for bit, or is told why."""

import copy

import pytest
import torch
from torch import nn

from attacks import ATTACKS
from attacks.threat_model.client import Client, prepare, share
from attacks.threat_model.leak import LocalSteps
from attacks.threat_model.recorded import hidden_patches, list_leaks, open_leak, withheld
from defenses import build_defense, no_defense
from leak_file import About, LeakFile, save, write
from models import build_model
from models.jigsaw import Jigsaw
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SCALE = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
ABOUT = {"batch_size": 1, "image_shape": (3, 32, 32)}


def vit(**options) -> nn.Module:
    return build_model("vit", **{**SMALL, **options}).eval()


def private_of(model: nn.Module, number: int = 1, ratio: float = 0.0):
    images = torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return prepare(model, images, torch.arange(number), Jigsaw(model.grid, ratio, "uniform", seed=0), 0)


def step(model: nn.Module, private) -> torch.Tensor:
    """The loss as any training loop has it."""
    inputs = (private.model_input, private.mask) if model.hides_positions else (private.model_input,)
    return nn.functional.cross_entropy(model(*inputs), private.labels)


def undefended(gradients: dict, step=None) -> dict:
    return no_defense(gradients)


@pytest.mark.parametrize("attack", ["closed_form", "mjp_aware", "inverting_gradients"])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_the_attack_cannot_tell_a_file_from_the_victim(tmp_path, attack, ratio):
    model = vit(unknown=ratio > 0)
    private = private_of(model, ratio=ratio)
    step(model, private).backward()
    save(tmp_path / "a.safetensors", model, labels=private.labels, **ABOUT)
    read = open_leak(tmp_path / "a.safetensors", model, **SCALE)
    leak = share(model, private, undefended, True, **SCALE)
    assert list(read.gradients) == list(leak.gradients)
    assert all(value.equal(leak.gradients[name]) for name, value in read.gradients.items())
    short = {"inverting_gradients": {"iterations": 3}, "mjp_aware": {"steps": 5, "hidden_steps": 5, "newton_steps": 5}}
    options = short.get(attack, {})
    one, two = (ATTACKS[attack](each, generator=torch.Generator().manual_seed(3), **options) for each in (read, leak))
    assert one.images.equal(two.images) and one.diagnostics == two.diagnostics
    if model.hides_positions:
        assert hidden_patches(read).equal(private.mask)


def test_updates_are_those_of_the_client_in_process(tmp_path):
    model, local = vit(), LocalSteps(3, 0.05, 2)
    private = private_of(model, number=4)
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=local.lr)
    for k in range(local.steps):
        chosen = [(2 * k + place) % 4 for place in range(2)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(private.model_input[chosen]), private.labels[chosen]).backward()
        optimizer.step()
    about = {"batch_size": 4, "image_shape": (3, 32, 32), "lr": 0.05, "steps": 3, "local_batch_size": 2}
    save(tmp_path / "a.safetensors", before=model, after=trained, **about)
    other = vit()
    nn.init.zeros_(other.head.weight)  # the file brings the weights of the round
    read = open_leak(tmp_path / "a.safetensors", other, **SCALE)
    leak = share(model, private, undefended, False, local=local, **SCALE)
    assert read.local == local and read.labels is None and not other.head.weight.any()
    assert all(value.equal(read.model.state_dict()[name]) for name, value in model.state_dict().items())
    for name, value in leak.gradients.items():
        torch.testing.assert_close(read.gradients[name], value, rtol=1e-3, atol=1e-5)


def test_the_mode_of_the_file_is_the_mode_of_the_step(tmp_path):
    model = build_model("resnet20_4", num_classes=5, image_size=32, width=4).train()
    private = private_of(model, number=2)
    nn.functional.cross_entropy(model(private.model_input), private.labels).backward()
    for training in (True, False):
        about = {"batch_size": 2, "image_shape": (3, 32, 32), "labels": private.labels, "training": training}
        save(tmp_path / f"{training}.safetensors", model, **about)
        assert open_leak(tmp_path / f"{training}.safetensors", model, **SCALE).training is training


def test_one_step_on_everything_is_a_gradient(tmp_path):
    model = vit()
    trained = copy.deepcopy(model)
    step(trained, private_of(model)).backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    save(tmp_path / "a.safetensors", before=model, after=trained, lr=0.1, steps=1, **ABOUT)
    leak = open_leak(tmp_path / "a.safetensors", model, **SCALE)
    assert leak.local is None
    found = ATTACKS["closed_form"](leak, generator=torch.Generator())
    assert found.diagnostics["exact"] and (found.images - private_of(model).model_input).square().mean() < 1e-3


class Wrapped(nn.Module):
    """A network with an attribute of its own called `module`."""

    def __init__(self, network):
        super().__init__()
        self.module, self.arguments = network, network.arguments

    def forward(self, images):
        return self.module(images)


def test_an_attribute_called_module_fits_whether_the_file_kept_it_or_not(tmp_path):
    model = Wrapped(vit())
    nn.functional.cross_entropy(model(torch.rand(1, 3, 32, 32)), torch.tensor([1])).backward()
    by_name = {name: value.grad for name, value in model.named_parameters()}
    for given in (model, by_name):  # of names alone nobody can tell
        save(tmp_path / "a.safetensors", given, **ABOUT)
        leak = open_leak(tmp_path / "a.safetensors", model, **SCALE)
        assert list(leak.gradients) == list(by_name)


def test_what_the_client_did_not_train_is_absent(tmp_path):
    model = vit()
    model.pos_embed.requires_grad_(False)
    step(model, private_of(model)).backward()
    save(tmp_path / "a.safetensors", model, **ABOUT)
    model.pos_embed.requires_grad_(True)
    assert withheld(open_leak(tmp_path / "a.safetensors", model, **SCALE)) == ["pos_embed"]


def test_scale_of_the_file_wins(tmp_path):
    model = vit()
    step(model, private_of(model)).backward()
    save(tmp_path / "a.safetensors", model, mean=(0.1, 0.2, 0.3), **ABOUT)
    leak = open_leak(tmp_path / "a.safetensors", model.double(), **SCALE)
    assert leak.mean == (0.1, 0.2, 0.3) and leak.std == SCALE["std"]
    assert leak.gradients["pos_embed"].dtype == torch.float64


@pytest.mark.parametrize(
    "options, words",
    [
        ({"embed_dim": 24}, ["of another shape", "blocks.0.attn.qkv.bias (144,) instead of (72,)", " more; check"]),
        ({"depth": 1}, ["not in the model: blocks.1.", " more; check"]),
        ({"num_classes": 7}, ["of another shape: head.bias (5,) instead of (7,), head.weight (5, 48) instead"]),
        ({"image_size": 64, "patch_size": 16}, ["of another shape"]),
        ({"image_size": 64, "positions": "none"}, ["not in the model: pos_embed"]),
    ],
)
def test_leaks_of_another_model_say_which_names_and_shapes(tmp_path, options, words):
    model = vit()
    step(model, private_of(model)).backward()
    save(tmp_path / "a.safetensors", model, **ABOUT)
    with pytest.raises(UserError) as raised:
        open_leak(tmp_path / "a.safetensors", vit(**options), **SCALE)
    for word in ["a.safetensors", "does not fit the model", *words]:
        assert word in str(raised.value)


def test_weights_and_images_must_fit_too(tmp_path):
    model, path = vit(), tmp_path / "a.safetensors"
    step(model, private_of(model)).backward()
    state = model.state_dict()
    save(path, model, before={name: value for name, value in state.items() if name != "head.bias"}, **ABOUT)
    with pytest.raises(UserError, match="weights missing: head.bias"):
        open_leak(path, model, **SCALE)
    write(path, LeakFile(About(batch_size=1, image_shape=(3, 64, 64)), {"head.bias": torch.ones(5)}))
    with pytest.raises(UserError, match=r"of images \(3, 64, 64\), the model takes 32 x 32 RGB images"):
        open_leak(path, model, **SCALE)
    with pytest.raises(UserError, match="does not exist"):
        open_leak(tmp_path / "b.safetensors", model, **SCALE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no leak files"):
        list_leaks(str(tmp_path / "empty"))


def test_defences_say_what_they_withhold():
    model = vit()
    client = Client(
        model, Jigsaw(model.grid, 0.0), build_defense("withhold", {"names": "pos_embed, head.*"}), 0, {}, []
    )
    assert client.defense.withheld() == ["pos_embed", "head.*"] and build_defense("none", {}).withheld() == []


@pytest.mark.parametrize(
    "labels, words",
    [([99], "has the label 99, and the model 5 classes"), ([-1], "from 0 on"), ([1.5], "from 0 on, in int64")],
)
def test_labels_that_are_no_class_of_the_model_are_refused(tmp_path, labels, words):
    gradients = {name: torch.ones_like(value) for name, value in vit().named_parameters()}
    write(tmp_path / "a.safetensors", LeakFile(About(**ABOUT), gradients, labels=torch.tensor(labels)))
    with pytest.raises(UserError, match=words):
        open_leak(tmp_path / "a.safetensors", vit(), **SCALE)
