"""Training under any defence: fresh orders, separate draws, labels smoothed once, an average that starts anew."""

import pytest
import torch

from attacks.threat_model.client import Client
from data.loaders import EpochSampler
from defenses import build_defense
from models.jigsaw import Jigsaw
from tests.defenses.test_dp_sgd import batch, network, trainer


def test_every_epoch_has_its_own_order_and_every_image_once():
    sampler, orders = EpochSampler(24, 6, seed=0), []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append([index for indices in sampler for index, _ in indices])
        assert sorted(orders[-1]) == list(range(24))
    assert orders[0] == orders[2] != orders[1]


def test_the_attacker_does_not_draw_the_noise_of_the_defence():
    victim = network("plain").eval()
    terms = {"reveal_labels": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    shown, found = batch().images, []
    for std in (0.0, 1.0):
        client = Client(victim, Jigsaw(victim.grid, 0), build_defense("noise", {"std": std}), 0, terms, ["a"])
        found.append(client.round(0, shown, ["a"] * len(shown)))
    name, clean = next(iter(found[0].leak.gradients.items()))
    noise = (found[1].leak.gradients[name] - clean).flatten()
    drawn = torch.randn(clean.shape, generator=found[1].generator).flatten()
    assert torch.corrcoef(torch.stack([noise, drawn]))[0, 1].abs() < 0.5


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_labels_are_smoothed_once(mixup):
    """At equal logits the gradient of the head's bias is 1 / classes less the mean target."""
    one = trainer(network("plain"), mixup=mixup)
    torch.nn.init.zeros_(one.model.head.weight)
    torch.nn.init.zeros_(one.model.head.bias)
    shown = batch()
    shown.labels[:] = torch.tensor([0, 1, 0, 1])
    one._train_step(shown)
    targets = 1 / 5 - 2 * one.model.head.bias.grad  # of half an update
    assert targets[2:].tolist() == pytest.approx([0.1 / 5] * 3, abs=1e-6) and float(targets.sum()) == pytest.approx(1)


def test_the_average_of_weights_forgets_the_initial_ones():
    """timm's average starts with the weights of the first updates, and only then moves by 1 - decay."""
    one, decay = trainer(network("plain"), ema=0.5), 0.5
    expected = None
    for step in range(8):
        one._train_step(batch(step))
        one.step += 1
        if step % 2 == 0:
            continue
        weights = one.model.head.weight.detach().clone()
        update = step // 2
        expected = weights if update < 2 else decay * expected + (1 - decay) * weights
        torch.testing.assert_close(one.ema.module.head.weight, expected)
        if step == 3:
            one.epoch, one.step = 1, 0


def test_mixtures_weigh_an_image_as_the_stated_distribution():
    defense = build_defense("mixup", {"mixed": 4, "largest": 1.0})
    generator = torch.Generator().manual_seed(0)
    weights = torch.stack([defense._weights(generator) for _ in range(4000)])
    assert weights.mean(dim=0).tolist() == pytest.approx(
        [3 / 6, 1 / 6, 1 / 6, 1 / 6], abs=0.015
    )  # Dirichlet(3, 1, 1, 1)
    assert weights[:, 0].var().item() == pytest.approx(3 * 3 / (36 * 7), rel=0.1)
