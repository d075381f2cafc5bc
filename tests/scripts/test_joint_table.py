"""What scripts/joint_table.py measures of the joint attack."""

import torch

from models.jigsaw import patchify
from scripts.joint_table import PATCHES, SMALL, Case, decibels_of_set, measure, victims


def test_a_set_keeps_its_exact_patches_when_another_is_wrong():
    true = torch.zeros(2, 12, dtype=torch.float64)
    true[1] = 0.1
    found = torch.stack([true[0], torch.full_like(true[0], -0.9)])  # the wrong one is nearer to the first
    assert (decibels_of_set(found, true) > 60).tolist() == [True, False]
    assert (decibels_of_set(true.flip(0), true) > 300).all()


def test_patches_of_a_batch_and_of_a_masked_image_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.joint_table.victims", lambda case, number, *_: victims(case, number, None))
    told = measure(Case(1, SMALL, mask_ratio=0.4, dtype="float64", side=40), 0, tmp_path, None)
    assert told["visible_above_60"] == told["hidden_above_60"] == 1.0 and told["overclaimed"] == 0
    told = measure(Case(2, SMALL, side=24), 0, tmp_path, None)
    assert told["in_place_above_60"] == told["set_above_60"] == 1.0


def test_pictures_of_mixtures_have_the_patches_they_are_named_for():
    rank, total = {}, 3 * 16
    for kind in PATCHES:
        _, private = victims(Case(3, SMALL, side=32, shown=kind), 0, None)
        patches = patchify(private.model_input.double(), 8).flatten(0, 1)
        values = torch.linalg.svdvals(patches)
        rank[kind] = int((values > 1e-5 * values[0]).sum())
    assert rank["random"] == rank["faint"] == total
    assert (rank["greys"], rank["colours"], rank["two greys"], rank["few"]) == (2, 3, 2, 5) and rank["ramp"] <= 9
