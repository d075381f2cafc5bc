"""Hidden and system files and folders are no images and no classes, wherever images are listed."""

import numpy as np
import pytest
from PIL import Image

from data.classes import class_order
from data.decode import image_files, in_words
from data.folders import ImageFolder, open_dataset
from data.images import list_images
from eval.image_folders import shared_names
from scripts.prepare_imagenet_c import list_sources
from utils.errors import UserError

LITTER = (
    "._x.jpg", ".hidden.png", ".ipynb_checkpoints/x-checkpoint.jpg", "@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", ".DS_Store",
    "Thumbs.db", "__MACOSX/._x.jpg",
)  # fmt: skip


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpg", ".png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    else:
        path.write_bytes(b"\0")


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            picture(tmp_path / split / name / "x.jpg")
    for name in LITTER:
        picture(tmp_path / "val/a" / name)
    picture(tmp_path / "val" / ".ipynb_checkpoints/y.jpg")
    picture(tmp_path / "val" / "@eaDir/y.jpg")
    return tmp_path


def test_litter_is_neither_image_nor_class(root):
    found = []
    paths = list_images(root / "val", litter=found)
    assert [str(path.relative_to(root / "val")) for path in paths] == ["a/x.jpg", "b/x.jpg"]
    assert len(found) == len(LITTER) + 2
    base = open_dataset("folder", str(root), "val")  # with the same classes as train
    assert base.classes == ["a", "b"] and len(base) == 2 and len(base.litter) == len(found)
    assert "passed over 9 hidden or system files and folders" in in_words(base.litter, root)
    assert shared_names(root / "val", root / "train") == (["a/x.jpg", "b/x.jpg"], 0)
    assert [path.name for path in list_sources(root / "val", None)] == ["x.jpg", "x.jpg"]


def test_a_class_of_litter_alone_is_refused_by_name(root):
    (root / "val/a/x.jpg").unlink()
    with pytest.raises(UserError, match="class folder '.*/val/a' holds no images but hidden or system files"):
        ImageFolder(root / "val")
    with pytest.raises(UserError, match="holds no images but hidden or system files"):
        list_images(root / "val" / "a")


def test_folders_whose_own_name_is_hidden_can_be_read(tmp_path):
    picture(tmp_path / ".cache" / "a" / "x.jpg")
    assert len(image_files(tmp_path / ".cache")) == 1


def test_numbers_are_ordered_by_value():
    assert class_order(["10", "9", "1"]) == ["1", "9", "10"]
    assert class_order(["10", "9", "x"]) == ["10", "9", "x"]
    assert class_order(["01", "1", "2"]) == ["01", "1", "2"]
