"""eval/image_folders.py: `python -m eval.X` over two folders, what becomes of unusual images, and one-line refusals."""

import json
import math
import runpy
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval.fft2d
import eval.mse
import eval.psnr_ssim
from eval.image_folders import BATCH, read_image, read_pairs, shared_names
from eval.psnr_ssim import psnr, ssim
from utils.errors import UserError, run_command

SCRIPTS = {"mse": eval.mse, "psnr_ssim": eval.psnr_ssim, "fft2d": eval.fft2d}


def colours(seed: int, height: int = 16, width: int = 12, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path, **options)


def save_png16(path: Path, values: np.ndarray) -> None:
    """A 16-bit PNG of (H, W, 1 to 4), which Pillow cannot write; rows are coded as differences to the row above."""
    height, width, channels = values.shape
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    coded = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    lines = b"".join(b"\2" + line.tobytes() for line in coded)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Nineteen pairs, one of them in a subfolder: more than a batch. The first pair is equal."""
    for number in range(19):
        name = f"{number:02d}.png" if number else "sub/00.png"
        save(tmp_path / "source" / name, colours(number))
        save(tmp_path / "target" / name, colours(number + 100 * (number > 0)))
    return tmp_path / "source", tmp_path / "target"


@pytest.fixture
def call(capsys):
    """call('mse', '--json', ...) is (exit status, stdout, stderr) of `python -m eval.mse --json ...`."""

    def run(script: str, *arguments) -> tuple[int, str, str]:
        status = 0
        try:
            run_command(lambda: SCRIPTS[script].main([str(argument) for argument in (*arguments, "--device", "cpu")]))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    for part in parts:
        assert str(part) in err


def test_scores_are_those_of_the_functions(folders, call, tmp_path):
    source, target = folders
    status, out, _ = call(
        "psnr_ssim", "--source_dir", source, "--target_dir", target, "--json", tmp_path / "scores.json"
    )
    assert status == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.png"))
    x, y = (torch.stack([read_image(folder / name) for name in names]) for folder in folders)
    values = {"psnr": psnr(x, y).tolist(), "ssim": ssim(x, y).tolist()}
    assert [row["image"] for row in found["per_image"]] == names
    for key, expected in values.items():
        written = [row[key] for row in found["per_image"]]
        assert written == [None if math.isinf(value) else pytest.approx(value, rel=1e-9) for value in expected]
        finite = [value for value in expected if math.isfinite(value)]
        assert found[key]["mean"] == pytest.approx(np.mean(finite))
        assert found[key]["std"] == pytest.approx(np.std(finite, ddof=1))
        assert found[key]["n"] == len(finite)
    assert found["psnr"]["infinite"] == 1
    assert found["missing"] == 0
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["psnr", "ssim", "ssim_official"]
    assert f"psnr: {found['psnr']['mean']:.6g} ± " in lines[0]
    assert "18 pairs" in lines[0] and "dB, higher is closer" in lines[0] and "1 equal pairs" in lines[0]


@pytest.mark.parametrize("script", [*SCRIPTS, "lpips"])
def test_each_script_runs_as_a_module(script, folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--source_dir", str(folders[0]), "--target_dir", "absent"])
    monkeypatch.delitem(sys.modules, f"eval.{script}", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"eval.{script}", run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: image folder 'absent' does not exist: check the path\n"


def test_fft2d_prints_its_three_variants(folders, call):
    status, out, _ = call("fft2d", "--source_dir", folders[0], "--target_dir", folders[1])
    assert status == 0
    names = [line.split(":")[0] for line in out.splitlines()]
    assert names == ["fft2d_legacy", "fft2d_conjugated", "fft2d_magnitude"]


def test_patches_in_any_order_on_request(tmp_path, call):
    x = colours(0)
    save(tmp_path / "a" / "x.png", np.concatenate([x[8:], x[:8]]))
    save(tmp_path / "b" / "x.png", x)
    arguments = ("psnr_ssim", "--source_dir", tmp_path / "a", "--target_dir", tmp_path / "b", "--patch_size")
    assert "psnr_any_order: infinite (0 pairs; " in call(*arguments, 4)[1]
    refused(call(*arguments, 0), "--patch_size must be at least 1")
    refused(call(*arguments, 5), "x.png", "cannot be cut into patches")


def test_batches_hold_consecutive_pairs_of_one_size(tmp_path):
    sizes = [(8, 8)] * (BATCH + 2) + [(8, 10)] + [(8, 8)]
    names = [f"{number:02d}.png" for number in range(len(sizes))]
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        save(tmp_path / "a" / name, colours(number, *size))
        save(tmp_path / "b" / name, colours(number + 50, *size))
    batches = list(read_pairs(tmp_path / "a", tmp_path / "b", names))
    assert [len(batch) for batch, _, _ in batches] == [BATCH, 2, 1, 1]
    assert [name for batch, _, _ in batches for name in batch] == names
    assert batches[2][1].shape == batches[2][2].shape == (1, 3, 8, 10)
    assert batches[1][2][1].equal(read_image(tmp_path / "b" / names[BATCH + 1]))


def test_pairs_are_read_as_they_are_needed(folders):
    names, _ = shared_names(*folders)
    (folders[0] / names[-1]).write_text("damaged")
    batches = read_pairs(*folders, names)
    assert len(next(batches)[0]) == BATCH
    with pytest.raises(UserError, match=names[-1]):
        next(batches)


def test_eight_bit_colour_is_exact(tmp_path):
    pixels = colours(0)
    save(tmp_path / "x.png", pixels)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    assert read_image(tmp_path / "x.png").equal(expected)


def test_greyscale_becomes_three_equal_channels(tmp_path):
    grey = colours(0, channels=1)
    save(tmp_path / "grey.png", grey)
    save(tmp_path / "rgb.png", grey.repeat(3, axis=2))
    Image.fromarray(grey[..., 0] > 127).save(tmp_path / "binary.png")
    assert read_image(tmp_path / "grey.png").equal(read_image(tmp_path / "rgb.png"))
    assert read_image(tmp_path / "binary.png").equal((torch.from_numpy(grey[..., 0]) > 127).float().expand(3, -1, -1))


def test_transparency_shows_white(tmp_path):
    pixels = colours(0, channels=4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    save(tmp_path / "x.png", pixels)
    found = read_image(tmp_path / "x.png")
    colour, alpha = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255).split([3, 1])
    torch.testing.assert_close(found, alpha * colour + 1 - alpha)
    assert (found[:, 0] == 1).all()
    assert found[:, 1].equal(colour[:, 1])
    Image.fromarray(pixels[..., :3]).quantize(16).save(tmp_path / "palette.png", transparency=3)
    with Image.open(tmp_path / "palette.png") as image:
        hole = torch.from_numpy(np.asarray(image) == 3)
    assert hole.any() and (read_image(tmp_path / "palette.png")[:, hole] == 1).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_kept(channels, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (9, 7, channels))
    values[0, 0], values[0, 1], values[0, 2] = 65535, 0, 256
    save_png16(tmp_path / "x.png", values)
    exact = torch.from_numpy(values / 65535).permute(2, 0, 1)
    expected = exact if channels < 4 else exact[3:] * exact[:3] + 1 - exact[3:]
    torch.testing.assert_close(read_image(tmp_path / "x.png").double(), expected.expand(3, -1, -1), rtol=0, atol=2e-7)
    if channels == 1:
        Image.fromarray(values[..., 0].astype(np.uint16)).save(tmp_path / "pillow.png")
        assert read_image(tmp_path / "pillow.png").equal(read_image(tmp_path / "x.png"))


def test_sixteen_bit_grey_with_transparency_is_refused(tmp_path):
    save_png16(tmp_path / "x.png", np.full((4, 4, 2), 1000))
    with pytest.raises(UserError, match="x.png.*16-bit"):
        read_image(tmp_path / "x.png")


def test_floating_point_images_must_be_finite_and_within_range(tmp_path):
    values = np.random.default_rng(0).random((6, 5), np.float32)
    Image.fromarray(values).save(tmp_path / "x.tiff")
    assert read_image(tmp_path / "x.tiff").equal(torch.from_numpy(values).expand(3, -1, -1))
    for wrong in (np.nan, np.inf, 1.5, -0.1):
        values[2, 2] = wrong
        Image.fromarray(values).save(tmp_path / "x.tiff")
        with pytest.raises(UserError, match="x.tiff.*NaN or values out of range"):
            read_image(tmp_path / "x.tiff")


def test_other_colour_models_become_rgb(tmp_path):
    Image.fromarray(colours(0, 32, 32)).convert("CMYK").save(tmp_path / "x.jpg")
    assert read_image(tmp_path / "x.jpg").shape == (3, 32, 32)


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_partner_is_an_error_unless_allowed(side, folders, call, tmp_path):
    (folders[side] / "03.png").unlink()
    arguments = ("mse", "--source_dir", folders[0], "--target_dir", folders[1])
    refused(call(*arguments), "1 images of", f"'{folders[1 - side]}'", "03.png", "--allow_missing")
    status, out, _ = call(*arguments, "--allow_missing", "--json", tmp_path / "mse.json")
    assert status == 0
    assert "18 pairs" in out and "1 images without a partner were passed over" in out
    found = json.loads((tmp_path / "mse.json").read_text())
    assert (found["mse"]["n"], len(found["per_image"]), found["missing"]) == (18, 18, 1)


def test_files_that_are_no_images_by_name_are_passed_over(folders, call):
    (folders[0] / "notes.txt").write_text("not an image")
    (folders[1] / ".hidden").write_text("not an image")
    assert call("mse", "--source_dir", folders[0], "--target_dir", folders[1])[0] == 0


def test_bad_folders_are_one_line(folders, call, tmp_path):
    source, target = folders
    (tmp_path / "empty").mkdir()
    save(tmp_path / "other" / "other.png", colours(0))
    refused(call("mse", "--source_dir", tmp_path / "empty", "--target_dir", target), tmp_path / "empty", "no images")
    refused(call("mse", "--source_dir", source, "--target_dir", tmp_path / "absent"), "absent", "does not exist")
    refused(call("mse", "--source_dir", source, "--target_dir", source / "01.png"), "01.png", "is not a folder")
    outcome = call("mse", "--source_dir", source, "--target_dir", tmp_path / "other", "--allow_missing")
    refused(outcome, "no image name in common")
    arguments = ("--source_dir", source, "--target_dir", target)
    refused(call("mse", *arguments, "--json", tmp_path / "absent" / "x.json"), tmp_path / "absent", "--json")


def test_bad_images_are_one_line(folders, call):
    arguments = ("psnr_ssim", "--source_dir", folders[0], "--target_dir", folders[1])
    save(folders[0] / "09.png", colours(0, 16, 13))
    refused(call(*arguments), folders[0] / "09.png", "13 x 16", folders[1] / "09.png", "12 x 16")
    save(folders[1] / "04.png", colours(0, 8, 8))
    save(folders[0] / "04.png", colours(0, 8, 8))
    refused(call(*arguments), "04.png", "at least 11 x 11 pixels, got 8 x 8")
    (folders[1] / "02.png").write_text("not an image")
    refused(call(*arguments), "cannot read image", folders[1] / "02.png")
    whole = (folders[1] / "01.png").read_bytes()
    (folders[1] / "01.png").write_bytes(whole[: len(whole) // 2])
    refused(call(*arguments), "cannot read image", folders[1] / "01.png")


def test_bad_options_are_one_line(folders, call):
    arguments = ("--source_dir", folders[0], "--target_dir", folders[1])
    refused(call("mse", *arguments, "--allow_mising"), "--allow_mising", "did you mean '--allow_missing'")
    refused(call("mse", "--source_dir", folders[0]), "--target_dir", "--help")
    refused(call("mse", *arguments, "--js"), "--js")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_says_which_images_are_compared(name, call):
    status, out, _ = call(name, "--help")
    assert status == 0 and f"usage: python -m eval.{name} " in out
    assert "paired by their name" in out and "Orientation tags are not applied" in out


def test_a_metric_without_defined_values_says_so(tmp_path, call):
    for folder in ("a", "b"):
        save(tmp_path / folder / "x.png", np.zeros((4, 4, 3), np.uint8))
    status, out, _ = call("fft2d", "--source_dir", tmp_path / "a", "--target_dir", tmp_path / "b")
    assert status == 0
    assert out.startswith("fft2d_legacy: undefined (0 pairs; lower is closer; 1 undefined not in the mean)")
