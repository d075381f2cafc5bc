"""train.py and the others on packed sets, and with a part of the augmentation on the device."""

import itertools
import json
import runpy
import signal
import sys

import pytest
import torch


@pytest.fixture
def shards(images, tmp_path, monkeypatch):
    """The small images, packed."""
    monkeypatch.setattr(sys, "argv", ["", "--images", str(images), "--output", str(tmp_path / "shards")])
    runpy.run_path("scripts/prepare_shards.py", run_name="under_test")["main"]()
    return tmp_path / "shards"


def weights(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def assert_same(one: dict, other: dict) -> None:
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_all_scripts_give_the_same_bits_on_shards(trained, call, tiny, images, shards, tmp_path):
    packed = ("--data.dataset", "shards", "--data.path", shards)
    assert call("train.py", *tiny, *packed, "--data.workers", 2, "--output", tmp_path / "run").status == 0
    assert_same(weights(trained), weights(tmp_path / "run"))
    options = ("--checkpoint", trained / "last.pt", "--mask_ratios", "0.5", "--device", "cpu", "--data.workers", 0)
    for script in ("eval.py", "consistency.py"):
        found = []
        for number, data in enumerate((("--data.path", images), packed)):
            output = tmp_path / f"{script}{number}"
            assert call(script, *options, *data, "--output", output).status == 0
            found.append(json.loads((output / "results.json").read_text()))
        assert found[0] == found[1]


def test_split_trains_the_same_model_but_for_the_noise(call, tiny, tmp_path):
    plain = ("--augment.erasing", 0, "--augment.crop", "resized")
    for where in ("loader", "split"):
        options = (*plain, "--augment.where", where, "--output", tmp_path / where)
        assert call("train.py", *tiny, *options).status == 0
    assert_same(weights(tmp_path / "loader"), weights(tmp_path / "split"))


def test_device_augmentation_resumes_exactly(call, tiny, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch, where SIGTERM would be noticed."""
    options = (*tiny, "--augment.where", "device", "--augment.crop", "resized", "--output")
    assert call("train.py", *options, tmp_path / "straight", "--data.workers", 2).status == 0
    with monkeypatch.context() as patch:
        looks = itertools.count()
        patch.setattr(
            "training.trainer.StopSignal.received",
            property(lambda _: signal.SIGTERM if next(looks) >= 9 else 0),
            raising=False,
        )
        patch.setattr("training.trainer.StopSignal.__init__", lambda _: None)
        stopped = call("train.py", *options, tmp_path / "broken", "--resume", "auto")
    assert stopped.status == 143 and "state saved at epoch 1, step 2" in stopped.err
    assert call("train.py", *options, tmp_path / "broken", "--resume", "auto").status == 0
    assert_same(weights(tmp_path / "straight"), weights(tmp_path / "broken"))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--augment.where", "gpu"], ["augment.where", "gpu"]),
        (["--augment.where", "device", "--augment.rand_augment", "augmix-m3"], ["only policies named rand-"]),
        (["--augment.where", "device", "--augment.rand_augment", "null"], ["--augment.color_jitter 0"]),
        (["--data.dataset", "shards"], ["holds no shards", "scripts/prepare_shards.py"]),
        (["--data.dataset", "cache"], ["has no val.npy", "--cache SIDE"]),
    ],
)
def test_wrong_input(call, tiny, tmp_path, options, words):
    outcome = call("train.py", *tiny, *options, "--output", tmp_path / "run")
    lines = outcome.err.strip().splitlines()
    assert outcome.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome
    assert all(word in lines[0] for word in words), lines[0]
