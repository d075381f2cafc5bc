"""models/archives.py: checkpoint files made to do harm are refused in one line, before memory is given to them."""

import json
import os
import pickle
import random
import resource
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from models import build_model
from models.checkpoints import load_model, read_checkpoint, save_checkpoint
from models.unpickling import unpickle_arrays
from utils.errors import UserError

LONG = int(os.environ.get("FUZZ", 1))
SHAPE = {"image_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "num_classes": 3}


def content(**changes) -> dict:
    model = build_model("vit", **SHAPE)
    return {"arguments": model.arguments, "model": model.state_dict(), "normalize": None, "classes": None} | changes


def refused(path: Path, *words: str) -> None:
    """In one line that names the file, and without allocating much more than the file has."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        load_model(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()
    assert any(word in str(error.value) for word in words), error.value
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_an_archive_that_unpacks_to_more_than_itself(tmp_path):
    """A 'zip bomb': a gigabyte of zeros in a megabyte."""
    save_checkpoint(tmp_path / "good.pt", content())
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in good.infolist():
            data = good.read(entry)
            if entry.filename.endswith("data/0"):
                with bomb.open(zipfile.ZipInfo(entry.filename), "w", force_zip64=True) as file:
                    file.write(data)
            else:
                bomb.writestr(entry, data)
        info = zipfile.ZipInfo("archive/data/999")
        info.compress_type = zipfile.ZIP_DEFLATED
        with bomb.open(info, "w", force_zip64=True) as file:
            for _ in range(300):
                file.write(bytes(1 << 20))
    assert (tmp_path / "bomb.pt").stat().st_size < 1_000_000
    refused(tmp_path / "bomb.pt", "unpacks to 314")


@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_tensors_that_declare_more_than_the_file_holds(tmp_path):
    """One stored value, viewed as a billion."""
    huge = torch.zeros(1).expand(200_000, 200_000)
    for name, weights in {
        "own.pt": content(model=content()["model"] | {"head.weight": huge}),
        "timm.pth": content()["model"] | {"head.weight": huge},
        "sparse.pth": {"model": {"head.weight": torch.sparse_coo_tensor(size=(10**6, 10**6))}},
    }.items():
        if name == "own.pt":
            save_checkpoint(tmp_path / name, weights)
        else:
            torch.save(weights, tmp_path / name)
        refused(tmp_path / name, "declares", "sparse")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"embed_dim": 10**7}, "different shape"),
        ({"num_classes": 10**9}, "different shape"),
        ({"image_size": 8 * 10**4}, "checkpoint"),
        ({"depth": 10**9}, "depth"),
        ({"depth": "many"}, "depth"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"name": "../../etc"}, "unknown model"),
        ({"embed_dim": float("nan")}, "checkpoint"),
        ({"num_heads": 0}, "checkpoint"),
        ({"patch_size": 0}, "checkpoint"),
    ],
)
def test_a_description_of_another_model_than_the_weights_are_of(tmp_path, changes, word):
    save_checkpoint(tmp_path / "own.pt", content(arguments=content()["arguments"] | changes))
    tracemalloc.start()
    with pytest.raises(UserError, match=word):
        load_model(tmp_path / "own.pt")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"arguments": None},
        {"arguments": [1]},
        {"arguments": {3: 4}},
        {"model": None},
        {"model": [1]},
        {"model": {"head.weight": 3}},
        {"normalize": [1, 2]},
        {"normalize": {"mean": (0, 0, 0), "std": (1, 0, 1)}},
        {"normalize": {"mean": (0, 0, 0), "std": (1, float("inf"), 1)}},
        {"normalize": {"mean": "abc", "std": "abc"}},
        {"classes": "abc"},
        {"classes": [1, 2, 3]},
    ],
)
def test_fields_of_the_wrong_kind(tmp_path, changes):
    save_checkpoint(tmp_path / "own.pt", content(**changes))
    refused(tmp_path / "own.pt", "checkpoint")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pos_embed", torch.zeros(3)),
        ("pos_embed", torch.zeros(1, 0, 64)),
        ("head.weight", torch.zeros(())),
        ("head.weight", torch.zeros(3, 64, dtype=torch.complex64)),
        ("patch_embed.proj.weight", torch.zeros(64, 3)),
        ("patch_embed.proj.weight", torch.zeros(0, 3, 8, 8)),
        ("patch_embed.proj.weight", torch.zeros(64, 3, 0, 0)),
        (3, torch.zeros(3)),
    ],
)
def test_weights_of_odd_shapes_and_kinds(tmp_path, key, value):
    torch.save({"model": content()["model"] | {key: value}}, tmp_path / "timm.pth")
    try:
        load_model(tmp_path / "timm.pth")
    except UserError as error:
        assert str(tmp_path) in str(error) and str(error).isprintable()
    else:
        assert key == 3 or value.is_complex()


def safetensors_file(path: Path, header: dict | bytes, length: int | None = None, data: bytes = b"\0" * 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({"head.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}, None),
        ({"head.weight": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}}, None),
        ({"head.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 64]}}, None),
        ({"head.weight": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}, None),
        ({"head.weight": {"dtype": "X9", "shape": [16], "data_offsets": [0, 64]}}, None),
        ({}, 2**63),
        (b"{" * 100, None),
    ],
)
def test_safetensors_with_headers_that_lie(tmp_path, header, length):
    refused(safetensors_file(tmp_path / "a.safetensors", header, length), "truncated or not a checkpoint")


def test_a_changed_byte_is_noticed_in_our_own_files(tmp_path):
    """A damaged disk: torch reads such a file without complaint."""
    path = tmp_path / "own.pt"
    save_checkpoint(path, content())
    whole, weight = path.read_bytes(), content()["model"]["blocks.0.mlp.fc1.weight"].numpy().tobytes()
    place = whole.index(weight) + 1000
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert torch.load(path, weights_only=True)["format"] == "mjp"
    refused(path, "has changed since it was written")


def test_references_in_circles(tmp_path):
    circle = [1]
    circle.append(circle)
    save_checkpoint(tmp_path / "own.pt", content(more=circle))
    assert load_model(tmp_path / "own.pt").arguments["embed_dim"] == 64
    laughs = ["x"]
    for _ in range(60):
        laughs = [laughs, laughs]
    save_checkpoint(tmp_path / "own.pt", content(classes=laughs))
    refused(tmp_path / "own.pt", "list of names")


@settings(max_examples=40 * LONG, deadline=None, database=None)
@given(st.sampled_from(["own.pt", "timm.pth", "legacy.pth", "model.safetensors"]), st.integers(0, 2**32))
def test_any_bytes_are_a_checkpoint_or_refused(tmp_path_factory, name, seed):
    folder, rng = tmp_path_factory.getbasetemp() / "checkpoints", random.Random(seed)
    if not folder.exists():
        folder.mkdir()
        save_checkpoint(folder / "own.pt", content())
        torch.save({"model": content()["model"]}, folder / "timm.pth")
        torch.save({"model": content()["model"]}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
        save_file(content()["model"], folder / "model.safetensors")
    data = bytearray((folder / name).read_bytes())
    for _ in range(rng.randint(1, 6)):
        place = rng.choice([rng.randrange(len(data)), rng.randrange(3000), len(data) - 1 - rng.randrange(3000)])
        data[place] = rng.randrange(256)
    path = folder / f"fuzz {name}"
    path.write_bytes(data[: rng.randrange(len(data)) if rng.random() < 0.2 else None])
    try:
        assert isinstance(read_checkpoint(path), dict)
        load_model(path)
    except UserError as error:
        assert str(path) in str(error) and str(error).isprintable()


def test_a_pickle_of_arrays_keeps_its_dicts_and_lists(tmp_path):
    content = {"layers": {"a": np.arange(6.0).reshape(2, 3), "depth": 2}, "means": [np.float32([1, 2]), "rgb"]}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content))
    found = unpickle_arrays(tmp_path / "weights.pkl")
    assert found["layers"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["layers"]["depth"] == 2
    assert found["means"][0].tolist() == [1, 2] and found["means"][1] == "rgb"
