"""Federated averaging in epochs of unknown order: the prior, the pairing, and images that come back better for them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.matching.priors import epoch_order
from attacks.presets.dimitrov import _together, dimitrov, epochs_of
from attacks.presets.inverting_gradients import inverting_gradients
from attacks.threat_model.client import Client
from attacks.threat_model.leak import Leak, LocalSteps, Reconstruction
from attacks.threat_model.local_step import epoch_orders, shared_gradient
from defenses import build_defense
from models.jigsaw import Jigsaw
from tests.attacks.small_victims import MEAN, STD, client, generator, net
from utils.errors import UserError

STEPS = (6, 0.05, 2)  # three epochs over four images


def observe(shuffle: bool) -> Leak:
    model = net()
    images = torch.rand(4, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True, "local": STEPS}
    classes = {str(label): label for label in range(5)}
    who = Client(model, Jigsaw(model.grid, 0.0), build_defense("none", {}), 0, terms, classes, local_shuffle=shuffle)
    return who.round(0, images, ["0", "1", "1", "2"]).leak


def test_a_shuffling_client_goes_through_all_images_in_every_epoch():
    orders = epoch_orders(4, LocalSteps(*STEPS), 5).view(3, 4)
    assert all(sorted(order.tolist()) == [0, 1, 2, 3] for order in orders) and len({*map(tuple, orders.tolist())}) > 1
    plain, shuffled = observe(False), observe(True)
    assert not plain.gradients["fc.bias"].allclose(shuffled.gradients["fc.bias"], rtol=1e-6)
    model, images = net(), torch.rand(4, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    targets = nn.functional.one_hot(torch.tensor([0, 1, 1, 2]), 5).double()
    parameters = dict(model.named_parameters())
    again = shared_gradient(model, parameters, tuple(parameters), images, targets, None, LocalSteps(*STEPS))
    for name, value in again.items():
        torch.testing.assert_close(plain.gradients[name], value)


def test_the_prior_does_not_know_the_order_and_is_the_mean_over_pairs_of_epochs():
    images = torch.rand(3, 4, 3, 8, 8, generator=generator(), dtype=torch.float64)
    means = images.mean(dim=1)
    pairs = [(means[a] - means[b]).square().mean() for a in range(3) for b in range(a)]
    torch.testing.assert_close(epoch_order(images.flatten(0, 1), 3), torch.stack(pairs).mean())
    mixed = torch.stack([epoch[torch.randperm(4, generator=generator(k))] for k, epoch in enumerate(images)])
    torch.testing.assert_close(epoch_order(mixed.flatten(0, 1), 3), epoch_order(images.flatten(0, 1), 3))


def test_images_of_all_epochs_are_paired_within_a_label_and_averaged():
    first, labels = torch.randn(4, 3, 8, 8, generator=generator()), torch.tensor([0, 1, 1, 2])
    order = torch.tensor([2, 1, 0, 3])
    other = first[order] + 0.01
    found = Reconstruction(torch.cat([first, other]), {}, torch.cat([labels, labels[order]]))
    together = _together(found, 2)
    torch.testing.assert_close(together.images, first + 0.005)
    assert together.labels.equal(labels) and together.diagnostics["spread"] == pytest.approx(0.005, rel=1e-3)
    wrong = Reconstruction(found.images, {}, torch.cat([labels, torch.tensor([3, 1, 1, 2])]))
    assert _together(wrong, 2).images.shape == first.shape  # labels that do not agree: the nearest that is left


def test_the_attack_lowers_its_objective_and_returns_one_batch():
    leak = observe(True)
    start, found = (dimitrov(leak, generator=generator(), iterations=number, lr=0.1) for number in (0, 40))
    assert found.images.shape == (4, 3, 8, 8) and found.labels.tolist() == [0, 1, 1, 2]
    assert found.diagnostics["epochs"] == 3 and found.diagnostics["objective"] < start.diagnostics["objective"] / 2
    hidden = dimitrov(replace(leak, labels=None), generator=generator(), iterations=2, lr=0.1)
    assert hidden.labels.shape == (4,)


def test_what_it_does_not_apply_to():
    with pytest.raises(UserError, match="goes through its images .here 1. twice or more"):
        dimitrov(client(net())[1], generator=generator())
    for idle in ({"epochs": 2}, {"epoch_order": 1e-3}):
        with pytest.raises(UserError, match="options of the attack dimitrov"):
            inverting_gradients(client(net())[1], generator=generator(), **idle)
    leak = observe(True)
    assert epochs_of(leak) == 3 and epochs_of(replace(leak, local=LocalSteps(3, 0.1, 3))) == 0
