"""data/decode.py: image files as strangers may make them, and folders that lead astray."""

import io
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.decode import UNREADABLE, image_files, read_rgb
from data.folders import open_dataset
from data.images import list_images, read_images
from data.loaders import TransformedDataset, name_unreadable, open_eval
from data.options import DataOptions
from data.transforms import eval_transform
from utils.distributed import Processes
from utils.errors import UserError, reason

GRAY = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
COLORS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_sixteen_bits_become_eight_and_not_white(tmp_path):
    for name, mode in (("a.png", "I;16"), ("b.tif", "I;16")):
        Image.fromarray(GRAY).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.mode.startswith("I"), mode
        pixels = np.asarray(read_rgb(tmp_path / name))
        assert (pixels[..., 0] == (GRAY / 257).round()).all() and (pixels[..., 1] == pixels[..., 2]).all()


def test_floating_point_and_32_bit_pictures_are_refused_and_not_black(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(tmp_path / "b.tif")
    for name, why in (("a.tif", "floating-point"), ("b.tif", "beyond 16 bits")):
        with pytest.raises(ValueError, match=why):
            read_rgb(tmp_path / name)


def test_cmyk_animation_and_orientation(tmp_path):
    """Ink is inverted colour; the first frame counts; orientation tags are not applied, as in torchvision."""
    red = Image.new("RGB", (16, 8), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "ink.jpg", quality=100)
    red.save(tmp_path / "moving.webp", save_all=True, append_images=[Image.new("RGB", (16, 8), "blue")], lossless=True)
    tag = Image.Exif()
    tag[0x0112] = 6  # to be shown turned by 90 degrees
    red.save(tmp_path / "turned.jpg", exif=tag)
    for name in ("ink.jpg", "moving.webp", "turned.jpg"):
        image = read_rgb(tmp_path / name)
        assert image.size == (16, 8) and image.mode == "RGB"
        assert np.abs(np.asarray(image)[4, 8].astype(int) - (255, 0, 0)).max() < 8, name


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hostile(folder: Path) -> list[Path]:
    """Files that are called images and are not."""
    whole = io.BytesIO()
    Image.fromarray(COLORS).save(whole, "JPEG")
    contents = {
        "empty": b"",
        "text": b"<script>alert(1)</script>",
        "cut": whole.getvalue()[:-200],
        "head": whole.getvalue()[:20],
        "bomb": png_of(100_000, 100_000),
        "short": png_of(1000, 1000),
    }
    paths = [folder / f"{name}.jpg" for name in (*contents, "pipe", "link", "circle", "null")]
    for path, content in zip(paths, contents.values(), strict=False):
        path.write_bytes(content)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "link.jpg").symlink_to("/no/such/file.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    (folder / "null.jpg").symlink_to("/dev/zero")
    return paths


def test_hostile_files_are_named_or_skipped_and_counted(tmp_path):
    folder = tmp_path / "val" / "class"
    folder.mkdir(parents=True)
    Image.fromarray(COLORS).save(folder / "good.png")
    paths = hostile(folder)
    dataset = open_dataset("folder", str(tmp_path), "val")
    assert len(dataset) == len(paths) + 1
    strict = TransformedDataset(dataset, eval_transform(32))
    places = [place for place, (path, _) in enumerate(dataset.samples) if not path.endswith("good.png")]
    for place in places:
        with pytest.raises(UserError, match="cannot read image") as error:
            strict[place]
        assert dataset.samples[place][0] in str(error.value) and str(error.value).isprintable()
    lenient, lines = TransformedDataset(dataset, eval_transform(32), "skip"), []
    assert [int(lenient[place].labels) for place in places] == [-1] * len(places)
    peers = Processes(0, 1, torch.device("cpu"))
    assert name_unreadable(lenient, places, peers, lines.append) == [dataset.samples[place][0] for place in places]
    assert len(lines) == len(places) and not name_unreadable(lenient, [], peers, lines.append)
    for path in paths:
        with pytest.raises(UserError, match="cannot read image"):
            read_images([path], 32, (0.5,) * 3, (0.5,) * 3)
    assert len(list_images(folder)) == len(paths) + 1  # broken links are not passed over in silence


def test_links_in_circles_are_refused_and_linked_folders_read(tmp_path):
    real, root = tmp_path / "elsewhere", tmp_path / "data" / "val"
    real.mkdir()
    root.mkdir(parents=True)
    Image.fromarray(COLORS).save(real / "a.png")
    (root / "class").symlink_to(real)
    assert len(open_dataset("folder", str(root.parent), "val")) == len(list_images(root)) == 1
    (real / "again").symlink_to(real)
    for search in (lambda: open_dataset("folder", str(root.parent), "val"), lambda: list_images(root)):
        with pytest.raises(UserError, match="again' is a link into a folder it lies in"):
            search()


def test_order_is_that_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    for name in ("b/2.png", "b/10.png", "a/z.png", "a/deep/1.png", "a/deep-er/1.PNG", "a/Z.jpg", "a.b/1.png"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).touch()
    (tmp_path / "val" / "a" / "notes.txt").touch()
    assert open_dataset("folder", str(tmp_path), "val").samples == ImageFolder(str(tmp_path / "val")).samples


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="locked' cannot be listed"):
        image_files(tmp_path)


NAMES = ["<img src=x onerror=alert(1)>", "a\nerror: b", "\x1b[31mred", "wide  \u202e space", "'; rm -rf ~; '", "é" * 60]


def test_odd_names_stay_in_one_line(tmp_path):
    for place, name in enumerate([os.fsdecode(b"not \xff utf-8"), *NAMES]):
        folder = tmp_path / str(place) / "val" / "class"
        folder.mkdir(parents=True)
        (folder / f"{name}.png").write_bytes(b"no image")
        with pytest.raises(UserError) as error:
            TransformedDataset(open_dataset("folder", str(folder.parents[1]), "val"), eval_transform(8))[0]
        assert str(error.value).isprintable() and "cannot read image" in str(error.value)


def test_an_error_of_a_worker_is_one_line_as_well(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
    (tmp_path / "val" / "class" / "a\nb.png").write_bytes(b"no image")
    loader = open_eval(
        Processes(0, 1, torch.device("cpu")),
        DataOptions(path=str(tmp_path), image_size=8, batch_size=1, workers=1, mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    with pytest.raises(UserError, match=r"^cannot read image '.*a\\nb.png' .*--data.on_corrupt skip$"):
        next(iter(loader))


SEEDS = []
for kind, more in (("JPEG", {}), ("PNG", {}), ("PPM", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
    buffer = io.BytesIO()
    Image.fromarray(COLORS).save(buffer, kind, **more)
    SEEDS.append(buffer.getvalue())


@settings(max_examples=200 * int(os.environ.get("FUZZ", 1)), deadline=None, database=None)
@given(st.sampled_from(SEEDS), st.integers(0, 2**32))
def test_any_bytes_are_an_image_or_unreadable(tmp_path_factory, content, seed):
    rng, content = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(min(len(content), 120) if rng.random() < 0.7 else len(content))] = rng.randrange(256)
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    path.write_bytes(content[: rng.randrange(len(content)) if rng.random() < 0.2 else None])
    try:
        assert read_rgb(path).mode == "RGB"
    except Warning:  # a size between a warning and a refusal of Pillow
        pass
    except UNREADABLE as error:
        assert reason(error)
