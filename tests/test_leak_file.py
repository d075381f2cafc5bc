"""Leak files: what save and load promise, with nothing of the rest of the project."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from leak_file import About, LeakFile, LeakFileError, leak_text, load, read_about, save, write

ROOT = Path(__file__).parents[1]
ABOUT = {"batch_size": 2, "image_shape": (3, 8, 8)}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


def stepped() -> nn.Module:
    """A network after backward(), on two images."""
    model = network()
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(images), torch.tensor([3, 1])).backward()
    return model


def test_tensors_of_other_shapes_than_the_models_are_refused(tmp_path):
    model = stepped()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    flat = gradients | {"0.weight": gradients["0.weight"].flatten()}
    with pytest.raises(LeakFileError, match="gradients of '0.weight' have other shapes than the model has"):
        save(tmp_path / "a.safetensors", flat, model=model, **ABOUT)
    state = {name: value[..., None] for name, value in model.state_dict().items()}
    with pytest.raises(LeakFileError, match="weights after of .* have other shapes"):
        save(tmp_path / "a.safetensors", before=model, after=state, lr=0.1, steps=1, **ABOUT)
    assert not list(tmp_path.iterdir())


def test_a_header_of_any_length_is_no_pickle(tmp_path):
    """The first byte of a file is the lowest of its header's length, for one length in 32 that of a pickle."""
    seen = set()
    for length in range(0, 256, 8):
        save(tmp_path / "a.safetensors", stepped(), note="x" * length, **ABOUT)
        seen.add((tmp_path / "a.safetensors").read_bytes()[0])
        assert load(tmp_path / "a.safetensors").about.note == "x" * length
    assert 0x80 in seen


def test_numbers_nothing_computes_in_are_refused(tmp_path):
    gradients = {"w": torch.ones(4).to(torch.float8_e4m3fn)}
    for given in ({"gradients": gradients}, {"gradients": {"w": torch.ones(4)}, "before": gradients}):
        with pytest.raises(LeakFileError, match="'w' in torch.float8_e4m3fn, which nothing computes in: use float32"):
            save(tmp_path / "a.safetensors", **given, **ABOUT)
    write(tmp_path / "a.safetensors", LeakFile(About(**ABOUT), gradients))
    with pytest.raises(LeakFileError, match="use float32"):
        load(tmp_path / "a.safetensors")


def test_gradients_come_back_bit_for_bit(tmp_path):
    model = stepped()
    save(tmp_path / "a.safetensors", model, labels=[3, 1], mean=torch.tensor([0.5] * 3), std=(1, 1, 2), **ABOUT)
    leak = load(tmp_path / "a.safetensors")
    assert leak.gradients.keys() == {name for name, _ in model.named_parameters()} and not leak.before
    assert all(leak.gradients[name].equal(value.grad) for name, value in model.named_parameters())
    assert leak.labels.tolist() == [3, 1] and leak.labels.dtype == torch.int64
    expected = About(batch_size=2, image_shape=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(1, 1, 2))
    assert leak.about == expected == read_about(tmp_path / "a.safetensors")
    assert "gradients: 6 tensors" in leak_text(leak) and "labels: [3, 1]" in leak_text(leak)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_precision(tmp_path, dtype):
    gradients = {"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(dtype).T}
    save(tmp_path / "a.safetensors", gradients, **ABOUT)
    found = load(tmp_path / "a.safetensors").gradients["w"]
    assert found.dtype == dtype and found.equal(gradients["w"])


def test_updates_hold_state_dicts_with_buffers(tmp_path):
    before, after = network(), stepped()
    save(tmp_path / "a.safetensors", before=before, after=after.state_dict(), lr=0.1, steps=3, **ABOUT)
    leak = load(tmp_path / "a.safetensors")
    assert leak.is_update and leak.about.steps == 3 and leak.about.lr == 0.1
    for name, value in after.state_dict().items():
        assert leak.after[name].equal(value) and leak.before[name].equal(before.state_dict()[name])


def test_names_are_those_of_the_wrapped_model(tmp_path):
    gradients = {f"module._orig_mod.{name}": value.grad for name, value in stepped().named_parameters()}
    save(tmp_path / "a.safetensors", gradients, **ABOUT)
    assert "3.weight" in load(tmp_path / "a.safetensors").gradients


def test_the_file_is_safetensors_with_readable_facts(tmp_path):
    save(tmp_path / "a.safetensors", stepped(), note="round 7", **ABOUT)
    assert "gradient/3.bias" in load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["leak"])
    assert facts["format"] == "leak" and facts["version"] == 1 and facts["note"] == "round 7"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([{}, {}], "needs 'batch_size', 'image_shape'"),
        ([{"w": torch.ones(2)}, ABOUT | {"batch": 3}], "does not know 'batch'"),
        ([{"w": torch.zeros(2)}, ABOUT], "all zero: save after backward() and before zero_grad()"),
        ([{"w": torch.tensor([1.0, torch.nan])}, ABOUT], "NaN or infinity in 'w'"),
        ([None, ABOUT], "holds either gradients, or the weights before and after"),
        ([{"w": torch.ones(2)}, ABOUT | {"labels": [1]}], "labels have the shape (1,), not (2,)"),
        ([{"w": torch.ones(2)}, ABOUT | {"batch_size": 0}], "batch_size of a leak must be a number from 1 on, got 0"),
        ([{"w": torch.ones(2)}, ABOUT | {"image_shape": (3, 8)}], "image_shape of a leak must be three sizes"),
        (
            [{"w": torch.ones(2)}, ABOUT | {"batch_size": 10**9}],
            "batch_size of a leak must be a million images at most",
        ),
        ([{"w": torch.ones(2)}, ABOUT | {"std": (1, 1, 0)}], "std of a leak must be from 0.001 to 1000"),
        ([{"w": torch.ones(2)}, ABOUT | {"mean": (1, 1)}], "mean of a leak must be one number per channel"),
    ],
)
def test_what_no_attack_could_use_is_not_written(tmp_path, arguments, words):
    gradients, about = arguments
    with pytest.raises(LeakFileError) as raised:
        save(tmp_path / "a.safetensors", gradients, **about)
    assert words in str(raised.value) and not list(tmp_path.iterdir())


