"""attacks/solvers/optimizers.py: schedules, what is done to a gradient, and steps that no problem sees of another."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from attacks.matching import MatchingOptions
from attacks.matching.stepper import Stepper
from attacks.solvers.optimizers import OPTIMIZERS, SCHEDULES, learning_rate

PLAIN = MatchingOptions(optimizer="sgd", lr=0.5, iterations=10)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def moved(gradients: list[Tensor], start: Tensor, own: list[torch.Generator] | None = None, **options) -> Tensor:
    """Where `start` (V, ...) ends after a step along each of the gradients."""
    images = start.clone()
    stepper = Stepper([images], replace(PLAIN, **options), own or generators(0))
    for iteration, gradient in enumerate(gradients):
        stepper.step([gradient], iteration)
    return images


SETTINGS = {  # golden name: (schedule, warm-up, rate, iterations, steps of the optimizer per recorded step)
    "invertinggradients": ("step", 0, 0.1, 90),
    "modern_without_features": ("cosine", 10, 0.1, 90),
    "seethroughgradients_no_noise_no_bn": ("cosine", 10, 0.1, 90),
    "tag_like": ("linear", 8, 0.05, 90),
    "lbfgs_known_labels": ("constant", 0, 1.0, 12),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rates_are_those_of_breaching(golden, name):
    schedule, warmup, lr, iterations = SETTINGS[name]
    expected = golden("attack_trajectory")[f"{name}/lr"][:iterations]
    found = [lr * learning_rate(schedule, k, iterations, warmup) for k in range(iterations)]
    assert found == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("iterations, falls", [(24, (8, 14, 21)), (24000, (8998, 14999, 21015)), (60, (22, 37, 52))])
def test_steps_fall_where_the_official_code_lets_them(iterations, falls):
    rates = [SCHEDULES["step"](k, iterations) for k in range(iterations)]
    assert tuple(k for k in range(1, iterations) if rates[k] < rates[k - 1]) == falls


def test_schedules_start_at_one_and_fall():
    for name, schedule in SCHEDULES.items():
        factors = [schedule(iteration, 24) for iteration in range(24)]
        assert factors[0] == 1
        assert all(0 < later <= earlier for earlier, later in zip(factors, factors[1:], strict=False))
        assert (factors[-1] == 1) == (name == "constant")
    milestones = [k for k in range(1, 80) if SCHEDULES["step"](k, 80) != SCHEDULES["step"](k - 1, 80)]
    assert milestones == [29, 49, 70]  # 80 over 2.667, 1.6 and 1.142, rounded down; 80 // 1.6 is 49 in floating point


def test_a_warm_up_starts_at_rest_and_rises_linearly():
    for schedule in SCHEDULES:
        assert [learning_rate(schedule, k, 20, 4) for k in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
        assert learning_rate(schedule, 7, 20, 4) == SCHEDULES[schedule](2, 20)


LIBRARY = {
    "adam": torch.optim.Adam,
    "adam_safe": partial(torch.optim.Adam, betas=(0.5, 0.99), eps=1e-4),
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "lbfgs"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_steps_are_those_of_the_library_with_the_scheduled_rate(name, schedule):
    gradients, start = [draw(3, 2, 4, seed=k) for k in range(1, 6)], draw(3, 2, 4)
    expected = start.clone()
    reference = LIBRARY[name]([expected], lr=0.5)
    for iteration, gradient in enumerate(gradients):
        reference.param_groups[0]["lr"] = 0.5 * SCHEDULES[schedule](iteration, 10)
        expected.grad = gradient.clone()
        reference.step()
    found = moved(gradients, start, optimizer=name, schedule=schedule)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert not found.allclose(start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_problems_and_variables_move_alone(name):
    """V problems in one stepper are V steppers, and images and labels are moved together."""
    images, logits = draw(3, 2, 3, seed=1), draw(3, 2, seed=2)
    minimum = draw(3, 2, 3, seed=3), draw(3, 2, seed=4)

    def run(rows: slice) -> list[Tensor]:
        variables = [images[rows].clone(), logits[rows].clone()]
        stepper = Stepper(variables, replace(PLAIN, optimizer=name, lr=0.1), generators(0))
        for iteration in range(8):
            stepper.step([4 * (x - m[rows]) for x, m in zip(variables, minimum, strict=True)], iteration)
        return variables

    together = run(slice(None))
    for k in range(3):
        for all_of_them, alone, start in zip(together, run(slice(k, k + 1)), (images, logits), strict=True):
            torch.testing.assert_close(all_of_them[k : k + 1], alone, rtol=1e-12, atol=1e-12)
            assert not alone.allclose(start[k : k + 1])


def test_lbfgs_follows_the_scheduled_rate():
    start = draw(2, 5)
    full = moved([draw(2, 5, seed=1)], start, optimizer="lbfgs") - start
    half = moved([draw(2, 5, seed=1)], start, optimizer="lbfgs", schedule="linear", warmup=0, lr=0.25) - start
    torch.testing.assert_close(half, full / 2)
    rest = moved([draw(2, 5, seed=1)], start, optimizer="lbfgs", warmup=5)
    torch.testing.assert_close(rest, start)


def test_hard_signs_forget_sizes_and_soft_ones_grow_into_them():
    start, gradient = torch.zeros(1, 5, dtype=torch.float64), torch.tensor([[-3.0, -0.1, 0.0, 0.2, 4.0]]).double()
    assert moved([gradient], start, signed="hard").tolist() == [[0.5, 0.5, 0, -0.5, -0.5]]
    images = start.clone()
    stepper = Stepper([images], replace(PLAIN, signed="soft", lr=1.0), generators(0))
    for iteration in (0, 4, 9):  # softness 1, 0.6 and 0.1 of 10 iterations
        before, softness = images.clone(), 1 - iteration / 10
        stepper.step([gradient], iteration)
        torch.testing.assert_close(before - images, torch.tanh(softness * gradient) / softness)
    torch.testing.assert_close(before - images, gradient, rtol=0.06, atol=0)  # nearly the gradient at the end


def test_clipping_bounds_each_problem_by_itself():
    gradient = torch.stack([draw(2, 3), 100 * draw(2, 3)])
    gradient[0] *= 0.5 / gradient[0].norm()
    start = torch.zeros_like(gradient)
    steps = -moved([gradient], start, clip=1.0, lr=1.0)
    assert steps[0].equal(gradient[0])
    assert steps[1].norm().item() == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(steps[1] / steps[1].norm(), gradient[1] / gradient[1].norm())
    assert not moved([0 * gradient], start, clip=1.0).any()


def test_noise_has_the_scale_of_the_rate_and_the_seed_of_its_problem():
    start = torch.zeros(4, 1000, dtype=torch.float64)
    still = torch.zeros_like(start)
    noisy = -moved([still], start, generators(1, 2), langevin=3.0)  # two restarts each
    assert noisy.std().item() == pytest.approx(0.5 * 3.0 * 0.5, rel=0.05)  # rate x langevin x rate
    assert noisy.mean().abs() < 0.05
    again, swapped = (-moved([still], start, generators(*seeds), langevin=3.0) for seeds in ((1, 2), (2, 1)))
    assert again.equal(noisy)
    assert swapped[:2].equal(noisy[2:]) and swapped[2:].equal(noisy[:2])
    assert (-moved([still[:2]], start[:2], generators(1), langevin=3.0)).equal(noisy[:2])
    assert not noisy[0].allclose(noisy[1])
    assert not moved([still], start, generators(1, 2), langevin=3.0, warmup=2).any()  # its rate is zero


def test_noise_comes_before_clipping_and_clipping_before_signs():
    start, gradient = torch.zeros(1, 1000, dtype=torch.float64), torch.zeros(1, 1000, dtype=torch.float64)
    clipped = moved([gradient], start, langevin=3.0, clip=0.1, lr=1.0)
    assert clipped.norm().item() == pytest.approx(0.1, rel=1e-4)
    signed = moved([gradient], start, langevin=3.0, clip=0.1, signed="hard", lr=1.0)
    assert signed.abs().eq(1).all() and signed.equal(clipped.sign())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "bad, modified",
    [(math.nan, {}), (math.nan, {"signed": "hard"}), (math.nan, {"signed": "soft"}), (math.nan, {"clip": 1.0})]
    + [(math.inf, {}), (math.inf, {"clip": 1.0}), (-math.inf, {})],  # the sign of infinity is a step like any other
    ids=str,
)
def test_a_problem_without_finite_gradients_stays_and_harms_no_other(name, bad, modified):
    start, gradient = draw(3, 4), draw(3, 4, seed=1)
    broken = gradient.clone()
    broken[1] = bad
    options = {"optimizer": name, "lr": 0.1, **modified}
    found = moved([broken], start, **options)
    kept = start[1] * (1 - 0.1 * 0.01) if name == "adamw" else start[1]  # its weight decay needs no gradient
    torch.testing.assert_close(found[1], kept)
    torch.testing.assert_close(found[::2], moved([gradient[::2]], start[::2], **options))
    later = moved([broken, gradient], start, **options)
    assert later.isfinite().all()


def test_generators_stay_untouched_without_noise():
    own = generators(1, 2)
    before = [copy.copy(generator.get_state()) for generator in own]
    moved([draw(2, 3)], draw(2, 3), own, clip=1.0, signed="soft")
    assert all(generator.get_state().equal(state) for generator, state in zip(own, before, strict=True))
