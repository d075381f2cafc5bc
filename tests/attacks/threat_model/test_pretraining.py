"""A victim that has trained on its images before the round: the weights of the leak are those after the steps."""

import copy

import torch
from torch import nn

from attacks.threat_model.client import Client
from defenses import build_defense
from models.jigsaw import Jigsaw
from tests.attacks.small_victims import MEAN, STD, net


def test_the_weights_have_the_steps_behind_them_and_the_gradient_is_theirs():
    model, steps, lr = net(), 3, 0.05
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True, "local": None}
    client = Client(
        model, Jigsaw(model.grid, 0.0), build_defense("none", {}), 0, terms, ["a", "b"], pretraining=(steps, lr)
    )
    leak = client.round(0, images, ["a", "b"]).leak

    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr)
    for step in range(steps + 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(images), torch.tensor([0, 1])).backward()
        if step < steps:
            optimizer.step()
    for name, value in twin.named_parameters():
        torch.testing.assert_close(leak.model.get_parameter(name), value)
        torch.testing.assert_close(leak.gradients[name], value.grad)
    assert all(a is not b for a, b in zip(leak.model.parameters(), model.parameters(), strict=True))


def test_noise_on_the_round_hides_nothing_that_the_weights_hold():
    """The steps before the round are not defended: what the weights after them tell has no bound."""
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True, "local": None}
    for pretraining in (None, (1, 0.05)):
        model = net()
        client = Client(model, Jigsaw(model.grid, 0.0), build_defense("noise", {"std": 10.0}), 0, terms, ["a", "b"],
                        pretraining=pretraining)  # fmt: skip
        assert (client.round(0, images, ["a"]).private.carried < 10) == (pretraining is None)
