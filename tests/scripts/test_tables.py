"""The scripts behind the tables of docs/results.md, on runs of the entry scripts."""

import runpy
import sys

import pytest

from utils.errors import run_command


def table(script: str, runs, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [script, "--runs", str(runs)])
    run_command(runpy.run_path(script, run_name="script_under_test")["main"])
    return capsys.readouterr().out


def test_seed_table(call, trained, images, tmp_path, monkeypatch, capsys):
    for seed in (0, 1):
        options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--mask_ratios", "0,0.5", "--seed", seed]
        options += ["--data.workers", 0, "--min_block", 2, "--max_block", 8]
        assert call("eval.py", *options, "--output", tmp_path / "vit" / str(seed) / "eval").status == 0
        assert call("consistency.py", *options, "--output", tmp_path / "vit" / str(seed) / "consistency").status == 0
    lines = table("scripts/seed_table.py", tmp_path, monkeypatch, capsys).splitlines()
    assert lines[0] == "| accuracy (%), n = 2 seeds | 0 | 0.5 |" and "± 0.0" in lines[2]
    assert lines[4] == "| consistency (%), n = 2 seeds | 0 | 0.5 |" and "100.0 ± 0.0" in lines[6]


def test_attack_table(call, images, tmp_path, monkeypatch, capsys):
    vit = [
        "--model",
        "vit",
        "--model_options.embed_dim",
        48,
        "--model_options.depth",
        1,
        "--model_options.num_heads",
        2,
    ]
    options = [*vit, "--model_options.patch_size", 8, "--image_size", 32, "--images", images / "val", "--num_images", 3]
    for seed in (0, 1):
        assert call("attack.py", *options, "--seed", seed, "--output", tmp_path / "block" / "0" / str(seed)).status == 0
    lines = table("scripts/attack_table.py", tmp_path, monkeypatch, capsys).splitlines()
    assert lines[2].startswith("| block | 0 | 6 | ") and " 100 ± 0 " in lines[2]


@pytest.mark.parametrize("script", ["scripts/seed_table.py", "scripts/attack_table.py", "scripts/demo_report.py"])
def test_missing_runs_are_explained(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        table(script, tmp_path / "nothing", monkeypatch, capsys)
    assert stop.value.code == 2 and "does not exist" in capsys.readouterr().err
