"""What the tests of the matching loop look at: its first derivative, and every iterate."""

from collections.abc import Callable

import pytest
from torch import Tensor

from attacks.matching import loop
from attacks.matching.stepper import Stepper
from attacks.threat_model.leak import Leak
from tests.attacks.small_victims import attack


@pytest.fixture
def derivative(monkeypatch) -> Callable[..., Tensor]:
    """The derivative by the images that `match` takes its first step along."""
    seen = []
    step = Stepper.step

    def record(stepper, gradients, iteration):
        seen.append(gradients[0].clone())
        step(stepper, gradients, iteration)

    monkeypatch.setattr(Stepper, "step", record)

    def first(leaks: Leak | list[Leak], **options) -> Tensor:
        seen.clear()
        attack(leaks, iterations=1, **options)
        return seen[0]

    return first


@pytest.fixture
def iterates(monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(candidates, values of what is minimised, objectives) of every iteration."""
    seen = []
    update = loop.Best.update

    def record(best, images, targets, total, distance):
        seen.append((images.clone(), total.clone(), distance.clone()))
        update(best, images, targets, total, distance)

    monkeypatch.setattr(loop.Best, "update", record)
    return seen
