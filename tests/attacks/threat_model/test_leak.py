"""The threat model: what clients share (client.py), and what servers know of it (leak.py, start.py)."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attacks.matching.loss import Phase, ReconstructionLoss
from attacks.matching.options import MatchingOptions
from attacks.matching.problem import build_problem
from attacks.threat_model.applicable import preview_leak
from attacks.threat_model.client import Client, active_dropout, prepare, share
from attacks.threat_model.leak import Leak, LocalSteps
from attacks.threat_model.local_step import (
    autograd_gradient,
    classes_of,
    describe_frozen,
    functional_gradient,
    shared_gradient,
    slice_of,
)
from defenses import DEFENSES, no_defense
from models import build_model
from models.jigsaw import Jigsaw
from models.position import given_mask
from tests.attacks.small_victims import MEAN, STD, Net
from utils.errors import UserError

UNDEFENDED = partial(no_defense, generator=torch.Generator())
SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}


def net(seed: int = 0, **options) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(**options).double().eval()


def vit(**options) -> nn.Module:
    return build_model("vit", num_classes=5, **{**SMALL, **options}).double().eval()


def batch_for(model: nn.Module, number: int = 2, ratio: float = 0.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    side = model.grid[0] * model.patch_size
    images = torch.rand(number, 3, side, side, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (number,), generator=generator)
    return prepare(model, images, labels, Jigsaw(model.grid, ratio, "uniform", seed=seed), 0)


def sgd_client(model: nn.Module, private, local: LocalSteps) -> dict[str, Tensor]:
    """The plain way: torch's optimizer on a copy, then (before - after) / (steps * lr)."""
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=local.lr)
    number = len(private.labels)
    for step in range(local.steps):
        first = step * local.batch_size
        chosen = [place % number for place in range(first, first + min(local.batch_size, number))]
        inputs = (
            (private.model_input[chosen], private.mask) if model.hides_positions else (private.model_input[chosen],)
        )
        optimizer.zero_grad()
        cross_entropy(trained(*inputs), private.labels[chosen]).backward()
        optimizer.step()
    before = dict(model.named_parameters())
    return {k: (before[k] - v).detach() / (local.steps * local.lr) for k, v in trained.named_parameters()}


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            gradients[name], value, rtol=rtol, atol=rtol, msg=lambda text, k=name: f"{k}: {text}"
        )


LOCALS = [
    LocalSteps(1, 0.1, 5),
    LocalSteps(3, 0.05, 2),  # 2 + 2 + 1 and around the end
    LocalSteps(4, 0.2, 3),
    LocalSteps(2, 0.1, 9),  # more than there are: all of them
]


@pytest.mark.parametrize("local", LOCALS, ids=str)
@pytest.mark.parametrize("build", [net, partial(vit, unknown=True)], ids=["net", "mjp"])
def test_weight_updates_are_those_of_an_explicit_sgd_client(build, local):
    model = build()
    private = batch_for(model, number=5, ratio=0.25)
    leak = share(model, private, UNDEFENDED, True, local=local)
    expected = sgd_client(model, private, local)
    assert_same(leak.gradients, expected)
    parameters = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    targets = nn.functional.one_hot(private.labels, 5).double()
    mask = given_mask(model, private.mask)
    for gradient in (functional_gradient, autograd_gradient):
        names = ("fc.bias", "conv.weight") if build is net else ("pos_embed", "head.bias")
        found = shared_gradient(model, parameters, names, private.model_input, targets, mask, local, gradient)
        assert_same(found, {name: expected[name] for name in names})


def test_one_local_step_on_everything_is_the_gradient():
    model = vit(unknown=True)
    private = batch_for(model, number=3, ratio=0.25)
    plain = share(model, private, UNDEFENDED, True)
    updated = share(model, private, UNDEFENDED, True, local=LocalSteps(1, 0.1, 3))
    assert_same(updated.gradients, plain.gradients)
    expected = torch.autograd.grad(
        cross_entropy(model(private.model_input, private.mask), private.labels), list(model.parameters())
    )
    assert_same(plain.gradients, dict(zip(dict(model.named_parameters()), expected, strict=True)))


