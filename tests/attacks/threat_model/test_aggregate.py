"""Secure aggregation: the server sees the weighted mean of several clients and nothing of each."""

from dataclasses import astuple, replace

import pytest
import torch
from torch import Tensor, nn

from attacks.joint.joint import joint
from attacks.label_recovery import recover_labels
from attacks.threat_model.applicable import applicable, preview_leak
from attacks.threat_model.client import Aggregation, Client, Round
from attacks.threat_model.knowledge import known_mask
from attacks.threat_model.leak import LocalSteps
from attacks.threat_model.local_step import autograd_gradient, functional_gradient, shared_gradient
from defenses import build_defense
from eval.reconstruction import score_batch
from models import build_model
from models.jigsaw import Jigsaw
from options import AttackConfig
from tests.attacks.joint.test_joint import SMALL, in_place, pictures
from tests.attacks.small_victims import MEAN, STD, VIT, attack, close, generator, net, vit
from utils.errors import UserError

FOLDERS = {f"class{place}": place for place in range(5)}


def client_of(
    model: nn.Module, aggregation: Aggregation | None, ratio: float = 0.0, defense: str = "none", **terms
) -> Client:
    options = {"std": 1e-3} if defense == "noise" else {}
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True} | terms
    jigsaw = Jigsaw(model.grid, ratio, "uniform", seed=0)
    return Client(
        model, jigsaw, build_defense(defense, options), 0, terms, FOLDERS, together=aggregation and astuple(aggregation)
    )


def round_of(client: Client, images: Tensor, index: int = 0) -> Round:
    return client.round(index, images, [f"class{place % 5}" for place in range(len(images))])


@pytest.mark.parametrize("number", [6, 5])  # the last client of five has one image: it weighs half
@pytest.mark.parametrize("build", [net, vit])
def test_the_mean_over_clients_is_the_gradient_of_the_joined_batch(build, number):
    model = build()
    images = pictures(number, side=model.grid[0] * model.patch_size)
    joined = round_of(client_of(model, None), images).leak
    private, leak, _ = round_of(client_of(model, Aggregation(3, 2)), images)
    assert leak.batch_size == number and leak.aggregate.sizes == ((2, 2, 2) if number == 6 else (2, 2, 1))
    assert leak.labels.equal(joined.labels) and private.images.equal(images)
    for name, value in joined.gradients.items():
        close(leak.gradients[name], value)


def test_one_client_that_is_left_is_no_aggregate():
    model, images = vit(unknown=True), pictures(2, side=32)
    leak = round_of(client_of(model, Aggregation(2, 2, (3.0, 1.0)), ratio=0.5, attacker_knowledge="mask"), images).leak
    alone = round_of(client_of(model, None, ratio=0.5, attacker_knowledge="mask"), images).leak
    assert leak.aggregate is None and leak.mask.equal(alone.mask)
    assert all(leak.gradients[name].equal(value) for name, value in alone.gradients.items())


@pytest.mark.parametrize("local", [None, (2, 0.1, 1)])
def test_each_client_shares_what_it_would_share_alone(local):
    model, images = vit(unknown=True), pictures(4, side=32)
    terms = {"ratio": 0.5, "defense": "noise", "local": local}
    _, leak, _ = round_of(client_of(model, Aggregation(2, 2, (3.0, 1.0)), **terms), images)
    alone = client_of(model, None, **terms)
    one, other = (alone.round(at, images[at : at + 2], [f"class{at}", f"class{at + 1}"]).leak for at in (0, 2))
    assert leak.aggregate.weights == (0.75, 0.25) and leak.aggregate.image_weights == (0.375, 0.375, 0.125, 0.125)
    for name, value in leak.gradients.items():
        close(value, 0.75 * one.gradients[name] + 0.25 * other.gradients[name])


@pytest.mark.parametrize("gradient", [functional_gradient, autograd_gradient])
@pytest.mark.parametrize("local", [None, (2, 0.1, 1)])
def test_an_attacker_repeats_what_the_clients_did(local, gradient):
    """Masks, permutations and weights are told: the gradient of the true images is the leaked one."""
    model = vit(unknown=True)
    terms = {"ratio": 0.5, "local": local, "attacker_knowledge": "permutation"}
    private, leak, _ = round_of(client_of(model, Aggregation(2, 2, (2.0, 1.0)), **terms), pictures(4, side=32))
    targets = nn.functional.one_hot(leak.labels, 5).double()
    parameters, names = dict(model.named_parameters()), tuple(leak.gradients)
    mask = known_mask(leak)["mask"]
    steps = LocalSteps(*local) if local else None
    given = model, parameters, names, private.model_input, targets
    for name, value in shared_gradient(*given, mask, steps, gradient, leak.aggregate).items():
        close(value.detach(), leak.gradients[name])
    of_one = shared_gradient(*given, mask[:1], steps, gradient)
    assert any(not value.allclose(leak.gradients[name]) for name, value in of_one.items())


