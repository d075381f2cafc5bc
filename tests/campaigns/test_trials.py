"""campaigns/trials.py: an attack of an audit gets the iterations that fit, and is stopped where it takes too long."""

import pytest
import torch
from PIL import Image

from campaigns import trials
from campaigns.audit_subject import Subject
from campaigns.time_budget import TimeIsUp
from campaigns.trials import Trial, attempt, fit
from models import build_model

SCALE = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.fixture
def subject(tmp_path):
    model = build_model("lenet", image_size=32, num_classes=4).eval()
    noise = torch.randint(256, (4, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    paths = [tmp_path / f"{place}.png" for place in range(4)]
    for path, pixels in zip(paths, noise.numpy(), strict=True):
        Image.fromarray(pixels).save(path)
    subject = Subject(model, paths, SCALE, 1, 0, {"mask_sampler": "block", "min_block": 1, "max_block": None})
    subject.folders = [str(path) for path in paths]
    subject.classes = {name: place for place, name in enumerate(subject.folders)}
    return subject


def matching(iterations: int) -> Trial:
    return Trial("inverting_gradients", {"iterations": iterations, "tv": 0.0}, 2, "as planned")


def pretend(monkeypatch, fixed: float, each: float) -> list[int]:
    """Let an attack take `fixed` seconds and `each` per iteration, by a clock that only it moves."""
    now, seen = [0.0], []

    def attack_together(attack, rounds, watch, options):
        seen.append(options["iterations"])
        now[0] += fixed + each * options["iterations"]

    monkeypatch.setattr(trials.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(trials, "attack_together", attack_together)
    return seen


@pytest.mark.parametrize("seconds, possible", [(1e3, 300), (30.0, 186), (4.0, None)])
def test_no_more_iterations_than_fit(subject, monkeypatch, seconds, possible):
    """Set-up of 2 s, 0.1 s an iteration: pilots of 1 and 5 take 4.6 s, and 2.1 s are set aside for set-up."""
    seen = pretend(monkeypatch, 2.0, 0.1)
    monkeypatch.setattr(trials, "worth_together", lambda attack, model: 16)
    trial = fit(subject, subject.client(), matching(300), seconds)
    assert seen == [1, 5]
    assert (trial and trial.options["iterations"]) == possible
    assert trial is None or (trial.budget == "as planned") == (possible == 300)


def test_what_is_stopped_keeps_the_gradients_that_are_through(subject, monkeypatch):
    real, done = trials.attack_together, []

    def attack_together(attack, rounds, watch, options):
        if done:
            raise TimeIsUp
        done.extend(real(attack, rounds, watch, options))
        return done

    monkeypatch.setattr(trials, "attack_together", attack_together)
    monkeypatch.setattr(trials, "worth_together", lambda attack, model: 1)
    row = attempt(subject, subject.client(), matching(3), 60.0)
    assert row["psnr"]["n"] == row["gradients"] == 1 and "1 of 2 gradients" in row["stopped"]
    row = attempt(subject, subject.client(), matching(3), 60.0)
    assert row["psnr"]["n"] == 0 and "--minutes" in row["why"] and "0 of 2" in row["stopped"]
