"""The gradient-matching loop: what it keeps, and that no victim notices another."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

from attacks.matching import priors, problem
from attacks.threat_model.client import share
from attacks.threat_model.leak import Leak, LocalSteps
from tests.attacks.small_victims import (
    MEAN,
    STD,
    UNDEFENDED,
    attack,
    client,
    close,
    generator,
    image_prior_file,
    leaks_of,
    match,
    net,
    same,
    start_at,
    swin,
    vit,
)
from utils.errors import UserError

# --- the truth is a zero ----------------------------------------------------------------------------------------------


TRUTHS = {
    "gradient": (net, {}),
    "batch": (net, {"number": 3}),
    "update": (net, {"number": 3, "local": LocalSteps(3, 0.1, 2)}),
    "batch statistics": (partial(net, norm=True), {"number": 3, "training": True}),
    "running statistics": (partial(net, norm=True), {"number": 3}),
    "dropout": (partial(net, dropout=0.5), {"number": 2, "training": True, "dropout_seed": 3}),
    "dropout over steps": (
        partial(net, dropout=0.5),
        {"number": 3, "training": True, "dropout_seed": 3, "local": LocalSteps(3, 0.1, 2)},
    ),
    "withheld": (net, {"withhold": ["fc.*"]}),
    "vit": (vit, {"number": 2}),
    "swin": (swin, {"number": 2}),
    "shuffled": (vit, {"ratio": 0.5}),
    "mask inferred": (partial(vit, unknown=True), {"number": 2, "ratio": 0.5}),
    "mask told": (partial(vit, unknown=True), {"number": 2, "ratio": 0.5, "attacker_knowledge": "mask"}),
    "mask after steps": (partial(vit, unknown=True), {"number": 2, "ratio": 0.5, "local": LocalSteps(2, 0.1, 1)}),
    "mask told, embedding withheld": (
        partial(vit, unknown=True),
        {"ratio": 0.5, "attacker_knowledge": "mask", "withhold": ["pos_embed"]},
    ),
}


@pytest.mark.parametrize("objective", ["l2", "cosine"])
@pytest.mark.parametrize("build, terms", TRUTHS.values(), ids=TRUTHS)
def test_what_the_model_was_shown_has_objective_zero(monkeypatch, build, terms, objective):
    private, leak = client(build(), **terms)
    start_at(monkeypatch, private.model_input)
    assert abs(attack(leak, objective=objective, iterations=0).diagnostics["objective"]) < 1e-12
    start_at(monkeypatch, private.model_input + 0.1)
    assert attack(leak, objective=objective, iterations=0).diagnostics["objective"] > 1e-9


@pytest.mark.parametrize("unknown", [True, False])
def test_knowing_the_permutation_makes_the_original_the_zero(monkeypatch, unknown):
    private, leak = client(vit(unknown=unknown), number=2, ratio=0.5, attacker_knowledge="permutation")
    found = {}
    for name in ("images", "model_input"):
        start_at(monkeypatch, getattr(private, name))
        found[name] = attack(leak, iterations=0).diagnostics["objective"]
    assert abs(found["images"]) < 1e-12
    assert (found["model_input"] < 1e-12) == unknown  # under MJP no gradient knows the order of the masked patches


def test_a_model_in_training_mode_is_attacked_as_the_leak_says(monkeypatch):
    model = net(norm=True)
    private, leak = client(model, number=2)
    model.train()
    state = copy.deepcopy(model.state_dict())
    start_at(monkeypatch, private.model_input)
    assert attack(leak, iterations=0).diagnostics["objective"] < 1e-12
    attack(leak, batch_norm=0.1, iterations=2)
    same(
        attack(leak, iterations=2),
        attack(replace(leak, model=copy.deepcopy(model).requires_grad_(False)), iterations=2),
    )
    assert model.training and all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_features_of_the_truth_are_the_target(iterates, monkeypatch):
    private, leak = client(net(dropout=0.5), training=True, dropout_seed=5)
    start_at(monkeypatch, private.model_input)
    attack(leak, features=1.0, objective_weight=0.0, iterations=0)
    assert float(iterates[-1][1]) < 1e-15
    start_at(monkeypatch, private.model_input + 0.1)
    attack(leak, features=1.0, objective_weight=0.0, iterations=0)
    assert float(iterates[-1][1]) > 1e-6


@pytest.mark.parametrize(
    "knowledge, terms, used",
    [
        ("none", {}, "none"),
        ("method", {}, "inferred"),
        ("method", {"withhold": ["pos_embed"]}, "none"),
        ("mask", {}, "told"),
        ("mask", {"withhold": ["pos_embed"]}, "told"),
        ("permutation", {}, "told"),
    ],
)
def test_knowledge_decides_what_the_model_is_fed(monkeypatch, knowledge, terms, used):
    private, leak = client(vit(unknown=True), ratio=0.5, attacker_knowledge=knowledge, **terms)
    start_at(monkeypatch, private.images if knowledge == "permutation" else private.model_input)
    result = attack(leak, iterations=0)
    assert result.diagnostics["mask"] == used
    assert (result.diagnostics["objective"] < 1e-12) == (used != "none")


def test_models_without_a_mask_say_so():
    _, leak = client(vit(), ratio=0.5, attacker_knowledge="mask")
    assert attack(leak, iterations=0).diagnostics["mask"] == "none"


# --- company ----------------------------------------------------------------------------------------------------------


NEWTON = {"optimizer": "lbfgs", "objective": "l2", "lr": 1.0, "boxed": False, "iterations": 12}
LOOPS = {
    "adam": {"tv": 0.1},
    "signed": {"signed": "hard", "schedule": "step", "tv": 0.1, "restarts": 2},
    "lbfgs": NEWTON,
    "lbfgs and joint labels": NEWTON | {"labels": "joint", "restarts": 2},
    "joint labels": {"labels": "joint", "objective": "l2"},
    "group": {"group": 0.01, "restarts": 3, "langevin": 0.1, "batch_norm": 0.01},
    "noise": {"langevin": 0.5, "init": "rand", "schedule": "cosine", "warmup": 1, "clip": 0.1, "restarts": 2},
    "patterned": {"init": "patterned-3", "signed": "soft", "features": 0.1, "median_every": 2},
}


@pytest.mark.parametrize("options", LOOPS.values(), ids=LOOPS)
def test_a_victim_is_attacked_as_if_it_were_alone(options):
    hidden = options.get("labels") == "joint"
    leaks = leaks_of(net(norm=True), victims=3, number=2, hidden=hidden)
    alone = [attack(leak, [seed], **options) for leak, seed in zip(leaks, (5, 6, 7), strict=True)]
    for one, other in zip(attack(leaks, [5, 6, 7], **options), alone, strict=True):
        same(one, other)
    for one, other in zip(attack(leaks[::-1], [7, 6, 5], chunk=2, **options), alone[::-1], strict=True):
        same(one, other)
    same(attack(leaks[:2], [5, 6], chunk=1, **options)[1], alone[1])
    assert not alone[0].images.allclose(attack(leaks[0], [6], **options).images)
    assert all(result.diagnostics["iterations"] == options.get("iterations", 4) for result in alone)


def unlike(kind: str) -> tuple[list[Leak], dict]:
    """Two leaks that cannot be one vectorised problem."""
    hiding = vit(unknown=True)
    shuffled = {"ratio": 0.5, "seed": 1}
    return {
        "labels": ([client(net(), hidden=True)[1], client(net(), seed=1)[1]], {"labels": "joint"}),
        "batch": ([client(net())[1], client(net(), number=2, seed=1)[1]], {}),
        "model": ([client(net())[1], client(net(1), seed=1)[1]], {}),
        "attacker_knowledge": (
            [client(hiding, ratio=0.5, attacker_knowledge="none")[1], client(hiding, **shuffled)[1]],
            {},
        ),
        "step": ([client(net())[1], client(net(), seed=1, local=LocalSteps(2, 0.1, 1))[1]], {}),
        "withheld": ([client(net())[1], client(net(), seed=1, withhold=["fc.*"])[1]], {}),
        "box": ([client(net())[1], replace(client(net(), seed=1)[1], std=(0.05, 0.05, 0.05))], {"lr": 1.0}),
    }[kind]


@pytest.mark.parametrize("kind", ["labels", "batch", "model", "attacker_knowledge", "step", "withheld", "box"])
def test_leaks_that_are_unlike_are_attacked_one_by_one(kind):
    leaks, options = unlike(kind)
    for k, result in enumerate(attack(leaks, **options)):
        same(result, attack(leaks[k], [k], **options))


def test_the_largest_tensors_may_differ_from_victim_to_victim():
    model = net()
    leaks = leaks_of(model, victims=2)
    scaled = {name: value * (100.0 if name == "conv.bias" else 1.0) for name, value in leaks[1].gradients.items()}
    leaks[1] = replace(leaks[1], gradients=scaled)
    for k, result in enumerate(attack(leaks, layers="top1")):
        same(result, attack(leaks[k], [k], layers="top1"))


def test_a_victim_that_is_done_waits_for_no_other(monkeypatch):
    model = net()
    (private, easy), (_, hard) = client(model), client(model, seed=1)
    near = private.model_input + 1e-3
    starts = {id(easy): near[None], id(hard): torch.zeros_like(near)[None]}
    monkeypatch.setattr(problem, "first_images", lambda leak, *_: starts[id(leak)])
    options = {"objective": "l2", "optimizer": "sgd", "lr": 1e-3, "boxed": False}
    reached = attack(easy, iterations=24, **options).diagnostics["objective"]
    options["iterations"] = 60
    alone = attack(easy, stop_below=reached, **options)
    assert alone.diagnostics["iterations"] == 30  # the first look after 24
    assert alone.diagnostics["objective"] < reached
    both = attack([easy, hard], stop_below=reached, **options)
    same(both[0], alone)
    assert both[1].diagnostics["iterations"] == 60
    starts[id(easy)] = torch.stack([torch.zeros_like(near), near])
    restarted = attack(easy, stop_below=reached, restarts=2, **options)  # one of them is enough
    assert restarted.diagnostics == alone.diagnostics | {"restart": 1, "objective": pytest.approx(reached, rel=0.5)}


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tv": 5.0, "lr": 0.5}, {"objective": "l2", "median_every": 3}], ids=str)
def test_the_objective_belongs_to_the_image_that_is_returned(iterates, monkeypatch, options):
    _, leak = client(net(), number=2)
    result = attack(leak, iterations=12, restarts=2, **options)
    chosen = result.diagnostics["restart"]
    totals = torch.stack([total[chosen] for _, total, _ in iterates[1:]])
    images, _, distance = iterates[1 + int(totals.argmin())]
    assert result.images.equal(images[chosen])
    assert result.diagnostics["objective"] == float(distance[chosen])
    start_at(monkeypatch, result.images)
    again = attack(leak, iterations=0, **options)
    assert again.diagnostics["objective"] == pytest.approx(result.diagnostics["objective"], rel=1e-9)


def test_the_last_iterate_is_returned_when_asked(iterates, monkeypatch):
    private, leak = client(net(), number=2)
    near = private.model_input + 1e-3
    start_at(monkeypatch, near)
    options = {"signed": "hard", "lr": 0.5, "boxed": False}
    assert attack(leak, **options).images.equal(near)  # the best
    iterates.clear()
    result = attack(leak, keep="last", **options)
    images, _, distance = iterates[-1]
    assert len(iterates) == 5 and not images[0].equal(near)
    assert result.images.equal(images[0]) and result.diagnostics["objective"] == float(distance[0])
    with pytest.raises(UserError, match="'keep'.*best, last"):
        attack(leak, iterations=1, keep="first")


def test_restarts_are_chosen_by_the_objective_alone(monkeypatch):
    private, leak = client(net())
    flat, near = torch.zeros_like(private.model_input), private.model_input + 0.01
    start_at(monkeypatch, flat, near, flat)
    result = attack(leak, restarts=3, tv=1e3, iterations=0)
    assert result.diagnostics["restart"] == 1
    assert result.images.equal(near)


def test_the_candidate_stays_in_the_box(iterates):
    _, leak = client(net(), number=2)
    low, high = ((torch.tensor(edge) - torch.tensor(MEAN)) / torch.tensor(STD) for edge in (0.0, 1.0))
    low, high = low.view(3, 1, 1) - 1e-6, high.view(3, 1, 1) + 1e-6
    result = attack(leak, lr=3.0, iterations=10, signed="hard")
    outside = [bool(((images < low) | (images > high)).any()) for images, *_ in iterates]
    assert outside == [True] + [False] * 10  # a normal start is not
    assert ((result.images >= low) & (result.images <= high)).all()
    touching = [bool((images[0, :, 0].amin() - low[0]).abs() < 1e-5) for images, *_ in iterates[1:]]
    assert all(touching)
    free = attack(leak, lr=3.0, iterations=10, signed="hard", boxed=False)
    assert ((iterates[-1][0] < low) | (iterates[-1][0] > high)).any() and free.images.isfinite().all()


def test_the_box_counts_even_where_the_start_was_best(monkeypatch):
    private, leak = client(net())
    outside = private.model_input.clone()
    outside[..., 0, 0] = 9.0
    leak = replace(leak, gradients=share(net(), replace(private, model_input=outside), UNDEFENDED, True).gradients)
    start_at(monkeypatch, outside)
    assert attack(leak, iterations=1, boxed=False).images.equal(outside)
    assert attack(leak, iterations=1).images.max() < 3


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize("victims", [1, 2])
def test_a_restart_that_diverges_is_left_out_and_counted(monkeypatch, optimizer, victims):
    leaks = leaks_of(net(), victims=victims)
    good = torch.randn(1, 3, 8, 8, generator=generator(9), dtype=torch.float64)
    options = {"optimizer": optimizer, "objective": "l2", "boxed": False, "iterations": 6}
    start_at(monkeypatch, good)
    alone = [attack(leak, **options) for leak in leaks]
    start_at(monkeypatch, torch.full_like(good, math.nan), good)
    results = attack(leaks, restarts=2, group=0.0, **options)
    for result, expected in zip(results, alone, strict=True):
        assert (result.diagnostics["restart"], result.diagnostics["diverged"]) == (1, 1)
        close(result.images, expected.images)
    start_at(monkeypatch, torch.full_like(good, math.nan), good)
    for result in attack(leaks, restarts=2, group=0.1, **options):
        assert result.diagnostics["diverged"] == 1 and result.images.isfinite().all()


def test_an_attack_that_diverges_says_so(iterates):
    _, leak = client(net())
    options = {"optimizer": "sgd", "lr": 1e200, "mean_square": 1.0, "boxed": False}
    result = attack(leak, restarts=2, iterations=5, **options)
    assert result.diagnostics["diverged"] == 2
    assert result.images.isfinite().all()  # the best before
    assert result.diagnostics["objective"] == float(iterates[0][2].min())


def test_the_median_filter_acts_when_asked(iterates):
    _, leak = client(net(), number=2)
    attack(leak, lr=0.0, boxed=False, median_every=2, iterations=4)
    images = [x[0] for x, *_ in iterates]
    once = priors.median_filter(images[0])
    expected = [images[0], images[0], once, once, priors.median_filter(once)]
    assert all(found.equal(wanted) for found, wanted in zip(images, expected, strict=True))
    assert not once.allclose(images[0])


def test_the_second_phase_brings_the_image_prior_and_forgets_earlier_totals(iterates, tmp_path):
    _, leak = client(net())
    prior = {"image_prior": 2.0, "image_prior_checkpoint": image_prior_file(tmp_path)}
    options = {"lr": 0.0, "iterations": 4, "objective_weight": 3.0, "second_objective_weight": 0.5, **prior}
    result = attack(leak, second_phase=0.5, boxed=False, **options)
    totals, distance = torch.stack([total[0] for _, total, _ in iterates]), iterates[0][2][0]
    expected = 2 * (totals[-1] - 0.5 * distance) / 2
    torch.testing.assert_close(totals[:2], 3 * distance.expand(2))
    torch.testing.assert_close(totals[2:], (0.5 * distance + expected).expand(3))
    assert expected > 1  # the prior, without which the second phase would seem better
    assert result.diagnostics["objective"] == float(distance)
    iterates.clear()
    attack(leak, boxed=False, **options)
    torch.testing.assert_close(iterates[0][1][0], 3 * distance + expected)
    iterates.clear()
    result = attack(leak, second_phase=0.5, **options | {"lr": 0.1, "image_prior": 200.0, "iterations": 8})
    totals = torch.stack([total[0] for _, total, _ in iterates])
    assert totals[:4].max() < totals[4:].min()
    assert result.images.equal(iterates[4 + int(totals[4:].argmin())][0][0])


def test_watchers_see_the_best_so_far_of_every_victim():
    leaks, seen = leaks_of(net(), victims=3, number=2), []

    def watch(iteration: int, iterations: int, snapshot: Callable) -> None:
        images, objectives = snapshot()
        seen.append((iteration, iterations, images.clone(), objectives.clone()))

    results = match(leaks, generator=[generator(k) for k in range(3)], iterations=5, restarts=2, watch=watch)
    assert [entry[:2] for entry in seen] == [(k, 5) for k in range(6)]
    assert seen[0][2].shape == (3, 2, 3, 8, 8) and seen[0][3].shape == (3,)
    assert seen[-1][2].equal(torch.stack([result.images for result in results]))
    assert seen[-1][3].tolist() == [result.diagnostics["objective"] for result in results]


def test_attacks_repeat_bit_by_bit_and_leave_the_global_generator_alone():
    _, leak = client(net(dropout=0.5), number=2, training=True, dropout_seed=2, hidden=True)
    options = {"langevin": 0.1, "restarts": 2, "init": "uniform", "labels": "analytic"}
    state = torch.get_rng_state()
    one, again, other = (attack(leak, [seed], **options) for seed in (1, 1, 2))
    assert one.images.equal(again.images) and one.diagnostics == again.diagnostics
    assert not one.images.allclose(other.images)
    assert torch.get_rng_state().equal(state)


def test_an_easy_victim_is_reconstructed():
    private, leak = client(net(), hidden=True)
    result = attack(leak, iterations=300, signed="hard", schedule="step", tv=1e-3)
    assert result.labels.equal(private.labels)
    assert float((result.images - private.model_input).square().mean()) < 0.2 * float(
        private.model_input.square().mean()
    )
    start, end = attack(leak, iterations=0).diagnostics["objective"], result.diagnostics["objective"]
    assert end < 0.05 * start
