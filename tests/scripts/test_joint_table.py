"""What scripts/joint_table.py measures of the joint attack."""

import torch

from scripts.joint_cases import SMALL, Case
from scripts.joint_table import decibels_of_set, measure
from scripts.joint_victims import victims


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
