"""What a refused or idle command leaves of a run folder: every byte, by name, and no folder where there was none."""

import shutil
from pathlib import Path

import pytest

from tests.scripts.conftest import write_images

LENET = ["--model", "lenet", "--model_options.num_classes", 4, "--image_size", 32, "--labels", "hidden"]
QUICK = [*LENET, "--attack", "dlg", "--attack_options.iterations", 2, "--num_images", 2, "--device", "cpu"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A finished training that nobody else uses."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "script, options, said",
    [
        ("train.py", ["--model.depth", 2], "of another model or data set"),
        ("train.py", ["--data.path", "other"], "of another model or data set"),
        ("train.py", ["--data.path", "nowhere"], "does not exist"),
        ("train.py", ["--data.path", "empty"], "folder: expected"),
        ("train.py", ["--data.batch_size", 0], "--data.batch_size must be at least 1"),
        ("train.py", ["--data.batch_size", 1000], "lower --data.batch_size"),
        ("train.py", ["--data.train_images", 10**6], "the training set holds only"),
        ("train.py", ["--init", "nowhere.pt"], "does not exist"),
        ("train.py", ["--optim.betas", "2,3"], ""),
        ("attack.py", [], "run"),
        ("attack.py", ["--overwrite", "--attack_options.objective", "nonsense"], "nonsense"),
        ("attack.py", ["--overwrite", "--images", "empty"], "empty"),
        ("attack.py", ["--overwrite", "--attack", "closed_form"], ""),
    ],
)
def test_a_refused_command_changes_no_byte(call, tiny, images, run, tmp_path, finished, script, options, said):
    if not finished:
        (run / "results.json").unlink()
    write_images(tmp_path / "other" / "train", 3, 4, seed=2)
    write_images(tmp_path / "other" / "val", 3, 1, seed=3)
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("other", "nowhere", "nowhere.pt", "empty")}
    options = [places.get(option, option) for option in options]
    usual = tiny if script == "train.py" else [*QUICK, "--images", images / "val"]
    before = contents(run)
    outcome = call(script, *usual, "--resume", "auto", *options, "--output", run)
    assert outcome.status == 2 and said in outcome.err and outcome.err.count("\n") == 1, outcome
    assert contents(run) == before
    new = tmp_path / "new" / "run"
    if script == "train.py" and "--model.depth" not in options and places["other"] not in options:
        assert call(script, *usual, "--resume", "auto", *options, "--output", new).status == 2
        assert not new.parent.exists()


def test_a_finished_training_is_left_alone(call, tiny, images, run, tmp_path):
    before = contents(run)
    outcome = call("train.py", *tiny, "--resume", "auto", "--output", run)
    assert outcome.status == 0 and f"already finished: '{run}'" in outcome.out and outcome.err == ""
    copy = shutil.copytree(images, tmp_path / "copy")
    outcome = call("train.py", *tiny, "--data.path", copy, "--resume", "auto", "--output", run)
    assert outcome.status == 0 and "differ, and were not used: data.path" in outcome.out
    assert contents(run) == before
    outcome = call("train.py", *tiny, "--optim.epochs", 4, "--resume", "auto", "--output", run)
    assert outcome.status == 0 and "resuming at epoch 3" in outcome.out
    (run / "last.pt").unlink()
    before = contents(run)
    outcome = call("train.py", *tiny, "--optim.epochs", 4, "--resume", "auto", "--output", run)
    assert outcome.status == 0 and "already finished" in outcome.out and contents(run) == before


def test_a_finished_attack_is_left_alone(call, images, tmp_path):
    run = tmp_path / "run"
    options = [*QUICK, "--images", images / "val", "--resume", "auto", "--output", run]
    assert call("attack.py", *options).status == 0
    before = contents(run)
    outcome = call("attack.py", *options)
    assert outcome.status == 0 and "already finished" in outcome.out
    outcome = call("attack.py", *options, "--attack_options.iterations", 3)
    assert outcome.status == 2 and "attack_options.iterations 2 -> 3" in outcome.err
    assert contents(run) == before


def test_metric_only_deletes_nothing_of_people(call, tmp_path):
    for name in ("originals/0000_a.png", "figures/a.png", "last.pt", "tb/a"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    before = contents(tmp_path / "mine")
    for more in ([], ["--overwrite"]):
        outcome = call("attack.py", *LENET, "--metric_only", *more, "--output", tmp_path / "mine")
        assert outcome.status == 2 and "and no run" in outcome.err
    assert contents(tmp_path / "mine") == before
    run = tmp_path / "run"
    assert call("attack.py", *LENET, "--metric_only", "--output", run).status == 0
    shutil.copytree(tmp_path / "mine", run, dirs_exist_ok=True)
    assert call("attack.py", *LENET, "--metric_only", "--overwrite", "--output", run).status == 0
    assert before.items() <= contents(run).items()


def test_the_embedded_data_replace_nothing(call, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert call("data/demo.py", "--output", tmp_path).status == 0
    before = contents(tmp_path)
    assert call("data/demo.py", "--output", tmp_path).status == 0
    assert contents(tmp_path) == before
    for name, text in (("reviews/val.csv", "label,text\ngood,mine\n"), ("photographs/coffee.png", "mine")):
        (tmp_path / name).write_text(text)
        outcome = call("data/demo.py", "--output", tmp_path)
        assert outcome.status == 2 and name in outcome.err and (tmp_path / name).read_text() == text
        (tmp_path / name).write_bytes(before[name])
