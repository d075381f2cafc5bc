"""The privacy that DP-SGD spends: histories, their composition, and epsilon against Opacus and known values."""

import math
from itertools import pairwise

import pytest

from defenses import build_defense
from defenses.accounting import (
    extended,
    grid_cells,
    guarantee,
    participations,
    poisson_epsilon,
    shuffled_epsilon,
)

DIGITS = 64 / 1258  # share of an update: batches of 64 of the embedded digits, 19 updates an epoch
CIFAR = 128 / 50_000


def test_equal_neighbours_are_one_segment():
    history = extended([], 0.3, DIGITS, 19)
    assert extended(history, 0.3, DIGITS, 19) == [[0.3, DIGITS, 38]] and history == [[0.3, DIGITS, 19]]
    assert extended(history, 0.3, 2 * DIGITS, 9) == [[0.3, DIGITS, 19], [0.3, 2 * DIGITS, 9]]
    assert extended(history, 10.0, DIGITS, 0) == history
    assert extended(None, 10.0, DIGITS, 19) is None


@pytest.mark.parametrize(
    "history, words",
    [
        (None, "does not say how its updates were noised"),
        ([[0.0, DIGITS, 19], [10.0, DIGITS, 19]], "19 of 38 updates were made without clipping or without noise"),
        ([[10.0, DIGITS, 19], [0.0, DIGITS, 1], [10.0, DIGITS, 18]], "1 of 38 updates"),
        ([[0.0, DIGITS, 19]], "no guarantee: no noise"),
    ],
)
def test_one_update_without_a_guarantee_leaves_none(history, words):
    found = guarantee(history, 1e-5)
    assert found["epsilon"] is found["epsilon_shuffled"] is None and words in found["privacy"]


def test_a_resumed_run_answers_for_what_was_before():
    defense, bare = build_defense("dp_sgd", {"noise_multiplier": 10.0}), build_defense("none", {})
    assert defense.account(DIGITS, 19, [[0.0, DIGITS, 19]])["epsilon_shuffled"] is None
    assert defense.account(DIGITS, 19, None)["epsilon_shuffled"] is None
    before = [[0.3, DIGITS, 38]]
    composed = defense.account(DIGITS, 19, before)["epsilon_shuffled"]
    assert composed > shuffled_epsilon(before, 1e-5) > 10 * defense.account(DIGITS, 19)["epsilon_shuffled"]
    assert (
        bare.account(DIGITS, 19, before)["epsilon"] is None
        and "19 of 57" in bare.account(DIGITS, 19, before)["privacy"]
    )
    assert bare.account(DIGITS, 19) == bare.account(DIGITS, 19, [[0.0, DIGITS, 19]]) == {}
    assert build_defense("noise", {}).account(DIGITS, 19, before)["epsilon"] is None
    off = build_defense("dp_sgd", {"clip": 0.0})
    assert off.account(DIGITS, 19) == {} and off.account(DIGITS, 19, before)["epsilon"] is None


def test_an_example_takes_part_once_in_every_epoch_it_may_meet():
    assert participations([[1.0, DIGITS, 38]]) == [(1.0, 2)]
    assert participations([[1.0, DIGITS, 20]]) == [(1.0, 2)]
    assert participations([[1.0, DIGITS, 19], [2.0, DIGITS, 19]]) == [(1.0, 1), (2.0, 1)]
    assert participations([[1.0, DIGITS, 5], [2.0, DIGITS, 14]]) == [(1.0, 1), (2.0, 2)]  # an upper bound
    assert participations([[1.0, 1.0, 3]]) == [(1.0, 3)]
    assert participations([[1.0, 1 / 3, 4]]) == [(1.0, 2)]


@pytest.mark.parametrize("mu, epsilon", [(0.5, 1.9931), (1.0, 4.3772), (3.0, 16.6755)])
def test_shuffled_epsilon_is_that_of_one_gaussian_mechanism(mu, epsilon):
    """Against delta(epsilon) of Balle and Wang, evaluated with the error function."""

    def above(value: float) -> float:
        return math.erfc(value / math.sqrt(2)) / 2

    found = shuffled_epsilon([[1 / mu, 1.0, 1]], 1e-5)
    delta = above(found / mu - mu / 2) - math.exp(found) * above(found / mu + mu / 2)
    assert delta == pytest.approx(1e-5, rel=1e-4)
    assert found == pytest.approx(epsilon, abs=2e-3)
    assert shuffled_epsilon([[2 / mu, 1.0, 4]], 1e-5) == pytest.approx(found)


def test_shuffled_epsilon_grows_with_epochs_and_falls_with_noise():
    epochs = [shuffled_epsilon([[1.0, DIGITS, 19 * number]], 1e-5) for number in (1, 2, 5, 100)]
    noise = [shuffled_epsilon([[z, DIGITS, 19]], 1e-5) for z in (0.01, 0.3, 1.0, 100.0, 1e9)]
    assert all(one < two for one, two in pairwise(epochs)) and all(one > two for one, two in pairwise(noise[:-1]))
    assert noise[-1] < 0.01 and shuffled_epsilon([], 1e-5) == 0


