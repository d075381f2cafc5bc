"""eval.py and consistency.py: their results and their package."""

import json

import pytest

import eval as package

SETTINGS = ["--data.workers", 0, "--min_block", 2, "--max_block", 8, "--mask_ratios", "0,0.5,0.9", "--seeds", 2]


def rows(folder, key: str) -> list[dict]:
    return json.loads((folder / "results.json").read_text())[key]


def test_package_wins_over_the_script():
    assert package.__file__.endswith("__init__.py")


def test_accuracy_of_a_checkpoint_equals_the_training_log(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0]
    assert call("eval.py", *options, "--output", tmp_path / "run").status == 0
    (row,) = rows(tmp_path / "run", "accuracy")
    final = json.loads((trained / "results.json").read_text())
    assert {key: row[key] for key in ("acc1", "acc5", "images", "skipped")} == {
        key: final[key] for key in ("acc1", "acc5", "images", "skipped")
    }
    assert row["loss"] == pytest.approx(final["loss"], rel=1e-6)


def test_ratio_zero_is_consistent_with_itself(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0, "--mask_ratios", "0"]
    assert call("consistency.py", *options, "--output", tmp_path / "run").status == 0
    (row,) = rows(tmp_path / "run", "consistency")
    assert row["diff_norm"] == 0 and row["consistency"] == 100


def test_limit_spreads_over_the_classes(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0, "--limit", 6]
    assert call("eval.py", *options, "--output", tmp_path / "run").status == 0
    assert rows(tmp_path / "run", "accuracy")[0]["images"] == 6


def test_corrupted_images_are_scored_by_corruption_and_severity(call, trained, images, tmp_path):
    out = tmp_path / "c"
    made = ["--source", images / "val", "--output", out, "--resize", "36", "--size", "32", "--workers", "1"]
    made += ["--corruptions", "contrast", "pixelate", "--severities", "1", "5"]
    assert call("scripts/prepare_imagenet_c.py", *made).status == 0
    options = ["--suite", "imagenet-c", "--checkpoint", trained / "last.pt", "--data.path", out, "--data.workers", 0]
    outcome = call("eval.py", *options, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(row["corruption"], row["severity"]) for row in found["imagenet_c"]] == [
        ("contrast", 1), ("contrast", 5), ("pixelate", 1), ("pixelate", 5)
    ]  # fmt: skip
    assert all(row["images"] == 17 for row in found["imagenet_c"])
    assert found["mce"]["mce"] is None  # not all fifteen corruptions


def test_calibration_of_a_labelled_set(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0]
    outcome = call("eval.py", "--suite", "calibration", *options, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["calibration"][0]["images"] == 17


def test_options_of_other_suites_are_refused(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--clean_error", 20]
    outcome = call("eval.py", *options, "--output", tmp_path / "run")
    assert outcome.status == 2 and "--clean_error" in outcome.err.splitlines()[-1]
