"""likelihood.py against distributions of torch and defences that draw, and the attack that minimises it."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Laplace, Normal

from attacks.linear.closed_form import closed_form
from attacks.matching import initialization
from attacks.matching.initialization import solved_images
from attacks.matching.likelihood import Likelihood
from attacks.presets.defense_aware import defense_aware
from attacks.threat_model.applicable import unmet_requirement
from attacks.threat_model.client import share
from attacks.threat_model.knowledge import pixel_bounds
from defenses import build_defense
from tests.attacks.small_victims import MEAN, STD, client, generator, vit
from utils.errors import UserError

KNOWN = {
    "noise": {"std": 0.01},
    "laplace": {"scale": 0.01},
    "dp_sgd": {"clip": 0.5, "noise_multiplier": 0.1},
    "prune": {"ratio": 0.9},
    "quantize": {"bits": 8},
}


def gradients(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.randn(40, 50, generator=generator(seed)).double() * size for name, size in (("a", 1), ("b", 3))}


def model_of(name: str, softness: float = 0.3, **options) -> Likelihood:
    return Likelihood(name, KNOWN[name] | options, batch_size=1, softness=softness)


def shared(name: str, true: dict, **options) -> dict:
    return build_defense(name, KNOWN[name] | options).gradients(true, None, generator=generator(1))


@pytest.mark.parametrize("name, law", [("noise", Normal(0, 0.01)), ("laplace", Laplace(0, 0.01))])
def test_noise_has_the_likelihood_of_its_distribution(name, law):
    true, other = gradients(), gradients(2)
    leak = shared(name, true)
    likelihood = model_of(name)
    for one in (true, other):
        found = likelihood.of_tensors(one, leak)
        wanted = [-law.log_prob(leak[key] - one[key]).mean() + law.log_prob(torch.zeros(())).double() for key in leak]
        torch.testing.assert_close(found, wanted)


def test_dp_sgd_is_noise_on_the_clipped_gradient():
    true = gradients()
    norm = math.sqrt(sum(float(value.square().sum()) for value in true.values()))
    clipped = {key: value * 0.5 / (norm + 1e-6) for key, value in true.items()}
    noise = Likelihood("noise", {"std": 0.05}, batch_size=1, softness=1)
    torch.testing.assert_close(
        model_of("dp_sgd").of_tensors(true, gradients(2)), noise.of_tensors(clipped, gradients(2))
    )


def test_censored_entries_have_the_probability_of_their_interval():
    likelihood, soft = model_of("quantize"), 0.3
    leak = shared("quantize", gradients())
    spacing = leak["a"].abs().amax() / 127
    values = []
    for shift in (0.0, 0.4, 0.9, 2.0):
        moved = {"a": leak["a"] + shift * spacing}
        low, high = ((edge - shift) / soft for edge in (-0.5, 0.5))
        exact = -math.log(1 / (1 + math.exp(-high)) - 1 / (1 + math.exp(-low)))
        values.append(float(likelihood.of_tensors(moved, {"a": leak["a"]})[0]) - exact)
    assert max(values) - min(values) < 1e-9  # the same up to a constant


@pytest.mark.parametrize("name, options", [("prune", {}), ("prune", {"scope": "global"}), ("quantize", {"bits": 1})])
def test_the_truth_is_likelier_than_what_the_defence_rules_out(name, options):
    true = gradients()
    leak, likelihood = shared(name, true, **options), model_of(name, softness=0.05, **options)
    best = likelihood(true, leak)
    assert best < likelihood({key: -value for key, value in true.items()}, leak)
    assert best < likelihood({key: 1.5 * value for key, value in true.items()}, leak)
    assert best < likelihood({key: value.roll(1) for key, value in true.items()}, leak)


@pytest.mark.parametrize(("scope", "expected"), [("tensor", [2.0, 0.5, math.inf]), ("global", [0.5, 0.5, 0.5])])
def test_pruning_is_known_by_the_smallest_it_kept(scope, expected):
    shared = {"a": torch.tensor([0.0, -2.0, 3.0]), "b": torch.tensor([0.5, 0.0]), "c": torch.zeros(2)}
    known = Likelihood("prune", {"ratio": 0.5, "scope": scope}, batch_size=1, softness=0.1)
    assert [float(value) for value in known.smallest_kept(shared).values()] == expected


@pytest.mark.parametrize(
    "name, options",
    [*((name, {}) for name in KNOWN), ("quantize", {"bits": 1}), ("quantize", {"rounding": "stochastic"})],
)
def test_the_spread_is_that_of_the_defence(name, options):
    if name == "dp_sgd":
        return torch.testing.assert_close(model_of(name).spread(gradients())["a"], torch.tensor(0.05).double())
    true = gradients()
    leak = shared(name, true, **options)
    measured = float((leak["b"] - true["b"]).square().mean().sqrt())
    assert float(model_of(name, **options).spread(leak)["b"]) == pytest.approx(
        measured, rel=0.25 if name == "prune" else 0.1
    )  # pruned: as if uniform


def test_without_a_defence_it_starts_at_the_closed_form():
    _, leak = client(vit())
    images = solved_images(leak, 2, {}, 10.0, generator())
    low, high = pixel_bounds(leak, images)
    solution = closed_form(leak, generator=generator()).images.float().clamp(low, high)
    assert images[0].equal(solution) and 0.05 < float((images[1] - solution).std()) < 0.15


def test_who_knows_the_rounding_sees_more(monkeypatch):
    monkeypatch.setattr(initialization, "STEPS", 8)
    private, _ = client(vit())
    known = {"defense": "quantize", "defense_options": {"bits": 12}}
    defense = build_defense("quantize", known["defense_options"])
    leak = share(vit(), private, partial(defense.gradients, generator=generator()), True, mean=MEAN, std=STD)

    def error(images: torch.Tensor) -> float:
        return float((images - private.images).square().mean())

    blind = error(closed_form(leak, generator=generator()).images)
    spread = Likelihood(*known.values(), batch_size=1, softness=0.3).spread(leak.gradients)
    start = solved_images(leak, 1, spread, 10.0, generator())[0]
    found = defense_aware(leak, generator=generator(), iterations=20, **known).images
    assert error(found) < error(start) < 0.7 * blind


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "set attack_options.defense to noise, .* got ''"),
        ({"defense": "soteria"}, "got 'soteria'"),
        ({"defense": "noise", "defense_options": {"std": 0.0}}, "leaves nothing to model: use attack 'closed_form'"),
        ({"defense": "dp_sgd", "defense_options": {"noise_multiplier": 0.0}}, "leaves nothing to model"),
        ({"defense": "noise", "defense_options": {"sdt": 1.0}}, "unknown option 'defense_options.sdt'"),
        ({"defense": "noise", "softness": 0.0}, "softness must be above 0"),
        ({"defense": "noise", "layers": "first3"}, "leave layers at 'all'"),
        ({"defense": "noise", "objective": "l2"}, "used with objective 'likelihood'"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    _, leak = client(vit())
    with pytest.raises(UserError, match=words) as refused:
        defense_aware(leak, generator=generator(), iterations=1, **options)
    if not {"layers", "objective"} & options.keys():  # of the attacker's knowledge: before any work, in the same words
        assert unmet_requirement("defense_aware", leak, options) == str(refused.value)


def test_of_several_images_each_is_clipped_apart():
    _, leak = client(vit(), number=2)
    with pytest.raises(UserError, match="one image per gradient"):
        defense_aware(leak, generator=generator(), defense="dp_sgd")


def test_the_start_leaves_the_closed_form_only_as_far_as_the_noise_does():
    """Almost no noise leaves almost nothing for the prior to decide, however smooth it wants the picture."""
    _, leak = client(vit())
    spread = {name: torch.tensor(1e-7, dtype=torch.float64) for name in ("patch_embed.proj.weight", "pos_embed")}
    start = solved_images(leak, 1, spread, 10.0, generator())[0]
    low, high = pixel_bounds(leak, start)
    solution = closed_form(leak, generator=generator()).images.float().clamp(low, high)
    assert float((start - solution).abs().max()) < 1e-2
