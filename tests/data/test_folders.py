"""The kinds of data sets, each from small local files in its published layout."""

import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import cifar, flowers102, svhn

from data.demo import write_digits, write_photographs
from data.folders import describe_sample, open_dataset
from data.images import list_images
from utils.errors import UserError


@pytest.fixture
def trusting(monkeypatch):
    """torchvision compares published checksums; our files are small ones of the same structure."""
    for module in (cifar, svhn, flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: True)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def test_cifar10(tmp_path, trusting):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": pixels(2).reshape(2, -1), "labels": [3, 8]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"name {label}" for label in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    train, val = (open_dataset("cifar10", str(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val), train.classes) == (10, 2, names)
    image, label = val[1]
    assert label == 8 and np.array_equal(np.asarray(image), pixels(2)[1].transpose(1, 2, 0))


def test_cifar100(tmp_path, trusting):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels(3).reshape(3, -1), "fine_labels": [0, 50, 99]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(label) for label in range(100)]}))
    assert [open_dataset("cifar100", str(tmp_path), "val")[i][1] for i in range(3)] == [0, 50, 99]


def test_svhn_names_ten_digits_and_reads_ten_as_zero(tmp_path, trusting):
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels(2).transpose(2, 3, 1, 0), "y": np.array([[10], [4]])})
    dataset = open_dataset("svhn", str(tmp_path), "val")
    assert [dataset[i][1] for i in range(2)] == [0, 4] and len(dataset.classes) == 10


def test_flowers102_trains_on_train_and_val(tmp_path, trusting):
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        Image.new("RGB", (40, 30)).save(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 102, 4, 5, 6]])})
    savemat(
        folder / "setid.mat", {"trnid": np.array([[1, 2]]), "valid": np.array([[3, 4]]), "tstid": np.array([[5, 6]])}
    )
    train, val = (open_dataset("flowers102", str(tmp_path), split) for split in ("train", "val"))
    assert [train[i][1] for i in range(4)] == [0, 1, 101, 3] and [val[i][1] for i in range(2)] == [4, 5]
    assert len(train.classes) == 102


def test_domainnet_reads_the_published_lists(tmp_path):
    for name in ("zebra", "apple"):
        (tmp_path / "clipart" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "clipart" / name / "1.jpg")
    (tmp_path / "clipart_train.txt").write_text("clipart/apple/1.jpg 0\n")
    (tmp_path / "clipart_test.txt").write_text("clipart/apple/1.jpg 0\nclipart/zebra/1.jpg 1\n")
    dataset = open_dataset("domainnet", str(tmp_path / "clipart"), "val")
    assert dataset.classes == ["apple", "zebra"] and dataset[1][1] == 1
    (tmp_path / "clipart_train.txt").unlink()
    with pytest.raises(UserError, match="clipart_train.txt' does not exist"):
        open_dataset("domainnet", str(tmp_path / "clipart"), "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "flowers102"])
def test_absent_files_are_explained(tmp_path, name):
    with pytest.raises(UserError, match="--data.download true"):
        open_dataset(name, str(tmp_path), "train")


def test_path_and_class_list_are_asked_for(tmp_path):
    with pytest.raises(UserError, match="--data.path is missing"):
        open_dataset("folder", None, "train")
    with pytest.raises(UserError, match="does not apply to dataset 'cifar10'"):
        open_dataset("cifar10", str(tmp_path), "train", classes="list.txt")


def test_embedded_digits_and_photographs(tmp_path):
    write_digits(tmp_path / "digits")
    train, val = (open_dataset("folder", str(tmp_path / "digits"), split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (1258, 539, 10)
    assert not {path for path, _ in train.samples} & {path for path, _ in val.samples}
    assert val[0][0].size == (32, 32) and describe_sample(val, 0).endswith(".png")
    write_photographs(tmp_path / "photographs", side=64)
    assert len(list_images(tmp_path / "photographs")) == 6


def test_images_are_spread_evenly(tmp_path):
    for number in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert [path.stem for path in list_images(tmp_path, 3)] == ["0", "3", "6"]
    assert len(list_images(tmp_path)) == 10
    with pytest.raises(UserError, match="holds only 10 images"):
        list_images(tmp_path, 11)


def test_grey_palette_alpha_and_16_bit_files_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        (tmp_path / "train" / mode.replace(";", "")).mkdir(parents=True)
        Image.new(mode, (20, 20)).save(tmp_path / "train" / mode.replace(";", "") / f"0.{suffix}")
    dataset = open_dataset("folder", str(tmp_path), "train")
    assert {dataset[i][0].mode for i in range(len(dataset))} == {"RGB"}
