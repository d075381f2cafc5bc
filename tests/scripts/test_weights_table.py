"""scripts/weights_table.py: a part of its cells, and rows of earlier runs."""

import json
import sys
from argparse import Namespace

import pytest
from PIL import Image

from attacks.threat_model.leak import RefusalError
from options import AttackConfig
from scripts import weights_table
from scripts.weights_table import Cell
from utils.commandline import load
from utils.errors import UserError

JOINT = Cell("random", "joint", 0.0, 224, "float64")


def write_images(folder) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")


def start(monkeypatch, tmp_path, *more: str) -> list[dict]:
    trunk, images = tmp_path / "trunk.safetensors", tmp_path / "images"
    trunk.touch()
    write_images(images)
    given = ["--images", str(images), "--trained", str(trunk), "--lpips_trunk", str(trunk)]
    monkeypatch.setattr(sys, "argv", ["weights_table.py", *given, "--output", str(tmp_path / "out"), *more])
    weights_table.main()
    return json.loads((tmp_path / "out" / "weights_table.json").read_text())["rows"]


def finish(tmp_path, cell: Cell, psnr: float) -> None:
    """Write what attack.py leaves of a cell of four images."""
    place, trunk = tmp_path / "out" / cell.folder, tmp_path / "trunk.safetensors"
    place.mkdir(parents=True)
    given = Namespace(images=tmp_path / "images", num_images=4, lpips_trunk=trunk)
    options = weights_table.attack_options(cell, given, {"trained": trunk})
    _, resolved = load(AttackConfig, [*options, "--resume=auto", f"--output={place}"])
    (place / "config.yaml").write_text(resolved)
    summary = {key: {"mean": psnr, "std": 1.0, "n": 7} for key in ("psnr", "seconds")}
    (place / "results.json").write_text(json.dumps({"summary": summary}))
    (place / "log.txt").touch()


@pytest.fixture
def quick(monkeypatch):
    """No LPIPS network is read, and its file is empty."""
    monkeypatch.setattr("campaigns.scoring.load_lpips", lambda *_: None)


def test_cells_that_are_not_finished_here_keep_their_earlier_rows(tmp_path, monkeypatch, quick):
    psnr = {"mean": 30.0, "std": 1.0, "n": 4}
    cell = {"attack": "joint", "mask_ratio": 0.0, "side": 224, "dtype": "float64", "psnr": psnr, "n": 4}
    earlier = [cell | {"weights": name} for name in ("random", "tuned")]
    (tmp_path / "kept.json").write_text(json.dumps({"rows": earlier}))
    finish(tmp_path, JOINT, 90.0)
    finish(tmp_path, Cell("trained", "closed_form", 0.0, 224, "float32"), 80.0)
    rows = start(monkeypatch, tmp_path, "--kept", str(tmp_path / "kept.json"), "--only_finished")
    assert [(row["weights"], row["attack"], row["psnr"]["mean"], row["n"]) for row in rows] == [
        ("trained", "closed_form", 80.0, 7), ("random", "joint", 90.0, 7), ("tuned", "joint", 30.0, 4)
    ]  # fmt: skip
    assert [row.get("kept", False) for row in rows] == [False, False, True]


def test_only_the_chosen_cells_are_measured(tmp_path, monkeypatch):
    seen = []

    def refused(cell, given, files):
        seen.append(cell)
        return cell._asdict() | {"refused": "no"}

    monkeypatch.setattr(weights_table, "measure", refused)
    start(monkeypatch, tmp_path, "--cells", "*/mjp_aware_0.27_112_*")
    assert [(cell.weights, cell.dtype) for cell in seen] == [
        ("random", "float32"), ("trained", "float32"), ("random", "float64"), ("trained", "float64")
    ]  # fmt: skip
    with pytest.raises(UserError, match="--cells 'random/dlg' matches no cell"):
        start(monkeypatch, tmp_path, "--cells", "random/dlg")


def test_what_an_attack_refuses_is_a_row_and_a_wrong_folder_is_not(tmp_path, monkeypatch):
    def attack(error):
        def run_once(*_):
            raise error

        monkeypatch.setattr(weights_table, "run_once", run_once)
        return start(monkeypatch, tmp_path, "--cells", "trained/joint_0_224_float32")

    rows = attack(RefusalError("too few equations"))
    assert [row["refused"] for row in rows] == ["too few equations"]
    with pytest.raises(UserError, match="holds a run with other options"):
        attack(UserError("output folder 'out' holds a run with other options"))


def test_a_finished_cell_of_other_options_is_no_row(tmp_path, monkeypatch, quick):
    finish(tmp_path, JOINT, 90.0)
    assert len(start(monkeypatch, tmp_path, "--only_finished")) == 1
    write_images(tmp_path / "others")
    for options, words in (
        (["--num_images", "2"], "num_images 4 -> 2"),
        (["--images", str(tmp_path / "others")], "images .*images -> .*others"),
    ):
        with pytest.raises(UserError, match=f"holds a run with other options .{words}"):
            start(monkeypatch, tmp_path, "--only_finished", *options)
