"""data/outputs.py: which output of a model stands for which class folder, in every script."""

import re

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from attacks.threat_model.victim import labels_of
from campaigns.sources import folder_labels
from data.folders import ImageFolder
from data.images import class_folders, class_of, list_images
from data.outputs import class_outputs, folder_outputs
from eval.subject import outputs_of
from models import build_model
from utils.errors import UserError
from utils.notes import Notes

SYNSETS = ImageNetInfo("imagenet-1k").label_names()


def folders(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return root


@pytest.mark.parametrize(
    ("trained", "outputs", "names", "expected"),
    [
        (None, 12, [str(n) for n in range(12)], list(range(12))),
        (None, 12, sorted(str(n) for n in range(12)), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
        (None, 12, [f"{n:02d}" for n in range(12)], list(range(12))),
        (None, 1000, SYNSETS[5:8], [5, 6, 7]),
        (None, 3, ["cat", "dog", "owl"], [0, 1, 2]),
        (["owl", "cat", "dog"], 3, ["dog", "owl"], [2, 0]),
        (["0", "1", "10", "2"], 4, ["0", "1", "2", "10"], [0, 1, 3, 2]),  # trained while labels followed strings
        (["0", "1", "10", "2"], 4, ["02", "10"], [3, 2]),
        (SYNSETS, 1000, ["n01440764"], [0]),
    ],
)
def test_names_that_say_which_output_they_are(trained, outputs, names, expected):
    assert class_outputs(trained, outputs, names) == expected
    assert folder_outputs(trained, outputs, names) == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize(
    ("trained", "outputs", "names", "expected", "words"),
    [
        (None, 2, ["cat", "dog"], [0, 1], "'cat' is output 0, 'dog' is output 1"),
        (None, 2, ["1", "2"], [0, 1], "'1' is output 0, '2' is output 1"),
        (None, 1000, ["0", "11"], [0, 11], "2 of 1000: 0, 11"),
        (["cat", "dog"], 2, ["0", "1"], [0, 1], "places of the model's classes"),
        ([f"a word for {name}" for name in SYNSETS], 1000, ["n01443537"], [1], "imagenet-1k's classes"),
    ],
)
def test_what_is_guessed_is_said(trained, outputs, names, expected, words):
    lines = []
    notes = Notes(lines.append)
    assert class_outputs(trained, outputs, names, notes) == expected
    assert words in notes.results()["assumed"]["classes"] and words in lines[0]
    assert len(lines) == 1


def test_what_is_known_is_not_called_a_guess():
    notes = Notes()
    class_outputs(["b", "a"], 2, ["a"], notes)
    class_outputs(None, 3, ["2", "0", "1"], notes)
    class_outputs(None, 1000, ["n01440764"], notes)
    assert notes.results() == {}


def test_a_model_needs_an_output_for_every_folder():
    with pytest.raises(UserError, match=r"in 6 class folders \('a', 'b', 'c', ...\) and the model has 5 outputs"):
        folder_outputs(None, 5, list("abcdef"))
    with pytest.raises(UserError, match="in 12 class folders .* and the model has 10 outputs"):
        folder_outputs(None, 10, [str(number) for number in range(12)])
    assert folder_outputs(None, 5, list("abc")) == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("trained", "outputs", "names"),
    [
        (None, 2, ["a", "b", "c"]),
        (None, 1000, ["n01440764", "cat"]),
        (["a", "b"], 2, ["a", "c"]),
        (None, 3, ["0", "00"]),
    ],
)
def test_other_classes_are_refused(trained, outputs, names):
    with pytest.raises(UserError):
        class_outputs(trained, outputs, names)


def test_folders_in_the_layout_of_imagenet_v2(tmp_path):
    """Folders 0, 1, ..., 999, whose names are the labels: sorted as strings, 2 would be label 112."""
    base = ImageFolder(folders(tmp_path, [str(n) for n in range(1000)]))
    assert base.classes == [str(n) for n in range(1000)]
    assert all(int(re.search(r"(\d+)/0.png", path)[1]) == label for path, label in base.samples)
    assert class_outputs(None, 1000, base.classes) == list(range(1000))


class Loader:
    def __init__(self, base):
        self.dataset = type("Dataset", (), {"base": base})


@pytest.mark.parametrize(
    ("names", "trained"),
    [
        ([str(n) for n in range(12)], None),
        ([f"{n:02d}" for n in range(12)], None),
        ([f"class {n}" for n in range(12)], None),
        (["b", "d"], [*"lkjihgfedcba"]),
    ],
)
def test_attack_and_eval_label_a_folder_alike(tmp_path, names, trained):
    model = build_model("vit", image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=12).eval()
    model.classes = trained
    root = folders(tmp_path, names)
    base = ImageFolder(root)
    outputs = outputs_of(model, Loader(base))
    by_eval = {path: outputs[label] for path, label in base.samples}
    known = folder_labels(model, root, Notes())
    paths = list_images(root)
    images = torch.zeros(len(paths), 3, 8, 8)
    by_attack = labels_of(model, [str(path.parent) for path in paths], images, known).tolist()
    assert dict(zip(map(str, paths), by_attack, strict=True)) == by_eval


def test_the_class_of_an_image_is_the_folder_eval_takes(tmp_path):
    for name in ("val/cat/1/0.png", "train/dog/0.png", "val/cat/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert class_folders(tmp_path) == ["cat", "dog"] and class_folders(tmp_path / "val") == ["cat"]
    for root in ("val/cat", "val/cat/0.png"):
        assert class_of(tmp_path / "val/cat/0.png", tmp_path / root) == "cat"


def test_images_without_a_class_are_labelled_by_the_model_and_said_so(tmp_path):
    model = build_model("vit", image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, num_classes=3).eval()
    notes = Notes()
    assert folder_labels(model, folders(tmp_path, ["holiday"]) / "holiday", notes) == {}
    assert "('holiday') are labelled with the model's own predictions" in notes.assumed["labels"]
