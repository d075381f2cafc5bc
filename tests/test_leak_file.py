"""Leak files: what save and load promise, with nothing of the rest of the project."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from leak_file import About, LeakFile, LeakFileError, describe, load, read_about, save, write

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


def test_gradients_come_back_bit_for_bit(tmp_path):
    model = stepped()
    save(tmp_path / "a.safetensors", model, labels=[3, 1], mean=torch.tensor([0.5] * 3), std=(1, 1, 2), **ABOUT)
    leak = load(tmp_path / "a.safetensors")
    assert leak.gradients.keys() == {name for name, _ in model.named_parameters()} and not leak.before
    assert all(leak.gradients[name].equal(value.grad) for name, value in model.named_parameters())
    assert leak.labels.tolist() == [3, 1] and leak.labels.dtype == torch.int64
    expected = About(batch_size=2, image_shape=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(1, 1, 2))
    assert leak.about == expected == read_about(tmp_path / "a.safetensors")
    assert "gradients: 6 tensors" in describe(leak) and "labels: [3, 1]" in describe(leak)


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
        ([{"w": torch.ones(2)}, ABOUT | {"std": (1, 1, 0)}], "std of a leak must be above 0"),
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
