"""The benchmarks measure what they say: equal work on both sides, ratios the right way up."""

import pytest
import torch

from benchmarks.interleaved_timing import Table, interleave
from benchmarks.training import batch, official_shuffle, ours, plain
from models.jigsaw import Jigsaw, shuffle_patches


def test_candidates_take_turns_in_rotating_order():
    seen = []
    times = interleave({name: (lambda name=name: seen.append(name)) for name in "ab"}, 2, repeat=2)
    assert "".join(seen) == "ab" + "aabb" + "bbaa"
    assert [len(times[name]) for name in "ab"] == [2, 2]


def test_ratios_are_medians_of_the_same_round(tmp_path, capsys):
    table, times = Table(3), {"one": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]}
    assert table.add("gain", times, "one", "other") == 2
    assert table.add("overhead", times, "one", "other", overhead=True) == 0.5
    assert table.rows[0]["quartiles"] == [1.5, 2.5]


def test_the_official_shuffle_is_ours_by_detours():
    images = batch(2).images
    mask, source = Jigsaw((14, 14), 0.3, seed=1).draw()
    assert official_shuffle(images, Jigsaw((14, 14), 0.3, seed=1)).equal(shuffle_patches(images, source, 16))


def test_both_steps_train_the_same_model():
    """With the jigsaw off, timm's loop and our trainer take the same steps from the same weights."""
    images, device = batch(1), torch.device("cpu")
    one, other = plain("deit_tiny", images, device), ours("deit_tiny", images, device, ratio=0.0)
    one.model.load_state_dict(other.model.state_dict())
    losses = [[float(step()) for _ in range(3)] for step in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][2] < losses[0][0]
