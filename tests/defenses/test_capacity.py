"""defenses/capacity.py: known channels, and what every defence lets pass at most."""

import math

import pytest
import torch

from defenses import build_defense
from defenses.capacity import chosen_bits, gaussian_bits, laplacian_bits

GRADIENTS = {"a": torch.tensor([3.0, -4.0]), "b": torch.zeros(5)}


def test_a_gaussian_channel_has_its_capacity_and_less_than_the_divergence():
    assert gaussian_bits(3.0, 1, 1.0) == pytest.approx(1.0)  # 1/2 log2(1 + 3)
    assert gaussian_bits(25.0, 10**9, 2.0) == pytest.approx(25 / (2 * 4) / math.log(2), rel=1e-6)
    assert gaussian_bits(25.0, 3, 2.0) < 25 / (2 * 4) / math.log(2)
    assert gaussian_bits(0.0, 3, 0.0) == 0 and gaussian_bits(1.0, 3, 0.0) == math.inf


def test_a_sign_through_gaussian_noise_carries_less_than_the_bound():
    """Mutual information of +-1 with equal odds and +-1 + N(0, 1), by quadrature."""
    places = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    each = torch.stack([torch.exp(-((places - sign) ** 2) / 2) / math.sqrt(2 * math.pi) for sign in (-1, 1)])
    mean = each.mean(dim=0)
    exact = float((each * (each / mean).log2()).sum(dim=1).mean() * (places[1] - places[0]))
    assert 0.9 * gaussian_bits(1.0, 1, 1.0) < exact < gaussian_bits(1.0, 1, 1.0)


def test_the_divergence_of_laplacian_noise_is_its_integral():
    places = torch.linspace(-60, 60, 200001, dtype=torch.float64)
    one, other = (torch.exp(-(places - shift).abs() / 2) / 4 for shift in (1.5, 0.0))
    integral = float((one * (one / other).log2()).sum() * (places[1] - places[0]))
    assert laplacian_bits(1.5**2, 1, 2.0) == pytest.approx(integral, rel=1e-4)


def test_the_bound_of_laplacian_noise_holds_for_every_gradient_that_is_no_longer():
    """Of one length, gradients that are spread evenly tell most: a bound by this one's entries would be too low."""
    peaked, spread = torch.zeros(100), torch.full((100,), 0.1)
    assert peaked.index_fill_(0, torch.tensor(3), 1.0).norm() == pytest.approx(float(spread.norm()))
    bits = [build_defense("laplace", {"scale": 0.2}).carries({"a": value}, 1) for value in (peaked, spread)]
    assert bits[0] == pytest.approx(bits[1]) and bits[0] == pytest.approx(laplacian_bits(1.0, 100, 0.2))
    assert bits[0] > 2 * laplacian_bits(1.0, 1, 0.2) and laplacian_bits(0.0, 0, 0.2) == 0


@pytest.mark.parametrize("name, options", [("noise", {"std": 0.1}), ("laplace", {"scale": 0.1})])
def test_noise_has_as_many_digits_as_the_gradient(name, options):
    """Noise of 24 bits on a gradient of 53 is a multiple of 2^-28 or so, and leaves the digits below as they are."""
    zero = {"a": torch.zeros(1000, dtype=torch.float64)}
    shared = build_defense(name, options).gradients(zero, generator=torch.Generator().manual_seed(0))["a"]
    assert ((shared / 0.1).float().double() != shared / 0.1).float().mean() > 0.9


def test_defences_bound_what_they_let_pass():
    for name, options in (("none", {}), ("soteria", {}), ("noise", {"std": 0.0}), ("quantize", {"bits": 0})):
        assert build_defense(name, options).carries(GRADIENTS, 1) == 7 * 32  # as it is stored
    assert build_defense("withhold", {"names": "a"}).carries(GRADIENTS, 1) == 5 * 32
    assert build_defense("noise", {"std": 1.0}).carries(GRADIENTS, 1) == pytest.approx(math.log2(1 + 25 / 2))
    assert build_defense("quantize", {"bits": 8}).carries(GRADIENTS, 1) == pytest.approx(7 * math.log2(255) + 64)
    kept = chosen_bits(1, 2) + chosen_bits(1, 5)  # of 2 and 5 entries 1 each
    assert build_defense("prune", {"ratio": 0.8}).carries(GRADIENTS, 1) == pytest.approx(2 * 32 + kept)


def test_dp_sgd_carries_three_quarters_of_a_bit_of_each_image_at_noise_one():
    many = {"a": torch.full((10**6,), 1e3)}
    for images in (1, 4):
        carried = build_defense("dp_sgd", {"clip": 7.0}).carries(many, images)
        assert carried == pytest.approx(images / (2 * math.log(2)), rel=1e-5)
    assert build_defense("dp_sgd", {"noise_multiplier": 0.0}).carries(many, 1) == 32 * 10**6
