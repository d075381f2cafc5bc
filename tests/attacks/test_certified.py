"""attacks/certified.py: bits of intervals and of orders, the bound of linear attacks, and radii that hold the truth."""

import math

import pytest
import torch

from attacks.certified import Certificate, certify, hidden_order_bits, linear_mse, order_bits, value_bits
from attacks.joint.joint import joint
from attacks.linear.closed_form import closed_form
from attacks.linear.mjp_aware import mjp_aware
from attacks.threat_model.client import prepare, share
from campaigns.interval import excess
from defenses import build_defense
from models import build_model
from models.jigsaw import Jigsaw, patchify
from tests.attacks.small_victims import MEAN, STD, UNDEFENDED, client, generator, vit

SCALE = torch.tensor(STD).double().repeat_interleave(64)


def test_a_radius_leaves_as_many_levels_as_fit_into_it():
    radius = torch.tensor([0.0, 0.99 / 510, 1.01 / 510, 3.5 / 510, 0.5, 2.0, torch.inf])
    assert value_bits(radius).tolist() == pytest.approx([8, 8, 7, 6, 0, 0, 0])
    levels = torch.arange(256, dtype=torch.float64) / 255
    most = max(int(((levels - value).abs() <= 0.013).sum()) for value in torch.linspace(0, 1, 101).double())
    assert most == pytest.approx(2 ** (8 - float(value_bits(torch.tensor(0.013)))))


def test_an_order_costs_the_ways_to_fill_the_places():
    group, claimed = torch.tensor([[0, 1, 1, 1, 1]]), torch.tensor([[True, True, True, False, False]])
    assert order_bits(group, claimed) == pytest.approx(math.log2(4 * 3))
    assert order_bits(torch.arange(5)[None], claimed) == 0


def test_equal_patches_have_no_order():
    patches = torch.tensor([[1.0, 0], [2, 0], [2, 0], [3, 0]])
    assert hidden_order_bits(patches, torch.zeros(4)) == pytest.approx(math.log2(24 / 2))
    assert hidden_order_bits(patches, torch.arange(4)) == 0
    assert hidden_order_bits(patches[1:3], torch.zeros(2)) == 0


def test_bits_of_a_batch_leave_out_its_order_and_what_is_not_claimed():
    patches, group = torch.zeros(2, 3, 10), torch.arange(6).view(2, 3)
    radius = torch.tensor([[0.0, 0.0, torch.inf], [0.0, 0.7, torch.inf]])
    assert Certificate(patches, radius, group).bits == pytest.approx(3 * 10 * 8 - 1)
    assert Certificate(patches, torch.full((2, 3), torch.inf), group).bits == 0
    shared = certify(patches[0], torch.zeros(3), torch.tensor([False, True, True]))
    assert shared.bits == pytest.approx(3 * 10 * 8 - 1)
    assert certify(patches[0], torch.tensor([0.01, 0.02, 0.02])).psnr == pytest.approx(-10 * math.log10(3e-4))
    assert certify(patches[0], torch.tensor([0.01, 0.5, 0.02])).psnr is None


def test_the_bound_of_linear_attacks_is_met_by_the_posterior_mean_and_by_nobody_else():
    own, std, prior = generator(), 0.3, 2.0
    system = torch.randn(6, 3, generator=own, dtype=torch.float64)
    truth = prior * torch.randn(3, 20000, generator=own, dtype=torch.float64)
    seen = system @ truth + std * torch.randn(6, 20000, generator=own, dtype=torch.float64)
    bound = linear_mse(system, std, prior)

    def error(ridge: float) -> float:
        found = torch.linalg.solve(system.T @ system + ridge * torch.eye(3), system.T @ seen)
        return float((found - truth).square().mean())

    assert error(std**2 / prior**2) == pytest.approx(bound, rel=0.02)
    assert min(error(0.0), error(3.0)) > bound
    assert linear_mse(torch.zeros(4, 2), std, prior) == pytest.approx(prior**2)


@pytest.mark.parametrize(("std", "least", "most"), [(0.0, 0.9, 1.0), (1e-6, 0.1, 0.9), (1e-2, 0.0, 0.0)])
def test_the_closed_form_is_within_its_radius_under_noise_it_is_not_told(std, least, most):
    model = vit().float()
    worst, bits = 0.0, 0.0
    for seed in range(4):
        private, leak = client(model, seed=seed)
        noisy = build_defense("noise", {"std": std}).gradients(leak.gradients, generator=generator(seed))
        leak.gradients.update(noisy)
        if (found := closed_form(leak, generator=generator()).certificate) is not None:
            worst = max([worst, *excess(found, patchify(private.model_input, 8), SCALE).amax(dim=1).tolist()])
            bits += found.bits / 4 / 24576
    assert worst < 1 and least <= bits <= most


@pytest.mark.parametrize(("attack", "images", "ratio"), [(mjp_aware, 1, 0.4), (joint, 1, 0.4), (joint, 2, 0.0)])
def test_attacks_by_equations_are_within_their_radii(attack, images, ratio):
    model = vit(unknown=ratio > 0, **({} if ratio else {"image_size": 16}))
    private, leak = client(model, images, ratio=ratio, hidden=True)
    found = attack(leak, generator=generator()).certificate
    truth = patchify(private.model_input, 8)
    assert float(excess(found, truth, SCALE).max()) < 1
    assert float(excess(found, truth + 0.1, SCALE).max()) > 1
    hidden = int(private.mask.sum())
    claimed = truth[..., 0].numel() - hidden * (attack is mjp_aware)
    order = math.log2(math.factorial(hidden)) if attack is joint else 0
    assert found.bits == pytest.approx(claimed * 192 * 8 - order - math.log2(images))


@pytest.mark.parametrize("defense", [("prune", {"ratio": 0.1}), ("quantize", {"bits": 8}), ("noise", {"std": 1.0})])
def test_what_is_wrong_by_more_than_noise_certifies_nothing(defense):
    _, leak = client(vit().float())
    leak.gradients.update(build_defense(*defense).gradients(leak.gradients, generator=generator()))
    found = closed_form(leak, generator=generator()).certificate
    assert found is None or found.bits == 0


@pytest.mark.parametrize("seed", [3, 6, 14])
def test_a_picture_of_one_colour_is_not_claimed_to_be_nearer_than_it_is(seed):
    """Its hidden patches differ by rounding alone, and what a LayerNorm leaves open moves the whole patch."""
    own = generator(seed)
    model = build_model("vit", seed=seed, image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4,
                        num_classes=5, unknown=True).eval()  # fmt: skip
    colour = (torch.rand(1, 3, 1, 1, generator=own) * 255).round() / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    image = ((colour - mean) / std).expand(1, 3, 32, 32)
    private = prepare(model, image, torch.tensor([seed % 5]), Jigsaw(model.grid, 0.3, "uniform", seed=seed), 0)
    leak = share(model, private, UNDEFENDED, True, mean=MEAN, std=STD)
    found = mjp_aware(leak, generator=generator(), steps=2, hidden_steps=0, newton_steps=0).certificate
    claimed = bool(found.claimed.any())
    assert not claimed or float(excess(found, patchify(private.model_input.double(), 8), SCALE).max()) < 0.5
