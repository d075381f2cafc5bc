"""Which model output stands for which class of the data, and averages over mask seeds."""

import pytest

from eval.ratios import average, class_outputs
from utils.errors import UserError


def test_recorded_class_names_decide():
    assert class_outputs(["cat", "dog", "owl"], 3, ["owl", "cat"]) == [2, 0]
    with pytest.raises(UserError, match="1 of the data's 2 classes .* 'eel' is new"):
        class_outputs(["cat", "dog"], 2, ["cat", "eel"])


def test_imagenet_synsets_are_matched_by_name():
    assert class_outputs(None, 1000, ["n01440764", "n15075141"]) == [0, 999]


def test_unnamed_outputs_need_as_many_classes():
    assert class_outputs(None, 2, ["a", "b"]) == [0, 1]
    with pytest.raises(UserError, match="3 classes of data do not fit a checkpoint of 2 outputs"):
        class_outputs(None, 2, ["a", "b", "c"])


def test_average_reports_the_spread():
    rows = [{"mask_ratio": 0.5, "acc1": value, "images": 7} for value in (10.0, 20.0, 30.0)]
    assert average(rows, ["acc1"]) == {"mask_ratio": 0.5, "acc1": 20.0, "images": 7, "seeds": 3, "acc1_std": 10.0}
    assert average(rows[:1], ["acc1"])["acc1_std"] == 0