def test_updates_that_make_none(tmp_path):
    state, path = network().state_dict(), tmp_path / "a.safetensors"
    with pytest.raises(LeakFileError, match="the weights before and after are the same"):
        save(path, before=state, after=state, lr=0.1, steps=1, **ABOUT)
    with pytest.raises(LeakFileError, match="needs lr and steps"):
        save(path, before=state, after=stepped().state_dict(), **ABOUT)
    with pytest.raises(LeakFileError, match="have other names: '3.bias'"):
        save(path, before=state, after={k: v for k, v in state.items() if k != "3.bias"}, lr=1, steps=1, **ABOUT)
    with pytest.raises(LeakFileError, match="no parameter has a gradient"):
        save(path, network(), **ABOUT)
    with pytest.raises(LeakFileError, match="ends in .safetensors"):
        save(tmp_path / "a.pt", stepped(), **ABOUT)


def gradients_of(model: nn.Module) -> dict:
    return {name: value.grad for name, value in model.named_parameters()}


class Plain:
    """A number or an array of another library, which only knows numpy()."""

    def __init__(self, value):
        self.value = value

    def numpy(self):
        return self.value.numpy()


GIVEN = {
    "a tuple of torch.autograd.grad": lambda model: (tuple(gradients_of(model).values()), {"model": model}),
    "a list and its names": lambda model: (
        list(gradients_of(model).values()),
        {"model": list(gradients_of(model))},
    ),
    "pairs": lambda model: (list(gradients_of(model).items()), {}),
    "arrays by name": lambda model: ({k: v.numpy() for k, v in gradients_of(model).items()}, {}),
    "arrays in a list, as Flower's": lambda model: (
        [v.numpy() for v in gradients_of(model).values()],
        {"model": model},
    ),
    "arrays that run backwards": lambda model: (
        {k: v.flip(0).numpy()[::-1] for k, v in gradients_of(model).items()},
        {},
    ),
    "another library's": lambda model: ({k: Plain(v) for k, v in gradients_of(model).items()}, {}),
    "sparse": lambda model: ({k: v.to_sparse() for k, v in gradients_of(model).items()}, {}),
    "data parallel": lambda model: (nn.DataParallel(model), {}),
    "compiled": lambda model: (torch.compile(model), {}),
    "compiled and data parallel": lambda model: (nn.DataParallel(torch.compile(model)), {}),
    "names of FSDP": lambda model: ({f"_fsdp_wrapped_module.{k}": v for k, v in gradients_of(model).items()}, {}),
    "names of single compiled layers": lambda model: (
        {k.replace("3.", "3._orig_mod."): v for k, v in gradients_of(model).items()},
        {},
    ),
    "the names of a wrapped model": lambda model: (
        {f"module.{k}": v for k, v in gradients_of(model).items()},
        {"model": nn.DataParallel(model)},
    ),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_gradients_as_they_come_are_the_models(tmp_path, kind):
    model = stepped()
    given, more = GIVEN[kind](model)
    save(tmp_path / "a.safetensors", given, **more, **ABOUT)
    found = load(tmp_path / "a.safetensors").gradients
    assert list(found) == list(gradients_of(model)) or found.keys() == gradients_of(model).keys()
    assert all(found[name].equal(value) for name, value in gradients_of(model).items())


def test_frozen_layers_are_left_out(tmp_path):
    model = stepped()
    model[0].requires_grad_(False)
    model[0].weight.grad = model[0].bias.grad = None
    trained = [value.grad for value in model.parameters() if value.requires_grad]
    for given in (model, gradients_of(model), tuple(gradients_of(model).values()), trained):
        save(tmp_path / "a.safetensors", given, model=model, **ABOUT)
        assert sorted(load(tmp_path / "a.safetensors").gradients) == ["1.bias", "1.weight", "3.bias", "3.weight"]


def test_numbers_of_other_libraries_are_numbers(tmp_path):
    about = {"batch_size": torch.tensor(2), "image_shape": torch.ones(2, 3, 8, 8).shape[1:], "mean": 0.5}
    about |= {"std": np.float32(0.25), "lr": torch.tensor(0.5), "steps": np.int64(3), "local_batch_size": 1.0}
    about |= {"training": np.bool_(True)}
    save(tmp_path / "a.safetensors", stepped(), labels=np.array([3, 1]), **about)
    found = load(tmp_path / "a.safetensors")
    expected = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "lr": 0.5, "steps": 3, "local_batch_size": 1, "training": True}
    assert found.about == About(batch_size=2, image_shape=(3, 8, 8), **expected) and found.labels.tolist() == [3, 1]
    save(tmp_path / "a.safetensors", stepped(), labels=3, batch_size=1, image_shape=np.array([3, 8, 8]))
    assert load(tmp_path / "a.safetensors").labels.tolist() == [3]


