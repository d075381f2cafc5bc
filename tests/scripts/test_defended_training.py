"""train.py --defense: zero strength is none, every kind trains, and what was trained is attacked under the same."""

import json

import pytest
import torch


def weights(folder) -> dict:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def test_zero_strength_trains_the_same_model_bit_for_bit(call, tiny, trained, tmp_path):
    outcome = call("train.py", *tiny, "--defense", "noise", "--defense_options.std", 0, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    plain, zero = weights(trained), weights(tmp_path / "run")
    assert all(zero[name].equal(value) for name, value in plain.items())


@pytest.mark.parametrize(
    "options",
    [
        ["--defense", "ats", "--defense_options.policies", "3-1-7+26"],
        ["--defense", "dp_sgd", "--defense_options.noise_multiplier", 0.5],
        ["--defense", "soteria", "--defense_options.sample", 1],
        ["--defense", "mixup", "--defense_options.mixed", 2],
        ["--defense", "withhold"],
        ["--model.bottleneck", 8],
    ],
)
def test_every_kind_of_defence_trains(call, tiny, trained, images, tmp_path, options):
    run = tmp_path / "run"
    outcome = call("train.py", *tiny, *options, "--optim.epochs", 2, "--output", run)
    assert outcome.status == 0, outcome.err
    results = json.loads((run / "results.json").read_text())
    assert ("epsilon" in results) == ("dp_sgd" in options)
    start = weights(run)["pos_embed"]
    if "withhold" in options:  # never updated: as it was initialised
        again = call("train.py", *tiny, *options, "--output", tmp_path / "longer")
        assert again.status == 0 and weights(tmp_path / "longer")["pos_embed"].equal(start)
    victim = ["--checkpoint", run / "last.pt", "--images", images / "val", "--num_images", 2, "--batch_size", 2]
    defended = options[: 2 if options[0] == "--defense" else 0] + options[2:4] * (options[0] == "--defense")
    if "withhold" in options:
        defended += ["--attack", "inverting_gradients", "--attack_options.iterations", 1]
    else:
        defended += ["--attack_options.underdetermined", "true"]  # of two images
    outcome = call("attack.py", *victim, *defended, "--output", tmp_path / "attack")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--defense", "ats", "--defense_options.policies", "3-50"], "operation 50"),
        (["--defense", "noise", "--defense_options.std", -1], "std must be 0 or more"),
        (["--defense", "mixup", "--optim.mixup", 0.8], "takes the place of the recipe's"),
        (["--defense", "soteria", "--optim.accumulation", 2], "one process without --optim.accumulation"),
        (["--defense", "withhold", "--defense_options.names", "pos"], "names none of its parameters"),
        (["--data.train_images", 99], "holds only 24 images"),
        (["--model.positions", "rotary"], "have no row per patch"),
    ],
)
def test_what_cannot_be_trained_is_one_line(call, tiny, tmp_path, options, words):
    outcome = call("train.py", *tiny, *options, "--output", tmp_path / "run")
    assert outcome.status == 2 and words in outcome.err.strip().splitlines()[-1]
