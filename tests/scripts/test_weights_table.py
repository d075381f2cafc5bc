"""scripts/weights_table.py: a part of its cells, and rows of earlier runs."""

import json
import sys

import pytest

from attacks.threat_model.leak import RefusalError
from scripts import weights_table
from utils.errors import UserError


def start(monkeypatch, tmp_path, *more: str) -> list[dict]:
    trunk, images = tmp_path / "trunk.safetensors", tmp_path / "images"
    trunk.touch()
    images.mkdir(exist_ok=True)
    given = ["--images", str(images), "--trained", str(trunk), "--lpips_trunk", str(trunk)]
    monkeypatch.setattr(sys, "argv", ["weights_table.py", *given, "--output", str(tmp_path / "out"), *more])
    weights_table.main()
    return json.loads((tmp_path / "out" / "weights_table.json").read_text())["rows"]


def finish(tmp_path, folder: str, psnr: float) -> None:
    """Write what attack.py leaves of a cell."""
    place = tmp_path / "out" / folder
    place.mkdir(parents=True)
    summary = {key: {"mean": psnr, "std": 1.0, "n": 7} for key in ("psnr", "seconds")}
    (place / "results.json").write_text(json.dumps({"summary": summary}))


def test_cells_that_are_not_finished_here_keep_their_earlier_rows(tmp_path, monkeypatch):
    psnr = {"mean": 30.0, "std": 1.0, "n": 4}
    cell = {"attack": "joint", "mask_ratio": 0.0, "side": 224, "dtype": "float64", "psnr": psnr, "n": 4}
    earlier = [cell | {"weights": name} for name in ("random", "tuned")]
    (tmp_path / "kept.json").write_text(json.dumps({"rows": earlier}))
    finish(tmp_path, "random/joint_0_224_float64", 90.0)
    finish(tmp_path, "trained/closed_form_0_224_float32", 80.0)
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
        def main(options):
            raise error

        monkeypatch.setattr(weights_table.runpy, "run_path", lambda *_, **__: {"main": main})
        return start(monkeypatch, tmp_path, "--cells", "trained/joint_0_224_float32")

    rows = attack(RefusalError("too few equations"))
    assert [row["refused"] for row in rows] == ["too few equations"]
    with pytest.raises(UserError, match="holds a run with other options"):
        attack(UserError("output folder 'out' holds a run with other options"))


def test_a_finished_cell_of_another_number_of_images_is_no_row(tmp_path, monkeypatch):
    cell = "random/joint_0_224_float64"
    finish(tmp_path, cell, 90.0)
    (tmp_path / "out" / cell / "config.yaml").write_text("num_images: 2\n")
    assert start(monkeypatch, tmp_path, "--only_finished", "--num_images", "2")
    with pytest.raises(UserError, match="of 2 images, and --num_images asks for 4"):
        start(monkeypatch, tmp_path, "--only_finished")
