"""scripts/prepare_imagenet_c.py: the same bits however it is run, restarts, and what it refuses."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from data.corruptions import CORRUPTIONS
from utils.errors import UserError, run_command

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("prepare_imagenet_c", ROOT / "scripts" / "prepare_imagenet_c.py")
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # so that its functions can be sent to worker processes
spec.loader.exec_module(script)
FEW = ["--corruptions", "gaussian_noise", "frost", "--severities", "2", "5", "--resize", "40", "--size", "32"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of two photographs each: a tall JPEG, a wide one, a greyscale one and a PNG with transparency."""
    astronaut, coffee = Image.fromarray(data.astronaut()), Image.fromarray(data.coffee())
    images = {
        "n01/a.JPEG": astronaut.resize((60, 80)),
        "n01/b.JPEG": coffee.resize((90, 50)),
        "n02/c.JPEG": astronaut.resize((64, 64)).convert("L"),
        "n02/d.png": coffee.resize((64, 48)).convert("RGBA"),
    }
    for name, image in images.items():
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    (tmp_path / "val" / "readme.txt").write_text("not a class")
    return tmp_path / "val"


def prepare(source: Path, output: Path, *more) -> None:
    script.main([str(part) for part in ("--source", source, "--output", output, "--workers", 1, *FEW, *more)])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))}


def test_layout_sizes_and_pixels(source, tmp_path, capsys):
    prepare(source, tmp_path / "out", "--quality", 100)
    found = files(tmp_path / "out")
    names = [
        f"{c}/{s}/{image}.JPEG" for c in FEW[1:3] for s in FEW[4:6] for image in ("n01/a", "n01/b", "n02/c", "n02/d")
    ]
    assert sorted(found) == sorted(names)
    assert "wrote 16 files, 0 were there: 4 images in" in capsys.readouterr().out
    settings = script.Settings(seed=0, size=32, resize=40, quality=100)
    original = script.prepared(source / "n01" / "a.JPEG", settings)
    assert original.shape == (32, 32, 3)
    with Image.open(tmp_path / "out" / "gaussian_noise/5/n01/a.JPEG") as image:
        assert image.size == (32, 32)
        noise = np.asarray(image).astype(float) - original
    assert 40 < noise.std() < 100


def test_bits_depend_on_the_name_and_not_on_workers_or_company(source, tmp_path):
    prepare(source, tmp_path / "whole")
    prepare(source, tmp_path / "parallel", "--workers", 2)
    prepare(source, tmp_path / "part", "--limit", 2, "--severities", 5)
    whole, part = files(tmp_path / "whole"), files(tmp_path / "part")
    assert whole == files(tmp_path / "parallel")
    assert set(part) == {f"{c}/5/{image}.JPEG" for c in FEW[1:3] for image in ("n01/a", "n02/c")}
    assert all(whole[name] == content for name, content in part.items())
    assert len(set(whole.values())) == len(whole)
    prepare(source, tmp_path / "seed", "--seed", 1)
    assert all(whole[name] != content for name, content in files(tmp_path / "seed").items())


def test_a_restart_writes_what_is_missing_and_nothing_else(source, tmp_path, capsys):
    output = tmp_path / "out"
    prepare(source, output)
    before = files(output)
    lost = output / "frost/2/n01/a.JPEG"
    lost.unlink()
    leftover = output / "frost/2/n01/.a.JPEG.123.tmp"
    leftover.write_bytes(b"half")
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*.JPEG")}
    prepare(source, output)
    assert files(output) == before
    assert not leftover.exists()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "wrote 1 files, 15 were there" in capsys.readouterr().out


def test_other_settings_need_another_folder(source, tmp_path):
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="was begun with --seed 0, not 1: pass the same, or another --output"):
        prepare(source, tmp_path / "out", "--seed", 1)


def test_images_can_keep_their_size(source, tmp_path):
    prepare(source, tmp_path / "out", "--resize", 0, "--size", 0)
    with Image.open(tmp_path / "out" / "frost/2/n01/b.JPEG") as image:
        assert image.size == (90, 50)