def test_too_little_noise_to_compute_with_is_said():
    found = guarantee([[1e-200, DIGITS, 19]], 1e-5)
    assert found["epsilon"] is None and found["epsilon_shuffled"] is None and "not accounted" in found["privacy"]


def ledger(kind: str, segments: list, delta: float = 1e-5) -> float:
    """Epsilon by Opacus, one step after the other as its users call it."""
    from opacus import accountants  # its import takes a second

    one = accountants.create_accountant(kind)
    for z, q, updates in segments:
        for _ in range(updates):
            one.step(noise_multiplier=z, sample_rate=q)
    return one.get_epsilon(delta)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["rdp", "prv"])
@pytest.mark.parametrize(
    "segments, delta",
    [
        ([[1.0, DIGITS, 19]], 1e-5),
        ([[0.7, 0.01, 1000]], 1e-6),
        ([[1.0, 1.0, 3]], 1e-5),
        ([[0.5, DIGITS, 38], [2.0, DIGITS, 19], [1.0, 0.1, 20]], 1e-5),
    ],
)
def test_epsilon_is_that_of_opacus(kind, segments, delta):
    found = guarantee(segments, delta, kind)
    assert found["epsilon"] == pytest.approx(ledger(kind, segments, delta), rel=1e-9)
    assert found["delta"] == delta and "Poisson" in found["privacy"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("q", [0.013, 0.37, 0.97, 1.0])
@pytest.mark.parametrize("z", [0.3, 8.0])
def test_odd_sampling_rates_are_never_accounted_for_too_little(q, z):
    for updates in (1, 7, 5000):
        whole = poisson_epsilon([[z, q, updates]], 1e-5, "rdp")
        assert whole == pytest.approx(ledger("rdp", [[z, q, updates]]), rel=1e-9)
        if parts := updates // 3:
            split = [[z, q, parts], [z, q, updates - parts]]
            assert poisson_epsilon(split, 1e-5, "rdp") == pytest.approx(whole, rel=1e-6)
        ((_, times),) = participations([[z, q, updates]])
        assert times >= math.ceil(updates * q - 1e-9)  # an example is in q of the updates, at least
        if q == 1:  # the same mechanism either way, and one of the two is exact
            assert whole >= shuffled_epsilon([[z, q, updates]], 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "segments, epsilon",
    [
        ([[0.3, DIGITS, 38]], 51.18),
        ([[0.3, DIGITS, 38], [10.0, DIGITS, 19]], 51.18),
        ([[10.0, DIGITS, 57]], 0.151),
        ([[0.5, DIGITS, 380]], 38.8),
        ([[1.0, CIFAR, 78_000]], 4.45),  # configs/train/cifar10_deit.yaml on the published 50,000 images
        ([[1.0 / 2, CIFAR, 78_000]], 34.9),  # and if an image could change the sum by 2 C
        ([[1.0, DIGITS, 32]], 2.83),  # two epochs of 16 updates
        ([[1.0 / 3, DIGITS / 3, 32]], 22.4),  # and if three copies of an image stood in the batch
    ],
)
def test_epsilon_of_known_runs(segments, epsilon):
    assert guarantee(segments, 1e-5)["epsilon"] == pytest.approx(epsilon, abs=0.005 * 10 ** (epsilon > 10))


@pytest.mark.filterwarnings("ignore")
def test_the_gaussian_limit_composes_too_and_is_called_one():
    split = guarantee([[2.0, DIGITS, 30], [2.0, DIGITS, 8]], 1e-5, "gdp")
    assert split["epsilon"] == pytest.approx(ledger("gdp", [[2.0, DIGITS, 38]])) and "understate" in split["privacy"]
    assert guarantee([[2.0, DIGITS, 38], [8.0, DIGITS, 1]], 1e-5, "gdp")["epsilon"] > split["epsilon"]


def test_what_no_accountant_can_hold_is_said():
    found = guarantee([[1e-3, DIGITS, 19]], 1e-5, "prv")
    assert found["epsilon"] is None and "prv failed" in found["privacy"] and found["epsilon_shuffled"] > 1e5


@pytest.mark.parametrize("z, q, updates", [(1.0, DIGITS, 190), (0.6, CIFAR, 3900), (1.2, 0.01, 2000)])
def test_the_grid_is_about_as_large_as_opacus_makes_it(z, q, updates):
    """Within a factor of 3: Opacus bounds the range of the privacy loss, epsilon by rdp is what is at hand before."""
    from opacus.accountants import PRVAccountant, RDPAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    rdp = RDPAccountant()
    rdp.history = [(z, q, updates)]
    domain = PRVAccountant()._get_domain([PoissonSubsampledGaussianPRV(q, z)], [updates], 0.01, 1e-5 / 1000)
    assert 1 / 3 < grid_cells(rdp.get_epsilon(1e-5), rdp.history, 1e-5) / domain.size < 3
