"""What the equations of a masked image hold (scripts/joint_limits.py), where it is known."""

from dataclasses import replace

import pytest

from scripts.joint_cases import SMALL, Case
from scripts.joint_limits import beside, measure
from scripts.joint_victims import victims

MASKED = Case(1, SMALL, mask_ratio=0.4, side=40)  # 25 patches


def test_single_precision_holds_a_small_image_and_bfloat16_does_not():
    told = measure(*victims(MASKED, 0, None))
    assert told["visible"] == told["hidden"] == 1.0 and told["resolved"] == told["tokens"] == 26
    coarse = measure(*victims(replace(MASKED, sent="bfloat16"), 0, None))
    assert coarse["visible"] < 0.5 and coarse["hidden"] < 0.5


def test_ranks_are_those_of_the_photographs_that_both_files_have():
    rows = [{"resolved": number, "visible": 0.1 * number, "hidden": -number} for number in (1, 2, 3, 4)]
    found = [{"visible_above_55": share, "hidden_above_55": share} for share in (0.2, 0.3, 0.9)]
    told = beside(rows, found)
    assert told["n"] == 3 and told["visible found, resolved"] == pytest.approx(1)
    assert told["hidden found, held"] == pytest.approx(-1)
    assert beside(rows, found[:2]) == {"n": 2}


def test_what_is_held_is_measured_from_the_leak_not_from_a_truth_that_fits_anyway():
    _, private = victims(MASKED, 0, None)
    leak, other = victims(MASKED, 1, None)
    told = measure(leak, replace(other, model_input=private.model_input))  # the gradient of another image
    assert told["visible"] == told["hidden"] == 0.0
