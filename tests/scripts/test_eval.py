"""eval.py and consistency.py: their results and their package."""

import json

import pytest
import torch
from PIL import Image

import eval as package
from models import build_model

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


def test_what_was_assumed_stands_in_the_results(call, tmp_path):
    """A checkpoint that says nothing of its inputs and classes, on folders of numbers and of names, here and there."""
    model = build_model("vit", image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=12)
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "a.pth")
    for split in ("train", "val"):
        for number in range(12):
            (tmp_path / "set" / split / str(number)).mkdir(parents=True)
            Image.new("RGB", (16, 16), (20 * number, 0, 0)).save(tmp_path / "set" / split / str(number) / "0.png")
            (tmp_path / "set" / split / str(number) / "._0.png").write_bytes(b"x")
    options = ["--checkpoint", tmp_path / "a.pth", "--data.path", tmp_path / "set", "--data.workers", 0]
    outcome = call("eval.py", *options, "--output", tmp_path / "refused")
    assert outcome.status == 2 and "pass --num_heads N" in outcome.err
    options += ["--num_heads", 2, "--output", tmp_path / "run"]
    assert call("eval.py", *options, "--data.image_size", 24).status == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["assumed"].keys() == {"weights", "image_size", "normalize"} and results["passed_over"] == 12
    assert results["inputs"]["normalize_from"] == "ImageNet's, assumed" and results["inputs"]["image_size"] == 24
    log = (tmp_path / "run" / "log.txt").read_text()
    assert all(sentence in log for sentence in results["assumed"].values()) and "passed over 12 hidden" in log

    options = ["--checkpoint", tmp_path / "a.pth", "--model_options.num_heads", 2, "--images", tmp_path / "set/val"]
    options += ["--attack", "dlg", "--attack_options.iterations", 1, "--num_images", 12, "--mean", "[0,0,0]"]
    options += ["--std", "[1,1,1]", "--labels", "hidden"]
    assert call("attack.py", *options, "--output", tmp_path / "attack").status == 0
    results = json.loads((tmp_path / "attack" / "results.json").read_text())
    assert results["assumed"].keys() == {"weights"} and results["passed_over"] == 12
    assert results["inputs"]["normalize_from"] == "the options"
    labels = {row["image"].split("/")[-2]: row["label"] for row in results["per_image"]}
    assert labels == {str(number): number for number in range(12)}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--suite", "imagenet-c", "--mask_ratios", 0.5], "--mask_ratios must be used with --suite"),
        (["--suite", "calibration", "--seeds", 3], "--seeds must be used with --suite accuracy, got 3"),
        (["--ridge", 0.1], "--ridge must be used with --suite position, got 0.1"),
        (["--throughput", "--mask_ratios", 0.5], "--mask_ratios must be used with --suite"),
    ],
)
def test_options_that_a_suite_has_no_use_for_are_refused(call, tmp_path, options, words):
    outcome = call("eval.py", "--checkpoint", "a.pth", *options, "--output", tmp_path / "run")
    assert outcome.status == 2 and words in outcome.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option", ["--data.mean=[123,116,103]", "--data.mean=[-0.1,0,0]", "--data.std=[0.2,0,0.2]", "--data.std=[58,57,57]"]
)
def test_mean_and_std_of_other_units_are_refused(call, tmp_path, option):
    for script, name in (("eval.py", option), ("attack.py", option.replace("data.", ""))):
        victim = ["--checkpoint", "a.pth", "--images", tmp_path] if script == "attack.py" else ["--checkpoint", "a.pth"]
        outcome = call(script, *victim, name, "--output", tmp_path / "run")
        assert outcome.status == 2 and "of pixels in [0, 1]" in outcome.err and not (tmp_path / "run").exists()


def test_one_mask_for_a_batch_depends_on_the_batch(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0, "--mask_ratios", "0.5"]
    options += ["--min_block", 2, "--max_block", 8]
    found = {}
    for name, more in {
        "images": [], "images of one": ["--data.batch_size", 1], "batch": ["--mask_per", "batch"],
        "batch of one": ["--mask_per", "batch", "--data.batch_size", 1],
    }.items():  # fmt: skip
        assert call("eval.py", *options, *more, "--output", tmp_path / name).status == 0
        found[name] = rows(tmp_path / name, "accuracy")[0]["loss"]
    assert found["images"] == pytest.approx(found["images of one"]) == pytest.approx(found["batch of one"])
    assert found["batch"] != pytest.approx(found["images"], rel=1e-6)
    assert call("consistency.py", *options, "--mask_per", "batch", "--output", tmp_path / "c").status == 0


def test_throughput_counts_the_images_of_its_passes(call, trained, images, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.throughput.WARM_UP", 1)
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0, "--throughput"]
    outcome = call("eval.py", *options, "--data.batch_size", 5, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "run" / "results.json").read_text())["throughput"]
    assert found["images_per_second"] > 0 and (found["batch_size"], found["passes"]) == (5, 30)
    outcome = call("eval.py", *options, "--suite", "position", "--output", tmp_path / "other")
    assert outcome.status == 2 and "--throughput must be used without --suite" in outcome.err
