"""utils/run_once.py: a run of an entry script inside another one."""

import json

import pytest

from utils.errors import AlreadyFinished, UserError
from utils.run_once import run_once


def test_a_run_is_made_once_and_its_results_are_returned(tmp_path):
    seen = []

    def main(options):
        seen.append(options)
        if (tmp_path / "results.json").exists():
            raise AlreadyFinished
        (tmp_path / "results.json").write_text(json.dumps({"acc1": 50.0}))

    for _ in range(2):
        assert run_once(main, ["--seed=1"], tmp_path) == {"acc1": 50.0}
    assert seen == [["--seed=1", "--resume=auto", f"--output={tmp_path}"]] * 2


def test_a_finished_attack_with_other_options_is_not_taken_for_this_one(images, tmp_path):
    attack = ["--attack=closed_form", "--model=deit_tiny", "--model_options.depth=1", "--image_size=32",
              f"--images={images}", "--device=cpu"]  # fmt: skip
    first = run_once("attack.py", [*attack, "--num_images=1"], tmp_path / "run")
    assert run_once("attack.py", [*attack, "--num_images=1"], tmp_path / "run") == first
    with pytest.raises(UserError, match="holds a run with other options .*num_images 1 -> 2"):
        run_once("attack.py", [*attack, "--num_images=2"], tmp_path / "run")


def test_neither_a_finished_nor_a_stopped_training_with_other_options_is_taken_for_this_one(tiny, tmp_path):
    first = run_once("train.py", tiny, tmp_path / "run")
    assert run_once("train.py", [*tiny, "--log.every=7"], tmp_path / "run") == first
    other = r"holds a run with other options \(optim.lr .* -> 0.5\)"
    with pytest.raises(UserError, match=other):
        run_once("train.py", [*tiny, "--optim.lr=0.5"], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()  # stopped before them
    with pytest.raises(UserError, match=other):
        run_once("train.py", [*tiny, "--optim.lr=0.5"], tmp_path / "run")
    assert run_once("train.py", tiny, tmp_path / "run")["acc1"] == first["acc1"]