def test_a_missing_folder_is_made(tmp_path):
    save(tmp_path / "round 7" / "client 3" / "a.safetensors", stepped(), **ABOUT)
    assert load(tmp_path / "round 7" / "client 3" / "a.safetensors").gradients
    with pytest.raises(LeakFileError, match="cannot write"):
        save(tmp_path / "round 7" / "client 3" / "a.safetensors" / "b.safetensors", stepped(), **ABOUT)


@pytest.mark.parametrize("as_list", [False, True])
def test_updates_of_the_trained_part_alone(tmp_path, as_list):
    """before is the whole state, as the server has it; after what the client sends back: what it trained."""
    before, after = network(), network()
    after[0].requires_grad_(False)
    after[3].bias.data += 1
    sent = {name: value.detach() for name, value in after.named_parameters() if value.requires_grad}
    given = [value.numpy() for value in sent.values()] if as_list else sent
    more = {"model": after} if as_list else {}
    save(tmp_path / "a.safetensors", before=before.state_dict(), after=given, lr=0.1, steps=1, **more, **ABOUT)
    found = load(tmp_path / "a.safetensors")
    assert found.before.keys() == found.after.keys() == before.state_dict().keys()
    assert [name for name in found.after if not found.after[name].equal(found.before[name])] == ["3.bias"]


def test_updates_as_lists_of_flower(tmp_path):
    before, after = network(), network()
    after[3].bias.data += 1
    lists = [[value.numpy() for value in model.state_dict().values()] for model in (before, after)]
    save(tmp_path / "a.safetensors", before=lists[0], after=lists[1], model=before, lr=0.1, steps=1, **ABOUT)
    assert load(tmp_path / "a.safetensors").after["3.bias"].equal(after[3].bias.detach())
    half = {name: value.half() for name, value in after.state_dict().items()}
    save(tmp_path / "a.safetensors", before=before, after=half, lr=0.1, steps=1, **ABOUT)  # sent with fewer digits
    assert load(tmp_path / "a.safetensors").after["3.bias"].dtype == torch.float32