def test_local_slices_go_around_the_end_of_the_batch():
    assert [slice_of(step, 5, 2) for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert slice_of(1, 2, 3) == [1, 0]


def test_a_round_leaves_no_trace():
    for training in (True, False):
        model = net(norm=True, dropout=0.5).train(training)
        state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        private = batch_for(model)
        options = {"training": True, "dropout_seed": 1, "local": LocalSteps(2, 0.1, 2), "statistics": True}
        leak = share(model, private, UNDEFENDED, True, **options)
        assert classes_of(model, (3, 8, 8)) == 5
        assert torch.get_rng_state().equal(random)
        assert model.training == training
        assert all(value.equal(state[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        shared = [*leak.gradients.values(), *(part for parts in leak.statistics.values() for part in parts)]
        assert not any(value.requires_grad for value in shared)


def test_training_mode_normalises_by_the_batch():
    model = net(norm=True)
    private = batch_for(model, number=4)
    trained = share(model, private, UNDEFENDED, True, training=True).gradients
    expected = copy.deepcopy(model).train()
    cross_entropy(expected(private.model_input), private.labels).backward()
    assert_same(trained, {name: value.grad for name, value in expected.named_parameters()})
    assert not share(model, private, UNDEFENDED, True).gradients["conv.weight"].allclose(trained["conv.weight"])


@pytest.mark.parametrize("local", [None, LocalSteps(2, 0.1, 2)], ids=str)
def test_shared_statistics_are_of_the_whole_batch_before_the_round(local):
    model = net(norm=True)
    private = batch_for(model, number=4)
    leak = share(model, private, UNDEFENDED, True, training=True, statistics=True, local=local)
    features = model.conv(private.model_input).detach()
    (mean, variance), *others = leak.statistics.values()
    assert list(leak.statistics) == ["norm"] and not others
    torch.testing.assert_close(mean, features.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(variance, features.var(dim=(0, 2, 3), unbiased=False))
    assert share(model, private, UNDEFENDED, True).statistics is None
    with pytest.raises(UserError, match="--share_statistics: .* no BatchNorm"):
        share(net(), private, UNDEFENDED, True, statistics=True)


def test_a_batch_batchnorm_cannot_train_on_is_one_clear_line():
    model = build_model("resnet18", num_classes=5, image_size=32).double()
    with pytest.raises(UserError, match="BatchNorm cannot train on one value per channel: use a larger batch"):
        share(model, batch_for(model, number=1), UNDEFENDED, True, training=True)
    assert share(model, batch_for(model, number=2), UNDEFENDED, True, training=True).batch_size == 2


@pytest.mark.parametrize(
    "model, layer",
    [
        (net(dropout=0.5), "drop"),
        (build_model("vit", num_classes=5, **SMALL, attn_drop_rate=0.1), "blocks.0.attn.attn_drop"),
        (build_model("vit", num_classes=5, **SMALL, drop_path=0.1), "blocks.1.drop_path1"),
        (build_model("vit", num_classes=5, **SMALL, patch_drop_rate=0.1), "patch_drop"),
        (build_model("resnet18", num_classes=5, image_size=32, drop_rate=0.1), "ConvolutionalClassifier"),
    ],
    ids=["dropout", "attention", "path", "patches", "functional"],
)
def test_dropout_without_a_seed_is_refused_by_name(model, layer):
    assert active_dropout(model.double()) == layer
    private = batch_for(model)
    with pytest.raises(UserError, match=f"trains with dropout in '{layer}': fix it with --dropout_seed"):
        share(model, private, UNDEFENDED, True, training=True)
    share(model, private, UNDEFENDED, True)  # in evaluation mode nothing drops
    assert active_dropout(vit()) is None and active_dropout(net()) is None


def test_dropout_is_drawn_from_its_seed():
    model = net(dropout=0.5)
    private = batch_for(model)
    one, again, other, none = (
        share(model, private, UNDEFENDED, True, training=training, dropout_seed=seed).gradients["fc.weight"]
        for training, seed in ((True, 1), (True, 1), (True, 2), (False, 1))
    )
    assert one.equal(again)
    assert not one.allclose(other) and not one.allclose(none)


def test_withheld_gradients_stay_on_the_device():
    model = vit(unknown=True)
    private = batch_for(model)
    everything = share(model, private, UNDEFENDED, True).gradients
    leak = share(model, private, UNDEFENDED, True, withhold=["pos_embed", "head.*"])
    assert everything.keys() - leak.gradients.keys() == {"pos_embed", "head.weight", "head.bias"}
    with pytest.raises(UserError, match="--withhold 'pos_embd' names no shared gradient: did you mean 'pos_embed'"):
        share(model, private, UNDEFENDED, True, withhold=["head.*", "pos_embd"])
    assert not share(model, private, UNDEFENDED, True, withhold=["*"]).gradients


@pytest.mark.parametrize("local", [None, LocalSteps(3, 0.1, 1)], ids=str)
def test_frozen_parameters_are_not_trained_and_not_shared(local):
    model = net()
    private = batch_for(model)
    everything = share(model, private, UNDEFENDED, True).gradients
    model.conv.requires_grad_(False)
    leak = share(model, private, UNDEFENDED, True, local=local)
    assert leak.gradients.keys() == {"fc.weight", "fc.bias"}
    if local is None:
        assert_same(leak.gradients, {name: everything[name] for name in leak.gradients})
    else:  # an explicit client whose optimizer holds the head alone
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.fc.parameters(), lr=local.lr)
        for step in range(local.steps):
            optimizer.zero_grad()
            chosen = slice_of(step, 2, 1)
            cross_entropy(trained(private.model_input[chosen]), private.labels[chosen]).backward()
            optimizer.step()
        before = dict(model.named_parameters())
        rate = local.steps * local.lr
        expected = {f"fc.{k}": (before[f"fc.{k}"] - v).detach() / rate for k, v in trained.fc.named_parameters()}
        assert_same(leak.gradients, expected)
    model.arguments = {"image_size": 8}
    preview = preview_leak(model, 2, reveal_labels=True, local=None)
    assert preview.gradients.keys() == leak.gradients.keys()
    assert describe_frozen(model).startswith("2 of 4 parameters are frozen and not shared (112 of 437 values): conv.w")
    with pytest.raises(UserError, match="nothing of this model is trained"):
        share(model.requires_grad_(False), private, UNDEFENDED, True)


def test_an_attacker_repeats_the_steps_of_a_client_with_frozen_parameters():
    model = net()
    model.conv.requires_grad_(False)
    private = batch_for(model, number=3)
    leak = share(model, private, UNDEFENDED, True, local=LocalSteps(4, 0.2, 2))
    assert objective_at_the_truth(leak, private) < 1e-24


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("local", [None, (3, 0.1, 2)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_told_labels_are_those_of_the_step(name, local, training):
    """The gradient at the model's input and the labels told is the leak, where no defence changes the gradient."""
    options = {"ats": {"policies": "3-1-7"}, "mixup": {"mixed": 3}, "withhold": {"names": "fc.bias"}}
    defense = DEFENSES[name](**options.get(name, {}))
    if defense.changes_gradients and name != "withhold":
        defense = DEFENSES[name](**{defense.strength: defense.off})
    model = net(norm=True)
    images = batch_for(model, number=4).images
    terms = {"reveal_labels": True, "local": local, "training": training, "mean": MEAN, "std": STD}
    one = Client(model, Jigsaw(model.grid, 0.5, "uniform"), defense, 0, terms, list("abcde")).round(
        0, images, [*"abda"]
    )
    assert one.leak.labels.dim() == (2 if name == "mixup" else 1)
    assert objective_at_the_truth(one.leak, one.private) < 1e-22
    if name == "mixup":
        torch.testing.assert_close(one.leak.labels.sum(dim=1), torch.ones(4).double(), rtol=0, atol=1e-6)
        hard = replace(one.leak, labels=one.private.labels)
        assert objective_at_the_truth(hard, one.private) > 1e-6  # what told hard labels would hide


def objective_at_the_truth(leak: Leak, private) -> float:
    """The relative squared distance of the gradient of the true model input with the labels told."""
    options = MatchingOptions(objective="l2")
    problem = build_problem([leak], options, [torch.Generator()])
    data = {name: value[0] for name, value in problem.data.items() if name.startswith("target/")}
    loss = ReconstructionLoss(problem, options)
    distance = loss(Phase(1.0, 0.0, {}), private.model_input, problem.targets[0], data)[1].detach()
    return float(distance) / sum(float(value.square().sum()) for value in leak.gradients.values())


def test_models_that_are_no_classifiers_are_refused():
    single = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    single.hides_positions, single.grid, single.patch_size = False, (2, 2), 4
    private = batch_for(net())
    with pytest.raises(UserError, match='has 1 output, .* constant.*--leak FILE .*loss="bce"'):
        share(single.double(), private, UNDEFENDED, True)
    features = net()
    features.num_classes = 0
    with pytest.raises(UserError, match="has no classifier"):
        share(features, private, UNDEFENDED, True)


def test_the_defence_sees_every_gradient_and_only_gradients():
    seen = {}

    def halve(gradients: dict[str, Tensor], step) -> dict[str, Tensor]:
        seen.update(gradients)
        return {name: value / 2 for name, value in gradients.items()}

    model = net()
    private = batch_for(model)
    plain = share(model, private, UNDEFENDED, True).gradients
    defended = share(model, private, halve, True, withhold=["conv.bias"]).gradients
    assert_same(seen, plain)
    assert_same(defended, {name: value / 2 for name, value in plain.items() if name != "conv.bias"})