def test_crop_is_that_of_torchvision(source):
    from torchvision import transforms as tv

    reference = tv.Compose([tv.Resize(40), tv.CenterCrop(32)])
    for name in ("n01/a.JPEG", "n01/b.JPEG", "n02/c.JPEG"):
        with Image.open(source / name) as image:
            expected = np.asarray(reference(image.convert("RGB")))
        assert np.array_equal(script.prepared(source / name, script.Settings(0, 32, 40, 85)), expected)


def test_contact_sheet(source, tmp_path):
    for name, first in (("sheet.png", source), ("sheet.jpg", source / "n01" / "b.JPEG")):
        sheet = tmp_path / name
        script.main(["--source", str(first), "--contact_sheet", str(sheet), "--resize", "40", "--size", "32"])
        with Image.open(sheet) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] > 5 * 2 * 32
        assert pixels.std() > 30
    assert len(CORRUPTIONS) == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{out}", "--corruptions", "forst"], "unknown corruption 'forst': did you mean 'frost'?"),
        (["--output", "{out}", "--severities", "6"], "--severities: expected a whole number from 1 to 5, got '6'"),
        (["--output", "{out}", "--size", "41", "--resize", "40"], "has 40 x 53 pixels, less than --size 41"),
        (["--output", "{out}", "--souce", "x"], "unknown option '--souce': did you mean '--source'"),
        ([], "pass either --output or --contact_sheet"),
        (["--contact_sheet", "{out}/sheet.gif"], "must end in .jpg or .png"),
    ],
)
def test_refused_options(source, tmp_path, arguments, message):
    filled = [part.format(out=tmp_path / "out") for part in arguments]
    with pytest.raises(UserError) as error:
        script.main(["--source", str(source), "--workers", "1", *filled])
    assert message in str(error.value)


def test_damaged_or_doubled_images_are_named(source, tmp_path):
    (source / "n01/b.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image '.*n01/b.JPEG' .*: replace or remove it"):
        prepare(source, tmp_path / "out")
    (source / "n01/b.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="'b.jpg' would be written to one file"):
        prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="has no images in class folders"):
        prepare(source / "n01", tmp_path / "out")


def test_from_the_command_line(source, tmp_path, capsys):
    """An error in a worker process is one line; --help names every option."""
    (source / "n02/c.JPEG").write_bytes(b"no image")
    arguments = ["--source", source, "--output", tmp_path / "out", "--workers", 2, *FEW]
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: script.main([*map(str, arguments)]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: cannot read image '{source / 'n02/c.JPEG'}'")
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    for option in ("source", "output", "contact_sheet", "corruptions", "severities", *script.Settings._fields, "limit"):
        assert f"--{option} " in text


def test_frost_comes_from_a_folder_of_photographs(source, tmp_path):
    (tmp_path / "frost").mkdir()
    Image.new("RGB", (50, 50), (10, 20, 30)).save(tmp_path / "frost" / "one.png")
    prepare(source, tmp_path / "out", "--frost", tmp_path / "frost", "--quality", 100)
    prepare(source, tmp_path / "drawn", "--quality", 100)
    settings = script.Settings(seed=0, size=32, resize=40, quality=100)
    original = script.prepared(source / "n01" / "a.JPEG", settings)
    with Image.open(tmp_path / "out" / "frost/2/n01/a.JPEG") as image:
        expected = np.clip(0.8 * original + 0.6 * np.array([10, 20, 30]), 0, 255)
        assert np.abs(np.asarray(image).astype(float) - expected).mean() < 3
    out, drawn = files(tmp_path / "out"), files(tmp_path / "drawn")
    assert out["gaussian_noise/2/n01/a.JPEG"] == drawn["gaussian_noise/2/n01/a.JPEG"]
    assert out["frost/2/n01/a.JPEG"] != drawn["frost/2/n01/a.JPEG"]
    with pytest.raises(UserError, match="was begun with --frost one.png"):
        prepare(source, tmp_path / "out", "--quality", 100)
    (tmp_path / "frost" / "two.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read image '.*two.png'"):
        prepare(source, tmp_path / "new", "--frost", tmp_path / "frost")