class Module(nn.Module):
    """A network whose own attribute is called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = network()

    def forward(self, images):
        return self.module(images)


def test_an_attribute_called_module_is_the_networks_own(tmp_path):
    model = Module()
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    names = {name for name, _ in model.named_parameters()}
    for given, more in (
        (model, {}),
        (nn.DataParallel(model), {}),
        (gradients_of(model), {"model": model}),
        (gradients_of(nn.DataParallel(model)), {"model": model}),
        (tuple(gradients_of(model).values()), {"model": nn.DataParallel(model)}),
    ):
        save(tmp_path / "a.safetensors", given, **more, **ABOUT)
        assert load(tmp_path / "a.safetensors").gradients.keys() == names


@pytest.mark.parametrize(
    ("gradients", "more", "words"),
    [
        (lambda model: tuple(gradients_of(model).values()), {}, "list of gradients has no names: pass model="),
        (lambda model: list(gradients_of(model).values())[1:], {"model": network()}, "has 5 tensors, and other shapes"),
        (lambda model: [torch.ones(2)] * 6, {"model": network()}, "has 6 tensors, and other shapes"),
        (lambda model: [torch.ones(2)], {"model": ["a", "b"]}, "has 1 tensors, .* 2 names"),
        (lambda model: dict(model.named_parameters()), {}, "are parameters, not gradients: give their .grad"),
        (lambda model: {"w": None}, {}, "no parameter has a gradient"),
        (lambda model: {"w": "text"}, {}, "'w' is a str, not a tensor of numbers"),
        (lambda model: {3: torch.ones(2)}, {}, "named by text, not by 3"),
        (lambda model: {"w": torch.ones(2, dtype=torch.int8)}, {}, "no real numbers in 'w'"),
        (lambda model: {"w": torch.ones(2) + 0j}, {}, "no real numbers in 'w'"),
        (lambda model: {"w": torch.ones(0)}, {}, "empty or shards"),
        (lambda model: torch.ones(2), {}, "must be a model, a dict or a list of tensors, not a Tensor"),
        (lambda model: 3, {}, "must be a model, a dict or a list of tensors, not a int"),
        (lambda model: model, {"mean": (123.7, 116.3, 103.5)}, "mean of a leak must be from 0 to 1"),
        (lambda model: model, {"batch_size": 2.5}, "batch_size of a leak must be a number from 1 on"),
        (lambda model: model, {"image_shape": 3}, "image_shape of a leak must be three sizes"),
        (lambda model: model, {"labels": ["cat", "dog"]}, "labels must be one class number per image"),
        (lambda model: model, {"labels": [0.5, 1]}, "labels must be one class number per image"),
        (lambda model: model, {"lr": "fast"}, "lr of a leak must be a number above 0"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_not_written(tmp_path, gradients, more, words):
    with pytest.raises(LeakFileError, match=words) as raised:
        save(tmp_path / "new" / "a.safetensors", gradients(stepped()), **(ABOUT | more))
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_files_of_earlier_versions_are_read(tmp_path):
    """Written by the first version of this file: the same format, whatever save() takes now."""
    tensors = {"gradient/w": torch.tensor([1.0, 2.0]), "labels": torch.tensor([1])}
    text = '{"format": "leak", "version": 1, "batch_size": 1, "image_shape": [3, 8, 8], "mean": null, "std": null, '
    text += '"loss": "cross_entropy", "training": false, "masked": null, "lr": null, "steps": null, '
    text += '"local_batch_size": null, "note": ""}'
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].view(torch.uint8).numpy())
    save_file(tensors, tmp_path / "a.safetensors", {"leak": text, "sha256": digest.hexdigest()})
    assert load(tmp_path / "a.safetensors").gradients["w"].tolist() == [1.0, 2.0]


def broken(kind: str, path: Path) -> None:
    """Write a leak file and spoil it."""
    save(path, stepped(), **ABOUT)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[:-10])
    elif kind == "flipped":
        path.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    elif kind == "description":
        path.write_bytes(content.replace(b'batch_size\\": 2', b'batch_size\\": 1'))
    elif kind == "pickle":
        torch.save(dict(stepped().named_parameters()), path)
    elif kind == "no leak":
        save_file({"w": torch.ones(2)}, path)
    elif kind == "text":
        path.write_text("not a leak")
    elif kind == "zero":
        write(path, LeakFile(About(**ABOUT), {"w": torch.zeros(2)}))
    elif kind == "missing":
        path.unlink()


BROKEN = {
    "truncated": "is truncated or not a leak file",
    "flipped": "was changed since it was written: its checksum does not fit",
    "description": "was changed since it was written: its checksum does not fit",
    "pickle": "is a pickle, which can run code when it is opened: refused",
    "no leak": "holds tensors but does not say of what",
    "text": "is truncated or not a leak file",
    "zero": "the gradients are all zero",
    "missing": "does not exist",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_say_how(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    broken(kind, path)
    with pytest.raises(LeakFileError) as raised:
        load(path)
    assert BROKEN[kind] in str(raised.value) and str(path) in str(raised.value)


def test_a_file_can_be_looked_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["leak_file.py", str(tmp_path / "a.safetensors")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "leak_file.py"), run_name="__main__")
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: leak file ")
    save(tmp_path / "a.safetensors", stepped(), **ABOUT)
    runpy.run_path(str(ROOT / "leak_file.py"), run_name="__main__")
    assert "0.weight (4, 3, 3, 3)" in capsys.readouterr().out


def test_later_versions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("leak_file.VERSION", 2)
    save(tmp_path / "a.safetensors", stepped(), **ABOUT)
    monkeypatch.undo()
    with pytest.raises(LeakFileError, match="later version than 1"):
        load(tmp_path / "a.safetensors")


def test_the_file_stands_alone(tmp_path):
    """Copied beside a script it imports torch and safetensors, and nothing of this repository."""
    (tmp_path / "leak_file.py").write_text((ROOT / "leak_file.py").read_text())
    check = "import leak_file, sys; print(sorted({'attacks', 'models', 'utils', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
