"""eval.py and consistency.py: their results, the same for any number of processes, and their package."""

import json

import pytest

import eval as package

SETTINGS = ["--data.workers", 0, "--min_block", 2, "--max_block", 8, "--mask_ratios", "0,0.5,0.9", "--seeds", 2]


def rows(folder, key: str) -> list[dict]:
    return json.loads((folder / "results.json").read_text())[key]


def test_package_wins_over_the_script():
    assert package.__file__.endswith("__init__.py")


@pytest.mark.parametrize("script, key", [("eval.py", "accuracy"), ("consistency.py", "consistency")])
def test_results_do_not_depend_on_the_number_of_processes(start, trained, images, tmp_path, script, key):
    options = [*SETTINGS, "--checkpoint", trained / "last.pt", "--data.path", images, "--data.batch_size", 4]
    runs = {n: start(n, script, *options, "--output", tmp_path / str(n)) for n in (1, 2, 3)}
    for run in runs.values():
        outcome = run.finish()
        assert outcome.status == 0, outcome.err
    single = rows(tmp_path / "1", key)
    assert [row["mask_ratio"] for row in single] == [0, 0.5, 0.9]
    assert all(row["images"] == 17 and row["seeds"] == 2 for row in single)
    for number in (2, 3):
        for one, other in zip(single, rows(tmp_path / str(number), key), strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


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
