"""eval/subject.py: which model output stands for which class of the data."""

import pytest
from timm.data import ImageNetInfo

from eval.subject import class_outputs
from utils.errors import UserError


def test_recorded_class_names_decide():
    assert class_outputs(["cat", "dog", "owl"], 3, ["owl", "cat"]) == [2, 0]
    with pytest.raises(UserError, match="1 of the data's 2 classes .* 'eel' is new"):
        class_outputs(["cat", "dog"], 2, ["cat", "eel"])


def test_imagenet_synsets_are_matched_by_name():
    assert class_outputs(None, 1000, ["n01440764", "n15075141"]) == [0, 999]
    large = ImageNetInfo("imagenet-12k").label_names()
    assert class_outputs(None, len(large), [large[7], large[0]]) == [7, 0]


def test_unnamed_outputs_need_as_many_classes():
    assert class_outputs(None, 2, ["a", "b"]) == [0, 1]
    with pytest.raises(UserError, match="3 classes of data do not fit a checkpoint of 2 outputs"):
        class_outputs(None, 2, ["a", "b", "c"])
