"""scripts/frontier.py, interval_study.py and epsilon_curves.py: their rows from small runs, and their figures."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from scripts import epsilon_curves, frontier, interval_study
from utils.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    """Two pictures of 32 pixels, each in its class."""
    for place in range(2):
        (tmp_path / str(place)).mkdir()
        pixels = np.random.default_rng(place).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / str(place) / "a.png")
    return sorted(tmp_path.rglob("*.png"))


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_frontier_adds_up_the_updates_of_a_training(tmp_path):
    score = {"attack": "dlg", "psnr": 9.0, "psnr_patches": 10.0, "no_leak": 8.0, "n": 4}
    cell = {"model": "vit", "defense": "dp", "acc1": 50.0, "naive": score, "adaptive": score,
            "psnr_by_attack": {"dlg": 9.0, "joint": 9.0}}  # fmt: skip
    runs = tmp_path / "runs"
    write(runs / "results.json", [cell])
    write(runs / "vit/dp/train_0/results.json", {"epochs": 4, "epsilon_shuffled": 3.0})
    for name, leaked in (("dlg", 0.0), ("joint", 50.0)):
        interval = {"bits": 1000.0, "leaked": {"mean": leaked}, "hidden": {"mean": 900.0}}
        write(runs / f"vit/dp/{name}/results.json", {"interval": interval})
    row = frontier.rows_of(runs)[0]
    assert (row["leaked"], row["adaptive"], row["epsilon"]) == (5.0, 10.0, 3.0)
    assert row["hidden"] == pytest.approx(90) and row["hidden_training"] == pytest.approx(60)
    frontier.main([f"--runs={runs}", f"--output={tmp_path / 'f.json'}", f"--figure={tmp_path / 'f.png'}"])
    assert (tmp_path / "f.png").stat().st_size > 1000
    write(runs / "vit/dp/joint/results.json", {})
    with pytest.raises(UserError, match="has no interval"):
        frontier.rows_of(runs)


def test_a_cell_of_the_study_counts_values_and_what_is_claimed(pictures, tmp_path):
    cells = {cell.key: replace(cell, number=2) for cell in interval_study.cells()}
    assert sum(cell.number for cell in interval_study.cells()) > 1000
    found = {key: interval_study.measure(cells[key], pictures) for key in ("no defence", "8 bits", "DP-SGD z 1")}
    assert found["no defence"]["claiming"] == 2 and found["no defence"]["values"] == 2 * 3072
    assert found["no defence"]["wrong"] == found["8 bits"]["claiming"] == found["DP-SGD z 1"]["bits_leaked"] == 0
    assert found["DP-SGD z 1"]["bits_hidden"] > 24575
    interval_study.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_more_noise_and_less_epsilon_leave_less(pictures):
    few = {z: epsilon_curves.measure("closed_form", z, pictures * 6) for z in (1e-8, 1.0)}
    assert few[1e-8]["psnr"]["mean"] > 30 > few[1.0]["psnr"]["mean"]
    assert few[1e-8]["bits_leaked"]["mean"] > 0 == few[1e-8]["bits_hidden"]["mean"]
    assert few[1.0]["bits_leaked"]["mean"] == 0 and few[1.0]["bits_hidden"]["mean"] > 24575


@pytest.mark.parametrize("content", ["[]", "{}", "[1]", "["])
def test_a_file_without_cells_makes_no_frontier(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="is no results.json of scripts/benchmark.py"):
        frontier.rows_of(tmp_path)
