"""scripts/frontier.py, interval_study.py and epsilon_curves.py: their rows from small runs, and their figures."""

import json
from dataclasses import replace
from pathlib import Path

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


def folder_of(tmp_path, found: dict) -> Path:
    """Write a benchmark's folder of one cell, whose weights, of two seeds, are those of a cell `plain`."""
    score = {"attack": "dlg", "psnr": 9.0, "psnr_patches": 8.5, "no_leak": 8.0, "n": 4}
    cell = {"model": "vit", "defense": "dp", "weights": "plain", "acc1": 50.0, "naive": score, "adaptive": score,
            "psnr_by_attack": {name: 9.0 for name in found}}  # fmt: skip
    runs = tmp_path / "runs"
    write(runs / "results.json", [cell])
    for seed, acc1 in enumerate((49.0, 51.0)):
        write(runs / f"vit/plain/train_{seed}/results.json", {"acc1": acc1, "epochs": 4, "epsilon_shuffled": 3.0})
    for name, (leaked, hidden) in found.items():
        interval = {"bits": 1000.0, "leaked": {"mean": leaked}, "hidden": {"mean": hidden}}
        write(runs / f"vit/dp/{name}/results.json", {"interval": interval})
    return runs


def test_the_frontier_adds_up_the_updates_of_a_training(tmp_path):
    runs = folder_of(tmp_path, {"dlg": (0.0, 900.0), "joint": (50.0, 900.0)})
    row = frontier.rows_of(runs)[0]
    assert (row["leaked"], row["adaptive"], row["epsilon"]) == (5.0, 9.0, 3.0)
    assert row["hidden"] == pytest.approx(90) and row["hidden_training"] == pytest.approx(60)
    assert row["accuracy"] == {"mean": 50.0, "std": pytest.approx(2**0.5), "n": 2} and row["verdict"] == "leaks"
    frontier.main([f"--runs={runs}", f"--output={tmp_path / 'f.json'}", f"--figure={tmp_path / 'f.png'}"])
    assert (tmp_path / "f.png").stat().st_size > 1000
    write(runs / "vit/dp/joint/results.json", {})
    with pytest.raises(UserError, match="has no interval"):
        frontier.rows_of(runs)


@pytest.mark.parametrize(
    "found, kind",
    [({"dlg": (0.0, 975.0)}, "proved"), ({"dlg": (0.0, 900.0)}, "not broken"), ({"dlg": (1.0, 0.0)}, "leaks")],
)
def test_the_verdict_is_of_the_whole_training(tmp_path, found, kind):
    assert frontier.rows_of(folder_of(tmp_path, found))[0]["verdict"] == kind


def test_what_reads_more_than_the_mean_colour_is_not_unbroken():
    row = {"hidden_training": 0.0, "leaked": 0.0, "adaptive": 9.1, "no_leak": 8.0}
    assert frontier.verdict(row) == "leaks"
    assert frontier.verdict(row | {"adaptive": 8.9}) == "not broken"


def test_the_finding_names_what_holds_at_seven_eighths_of_the_accuracy():
    def row(name: str, mean: float, kind: str) -> dict:
        passed = {"bits": 24576.0, "bits_training": 2000.0, "epochs": 20, "epsilon": 900.0}
        return {"defense": name, "accuracy": {"mean": mean, "std": 1.0}, "verdict": kind} | passed

    rows = [
        row("none", 80.0, "leaks"),
        row("a", 70.0, "proved"),
        row("b", 69.0, "proved"),
        row("c", 60.0, "not broken"),
    ]
    proved, unbroken, passed, _ = frontier.finding(rows).splitlines()
    assert "70.0 %" in proved and proved.endswith("is proved to hide images: `a` (70.0 ± 1.0 %).")
    assert "was not broken: nothing here. The nearest, `c`, has 60.0 ± 1.0 %." in unbroken
    assert (
        "Of `a` at most 2,000 of the 24,576 bits of an image pass in the 20 updates it takes part in (epsilon 900)."
        in passed
    )


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
