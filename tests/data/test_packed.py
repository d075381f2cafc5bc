"""Shards and caches: the image folder's images in its order, bit for bit, and tars as strangers may make them."""

import io
import os
import pickle
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.classes import choose_classes
from data.folders import describe_sample, open_dataset
from data.loaders import TransformedDataset, name_unreadable, open_train
from data.options import AugmentOptions, DataOptions
from data.shards import INDEX, Shards, images_of, open_index
from data.transforms import eval_transform
from utils.distributed import Processes
from utils.errors import UserError, run_command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """JPEGs and one PNG, of two sizes, in three classes; names that would not do as keys."""
    root, draws = tmp_path_factory.mktemp("packed") / "images", np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for name in ("b d", "a", "c"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                side = 40 if name == "c" else 32
                pixels = draws.integers(0, 256, (side, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.x.{'png' if number == 2 else 'JPEG'}")
    return root


@pytest.fixture(scope="module")
def pack():
    """pack('--images', ...) runs the script; returns its exit status."""

    def run(*arguments) -> int:
        before, sys.argv = sys.argv, ["prepare_shards.py", *(str(argument) for argument in arguments)]
        try:
            run_command(runpy.run_path("scripts/prepare_shards.py", run_name="under_test")["main"])
        except SystemExit as stop:
            return stop.code
        finally:
            sys.argv = before
        return 0

    return run


@pytest.fixture(scope="module")
def packed(folder, pack):
    """(shards, cache) of that folder, the shards of a few images each."""
    shards, cache = (folder.with_name(name) for name in ("shards", "cache"))
    script = runpy.run_path("scripts/prepare_shards.py", run_name="under_test")
    assert pack("--images", folder, "--output", shards, "--shard_mb", 1) == 0
    assert pack("--images", folder, "--output", cache, "--cache", 32) == 0
    return shards, cache, script


def write_tar(path, members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def jpeg(side: int = 8) -> bytes:
    Image.new("RGB", (side, side), (10, 200, 30)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def test_shards_hold_the_files_unchanged_in_the_folders_order(folder, packed):
    for split in ("train", "val"):
        theirs, ours = open_dataset("folder", str(folder), split), open_dataset("shards", str(packed[0]), split)
        assert ours.classes == theirs.classes == ["a", "b d", "c"] and len(ours) == len(theirs)
        for number, (path, label) in enumerate(theirs.samples):
            image, found = ours[number]
            assert ours.encoded(number) == Path(path).read_bytes() and found == label
            assert image.tobytes() == theirs[number][0].tobytes()


def test_shards_are_tars_in_the_layout_of_webdataset(folder, packed):
    labels, images = [], 0
    for path in sorted((packed[0] / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert [name.split(".")[0] for name in names[::2]] == [name.split(".")[0] for name in names[1::2]]
            assert {name.split(".", 1)[1] for name in names} <= {"jpg", "png", "cls"}
            labels += [int(tar.extractfile(name).read()) for name in names if name.endswith(".cls")]
            images += len([Image.open(tar.extractfile(name)).load() for name in names[::2]])
    assert labels == [label for _, label in open_dataset("folder", str(folder), "train").samples]
    assert images == len(labels) == 15


def test_cache_equals_the_folder_where_sizes_fit(folder, packed):
    theirs, ours = open_dataset("folder", str(folder), "train"), open_dataset("cache", str(packed[1]), "train")
    assert ours.classes == theirs.classes and len(ours) == len(theirs)
    crop = eval_transform(28, mean=(0.0,) * 3, std=(1.0,) * 3)  # of 32 pixels
    for number, (image, label) in enumerate(ours):
        original = theirs[number][0]
        assert label == theirs[number][1] and image.size == (32, 32)
        assert (image.tobytes() == original.tobytes()) == (original.size == (32, 32))
        assert torch.equal(crop(image), crop(original))
        if number + 1 == len(ours):
            break


@pytest.mark.parametrize("kind", ["shards", "cache"])
def test_packed_sets_may_be_sent_to_loader_workers_and_cut_by_class(folder, packed, kind, tmp_path):
    path = packed[kind == "cache"]
    dataset = open_dataset(kind, str(path), "val")
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 4000
    assert copy[4][0].tobytes() == dataset[4][0].tobytes()
    (tmp_path / "list.txt").write_text("c\na\n")
    theirs, ours = (
        open_dataset(name, str(where), "val", classes=str(tmp_path / "list.txt"))
        for name, where in (("folder", folder), (kind, path))
    )
    assert ours.classes == theirs.classes == ["c", "a"]
    assert sorted(ours[i][1] for i in range(6)) == sorted(theirs[i][1] for i in range(6)) == [0] * 3 + [1] * 3
    (tmp_path / "list.txt").write_text("cc\n")
    with pytest.raises(UserError, match="class 'cc' is not in .*: did you mean 'c'"):
        open_dataset(kind, str(path), "val", classes=str(tmp_path / "list.txt"))


def test_batches_from_shards_equal_those_from_the_folder(folder, packed):
    augment = AugmentOptions(crop="resized", where="device", erasing=0.5, repeats=1)
    known = {"image_size": 24, "batch_size": 5, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    batches = []
    for kind, path, workers in (("folder", folder, 0), ("shards", packed[0], 2)):
        loader = open_train(
            Processes(0, 1, CPU), DataOptions(dataset=kind, path=str(path), workers=workers, **known), augment,
            seed=1, accumulation=1,
        )  # fmt: skip
        batches.append([[*batch[:4], *batch.plan] for batch in loader])
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_shards_are_cut_at_their_size_and_continued(packed, tmp_path):
    script = packed[2]
    files = [script["File"](f"/x/{number}.jpg", 1, 300_000) for number in range(10)]
    shards = list(script["cut"](files, 1 << 20))
    assert [len(shard) for shard in shards] == [3, 3, 3, 1]
    assert [key for shard in shards for key, _ in shard] == [f"{number:08d}" for number in range(10)]
    assert all(script["shard_size"](shard) <= (1 << 20) + 10240 for shard in shards)
    assert [len(shard) for shard in script["cut"](files, 1)] == [1] * 10


def test_a_stopped_preparation_continues_and_other_options_are_refused(folder, pack, tmp_path, capsys):
    arguments = ("--images", folder, "--output", tmp_path / "out", "--shard_mb", 1)
    assert pack(*arguments) == 0
    shard = tmp_path / "out" / "train" / "000000.tar"
    before, index = shard.read_bytes(), shard.with_name(INDEX)
    shard.write_bytes(before[:5000])  # as a copy that was interrupted
    index.unlink()
    kept = (tmp_path / "out" / "val" / "000000.tar").stat().st_mtime_ns
    assert pack(*arguments) == 0 and shard.read_bytes() == before and index.exists()
    assert (tmp_path / "out" / "val" / "000000.tar").stat().st_mtime_ns == kept
    capsys.readouterr()
    assert pack(*arguments[:-1], 2) == 2
    assert "was begun with other images or options" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--images", "/no/such"], "image folder '/no/such' does not exist"),
        (["--shard_mb", "0"], "--shard_mb must be at least 1"),
        (["--dataset", "cifar10"], "--dataset goes with --cache"),
        (["--cache", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_options_of_the_script(folder, pack, tmp_path, capsys, options, words):
    assert pack("--images", folder, "--output", tmp_path / "out", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "members, words",
    [
        ([("a/1.jpg", jpeg()), ("a/1.cls", b"0"), ("a/2.jpg", jpeg())], "member 'a/2.jpg' .*: mend|has no label"),
        ([("1.cls", b"0")], "member '1.cls' of shard .* has no image beside it"),
        ([("1.jpg", jpeg()), ("1.cls", b"cat")], "member '1.cls' of shard .* is 'cat', not a class number"),
        ([("1.jpg", jpeg()), ("1.cls", b"-1")], "not a class number"),
        ([("1.jpg", jpeg()), ("1.cls", b"99999999999")], "not a class number"),
        ([("1.jpg", jpeg()), ("1.png", jpeg()), ("1.cls", b"0")], "member '1.png' .* is a second image of '1'"),
        ([("1.json", b"{}")], "hold no images"),
    ],
)
def test_shards_that_lack_something_are_named(tmp_path, members, words):
    (tmp_path / "val").mkdir()
    write_tar(tmp_path / "val" / "0.tar", members)
    with pytest.raises(UserError, match=words):
        open_dataset("shards", str(tmp_path), "val")


def test_links_and_folders_in_shards(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        folder, link = tarfile.TarInfo("images.jpg"), tarfile.TarInfo("1.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
    with pytest.raises(UserError, match="member '1.jpg' of shard .* is not a plain file"):
        images_of(tmp_path / "0.tar")


def test_damaged_shards_are_named_at_every_cut(tmp_path):
    """Never an index of part of a tar, and never anything but one error."""
    write_tar(tmp_path / "whole.tar", [("1.jpg", jpeg()), ("1.cls", b"0"), ("2.jpg", jpeg()), ("2.cls", b"1")])
    whole = (tmp_path / "whole.tar").read_bytes()
    assert len(images_of(tmp_path / "whole.tar")) == 2
    last = whole.rindex(b"1" + bytes(511)) + 512
    for length in [0, 1, 511, 512, 700, *range(1024, last + 1, 256)]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.tar' is damaged, cut short or compressed"):
            images_of(tmp_path / "cut.tar")
    with tarfile.open(tmp_path / "cut.tar", "w:gz") as tar:
        tar.add(tmp_path / "whole.tar", "1.jpg")
    with pytest.raises(UserError, match="compressed"):
        images_of(tmp_path / "cut.tar")


def test_index_is_made_once_and_must_fit(tmp_path):
    (tmp_path / "val").mkdir()
    shard = tmp_path / "val" / "0.tar"
    write_tar(shard, [("1.jpg", jpeg()), ("1.cls", b"3\n"), ("1.json", b"{}")])
    dataset = open_dataset("shards", str(tmp_path), "val")
    assert (len(dataset), dataset.classes, dataset[0][1]) == (1, ["0", "1", "2", "3"], 3)
    assert (tmp_path / "val" / INDEX).exists() and open_index(tmp_path / "val").label.tolist() == [3]
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match="shard .*0.tar' is 9,728 bytes and 10,240 bytes in index.npz"):
        open_dataset("shards", str(tmp_path), "val")
    (tmp_path / "val" / INDEX).write_bytes(b"PK\x03\x04 damaged")
    with pytest.raises(UserError, match="cannot read .*index.npz.*remove it"):
        open_dataset("shards", str(tmp_path), "val")
    np.savez_compressed(tmp_path / "val" / INDEX, shards=np.zeros(100_000))
    with pytest.raises(UserError, match="unpacks to more than its size"):
        open_dataset("shards", str(tmp_path), "val")
    os.remove(shard)
    with pytest.raises(UserError, match="holds no shards"):
        open_dataset("shards", str(tmp_path), "val")
    with pytest.raises(UserError, match="has no 'train' folder"):
        open_dataset("shards", str(tmp_path), "train")


def test_what_is_no_image_is_named_by_shard_and_member(tmp_path):
    (tmp_path / "val").mkdir()
    half = jpeg(64)[:300]
    write_tar(
        tmp_path / "val" / "0.tar",
        [("1.jpg", b"text"), ("1.cls", b"0"), ("2.jpg", half), ("2.cls", b"0"), ("3.jpg", jpeg()), ("3.cls", b"0")],
    )
    dataset = Shards(tmp_path, "val")
    data = TransformedDataset(dataset, eval_transform(8))
    for number in (0, 1):
        with pytest.raises(UserError, match=rf"cannot read image '.*val/0.tar: {number + 1}.jpg'"):
            data[number]
    lines = []
    skipping = TransformedDataset(dataset, eval_transform(8), "skip")
    assert [skipping[number].skipped for number in range(3)] == [1, 1, 0]
    name_unreadable(skipping, [0, 1], Processes(0, 1, CPU), lines.append)
    assert [line.endswith(f"0.tar: {number}.jpg'") for number, line in enumerate(lines, 1)] == [True, True]
    with open(tmp_path / "val" / "0.tar", "r+b") as file:  # cut while it is read
        file.truncate(3000)
    with pytest.raises(OSError, match="cut short"):
        dataset[2]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: path.joinpath("val.npy").write_bytes(b"\x93NUMPY"), "cannot read .*val.npy"),
        (lambda path: os.truncate(path / "val.npy", 5000), "cannot read .*val.npy"),
        (lambda path: np.save(path / "val.npy", np.zeros((9, 4, 4, 3))), "not uint8"),
        (lambda path: np.save(path / "val.npy", np.zeros((8, 4, 4, 3), np.uint8)), "8 images and 9 labels"),
        (lambda path: path.joinpath("val_labels.npy").unlink(), "val_labels.npy' does not exist"),
        (lambda path: np.save(path / "val_labels.npy", np.array([None])), "cannot read .*val_labels"),
        (lambda path: path.joinpath("classes.txt").write_text("a\n"), "names 1 classes, but label 2"),
        (lambda path: path.joinpath("val.npy").unlink(), "has no val.npy"),
    ],
)
def test_damaged_caches_are_named(folder, packed, tmp_path, damage, words):
    for path in packed[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert describe_sample(open_dataset("cache", str(tmp_path), "val"), 3).endswith("val.npy: image 3")
    damage(tmp_path)
    with pytest.raises(UserError, match=words):
        open_dataset("cache", str(tmp_path), "val")


def test_classes_are_chosen_in_the_order_asked_for(tmp_path):
    places, labels, names = choose_classes(np.array([2, 0, 1, 2]), ["a", "b", "c"], ["c", "a"], tmp_path)
    assert (places.tolist(), labels.tolist(), names) == ([0, 1, 3], [0, 1, 0], ["c", "a"])
