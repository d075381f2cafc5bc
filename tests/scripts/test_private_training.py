"""train.py --defense dp_sgd: what is refused before anything is written, and what a resumed run still answers for."""

import json

import pytest
import torch

from defenses.accounting import guarantee, shuffled_epsilon

QUARTER = 6 / 24  # of the training images in an update, of which an epoch has 4


def private(noise: float, epochs: int) -> list:
    options = ["--defense", "dp_sgd", "--defense_options.noise_multiplier", noise]
    return [*options, "--optim.epochs", epochs, "--jigsaw.start_epoch", 0]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--optim.mixup", 0.8], "--optim.mixup 0 --optim.cutmix 0"),
        (["--optim.cutmix", 1.0], "--optim.mixup 0 --optim.cutmix 0"),
        (["--augment.repeats", 3], "--augment.repeats 1"),
        (["--data.on_corrupt", "skip"], "--data.on_corrupt error"),
        (["--optim.compile", "true"], "--optim.compile false"),
        (["--optim.grad_checkpointing", "true"], "--optim.grad_checkpointing false"),
    ],
)
def test_what_breaks_the_guarantee_is_refused_before_anything_is_written(call, tiny, tmp_path, options, words):
    run = tmp_path / "run"
    outcome = call("train.py", *tiny, *private(1.0, 1), *options, "--output", run)
    last = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and words in last and "Traceback" not in outcome.err and not run.exists()


def results(run) -> dict:
    return json.loads((run / "results.json").read_text())


def checkpoint(run) -> dict:
    return torch.load(run / "last.pt", weights_only=True)


def test_a_resumed_run_answers_for_all_its_updates(call, tiny, images, tmp_path):
    run = tmp_path / "run"
    assert call("train.py", *tiny, *private(0.3, 2), "--output", run).status == 0
    assert checkpoint(run)["privacy"]["history"] == [[0.3, QUARTER, 8]]
    first = results(run)
    assert first["epsilon_shuffled"] == pytest.approx(shuffled_epsilon([[0.3, QUARTER, 8]], 1e-5))
    again = call("train.py", *tiny, *private(10.0, 3), "--output", run, "--resume", "auto")
    assert again.status == 0, again.err
    history = [[0.3, QUARTER, 8], [10.0, QUARTER, 4]]
    saved, found = checkpoint(run)["privacy"], results(run)
    assert saved["history"] == history and found["epsilon_shuffled"] > first["epsilon_shuffled"]
    for key, value in guarantee(history, 1e-5).items():
        assert found[key] == saved[key] == value
    assert f"epsilon: {found['epsilon']}" in (run / "log.txt").read_text() and "delta: 1e-05" in again.out
    evaluated(call, run, images, found)
    made = call("eval/report.py", "--runs", f"private={run}").out
    shown = "none" if found["epsilon"] is None else f"{found['epsilon']:.4g}"
    assert f"| private | {shown} | {found['epsilon_shuffled']:.4g} | 1e-05 |" in made


def evaluated(call, run, images, found: dict) -> None:
    """eval.py repeats the guarantee of the checkpoint's training, a null one too."""
    options = ["--mask_ratios", 0, "--data.workers", 0, "--device", "cpu", "--data.path", images]
    outcome = call("eval.py", "--checkpoint", run / "last.pt", *options, "--output", run.with_name("eval"))
    assert outcome.status == 0, outcome.err
    scores = results(run.with_name("eval"))
    for key in ("epsilon", "epsilon_shuffled", "delta", "privacy"):
        assert (key in scores) == (key in found) and scores.get(key) == found.get(key)
    assert f"epsilon of the checkpoint: {found['epsilon']}" in outcome.out


@pytest.mark.parametrize("before", ["undefended", "unclipped", "unknown"])
def test_what_was_trained_without_a_guarantee_has_none(call, tiny, images, tmp_path, before):
    run = tmp_path / "run"
    first = {"undefended": [], "unclipped": ["--defense", "noise"], "unknown": private(1.0, 1)}[before]
    assert call("train.py", *tiny, *first, "--optim.epochs", 1, "--jigsaw.start_epoch", 0, "--output", run).status == 0
    if before == "unknown":  # as checkpoints were before they held a history
        content = checkpoint(run)
        del content["privacy"]
        torch.save(content, run / "last.pt")
    else:
        assert "epsilon" not in results(run)
    again = call("train.py", *tiny, *private(10.0, 2), "--output", run, "--resume", "auto")
    assert again.status == 0, again.err
    found, words = results(run), "does not say" if before == "unknown" else "4 of 8 updates"
    assert found["epsilon"] is found["epsilon_shuffled"] is None
    assert words in found["privacy"] and words in again.out
    assert (checkpoint(run)["privacy"]["history"] is None) == (before == "unknown")
    if before == "undefended":
        evaluated(call, run, images, found)


def test_weights_that_began_elsewhere_are_said(call, tiny, trained, tmp_path):
    run = tmp_path / "run"
    outcome = call("train.py", *tiny, *private(1.0, 1), "--init", trained / "last.pt", "--output", run)
    assert outcome.status == 0, outcome.err
    words = f"training before {trained / 'last.pt'} is not counted"
    assert words in outcome.out and "its classes are the same" in (run / "log.txt").read_text()
    assert words in results(run)["privacy"]
    again = call("train.py", *tiny, *private(1.0, 2), "--output", run, "--resume", "auto")
    assert again.status == 0 and checkpoint(run)["privacy"]["history"] == [[1.0, QUARTER, 8]]
    assert checkpoint(run)["privacy"]["start"].startswith(words)