@pytest.mark.parametrize(
    "attacker_knowledge, told",
    [("none", set()), ("method", set()), ("mask", {"mask", "shuffled_mask"}), ("permutation", {"mask", "source"})],
)
def test_every_client_draws_a_mask_of_its_own_which_the_sum_does_not_tell(attacker_knowledge, told):
    client = client_of(vit(unknown=True), Aggregation(2, 2), ratio=0.5, attacker_knowledge=attacker_knowledge)
    private, leak, _ = round_of(client, pictures(4, side=32))
    assert private.mask.shape == (4, 16) and private.mask[0].equal(private.mask[1])
    assert not private.mask[0].equal(private.mask[2])
    known = known_mask(leak)
    assert known.keys() == told and all(value.shape == (4, 16) for value in known.values())
    found = attack(leak, iterations=2)
    views, rows = score_batch(private.images, private.model_input, found.images, private.mask, private.labels, None, 8)
    assert len(rows) == len(views["reconstructions"]) == 4


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
def test_joint_returns_the_images_of_all_clients(weights):
    model = vit(**SMALL)
    private, leak, _ = round_of(client_of(model, Aggregation(2, 2, weights)), pictures(4))
    found = joint(leak, generator=generator())
    assert found.diagnostics["exact"] and in_place(found, private).max() < 1e-4


def test_labels_are_counted_with_the_weights_of_their_clients():
    model = build_model("vit", num_classes=12, **VIT).double().eval()
    client = client_of(model, Aggregation(2, 2, (3.0, 1.0)), reveal_labels=False)
    private, leak, _ = round_of(client, pictures(4, side=32))
    assert recover_labels(leak, "class_features", generator()).tolist() == private.labels.sort().values.tolist()


def test_attacks_on_one_image_do_not_apply_to_one_image_of_each_client():
    model = vit()
    verdicts = applicable(
        preview_leak(model, 2, reveal_labels=True, local=None, aggregate=Aggregation(2, 1).of(2), mean=MEAN, std=STD)
    )
    assert verdicts["closed_form"] and verdicts["rgap"] and not verdicts["inverting_gradients"]
    leak = round_of(client_of(model, Aggregation(2, 1)), pictures(2, side=32)).leak
    for options in ({"objective": "likelihood", "defense": "noise", "defense_options": {"std": 1e-3}},
                    {"finite_difference": 0.01}):  # fmt: skip
        with pytest.raises(UserError, match="several clients"):
            attack(leak, **options)


def test_noise_that_drowns_every_token_is_one_clear_line():
    client = client_of(vit(**SMALL), Aggregation(2, 1), defense="noise")
    leak = round_of(client, pictures(2)).leak
    own = generator()
    noise = {name: torch.randn(value.shape, generator=own).to(value) for name, value in leak.gradients.items()}
    with pytest.raises(UserError, match="no patch above the noise"):
        joint(replace(leak, gradients=noise), generator=own)


@pytest.mark.parametrize("terms", [{"statistics": True}, {"dropout_seed": 3}])
def test_what_clients_have_one_each_of_is_not_told(terms):
    with pytest.raises(UserError, match="each has its own"):
        client_of(net(), Aggregation(2, 1), **terms)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clients": 0}, "--clients must be at least 1"),
        ({"clients": 3, "client_weights": [1.0, 2.0]}, "for each of --clients 3"),
        ({"clients": 2, "client_weights": [1.0, 0.0]}, "above 0"),
        ({"clients": 2, "client_weights": [1.0, float("nan")]}, "above 0"),
        ({"client_weights": []}, "got none"),
        ({"clients": 2, "share_statistics": True}, "share_statistics"),
        ({"clients": 2, "train_mode": True, "dropout_seed": 1}, "dropout_seed"),
        ({"clients": 3, "batch_size": 2, "audit": True}, "--batch_size 6"),
        ({"clients": 2, "client_dropout": 1.0}, "from 0 to below 1"),
        ({"client_dropout": 0.5}, "used with --clients"),
        ({"clients": 2, "client_weights": [1.0, 2.0], "client_dropout": 0.5}, "differs from round to round"),
        ({"clients": 2, "leak": "step.safetensors"}, "whose file says it"),
    ],
)
def test_impossible_aggregates_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message):
        AttackConfig(**{"model": "deit_tiny", "images": "photographs", "output": "out"} | options)
