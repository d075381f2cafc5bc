"""Bins of a functional: their guarantee against simulation, exact read-out, and the claim by 8-bit values."""

import pytest
import torch

from attacks.malicious.bins import distinct, expected_share, on_grid, read_rows, thresholds


def alone(bins: torch.Tensor) -> float:
    """Return the share of images (trials, n) by bin number that share their bin with no other, bin -1 not counted."""
    same = (bins[:, :, None] == bins[:, None]).sum(dim=2)
    return float(((same == 1) & (bins >= 0)).double().mean())


@pytest.mark.parametrize("masses", [[0.125] * 8, [0.5, 0.3, 0.2], [0.4, 0.1]])
def test_the_expected_share_is_what_simulation_finds(masses):
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([*masses, 1 - sum(masses)]).clamp_min(0)
    drawn = torch.multinomial(weights, 20_000 * 5, replacement=True, generator=generator).reshape(-1, 5)
    drawn = torch.where(drawn == len(masses), -1 - torch.arange(5), drawn)  # outside of all bins: never counted
    assert alone(drawn) == pytest.approx(expected_share(masses, 5), abs=0.01)


def test_quantiles_of_few_public_pictures_cost_what_is_promised():
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(400):
        edges = thresholds(torch.randn(64, generator=generator), 0, 1, torch.full((16,), 1 / 16))
        own = torch.randn(40, 12, generator=generator).double()
        shares.append(alone(torch.bucketize(own, edges) - 1))
    found = sum(shares) / len(shares)
    assert found == pytest.approx(expected_share([1 / 16] * 16, 12, 64), abs=0.02)
    assert found < expected_share([1 / 16] * 16, 12) - 0.01  # exact masses would promise more


def test_thresholds_of_a_normal_functional_are_its_quantiles():
    edges = thresholds(None, 1.0, 2.0, torch.full((4,), 0.25))
    assert edges[2] == pytest.approx(1.0) and edges[3] == pytest.approx(1 + 2 * 0.67449, abs=1e-4)
    assert edges[0] < 1 - 5 * 2.0


def test_differences_of_rows_are_the_images_of_their_bins():
    generator = torch.Generator().manual_seed(0)
    functional = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    images = torch.tensor([[0.5, 3, -1], [1.5, 2, 7], [1.7, -4, 2], [3.5, 1, 1]], dtype=torch.float64)
    edges = torch.tensor([[0.0, 1, 2, 3]], dtype=torch.float64)
    active = (images @ functional)[:, None] > edges[0]  # (4, K)
    back = torch.rand(4, 1, generator=generator, dtype=torch.float64) + 0.5
    weight, bias = (active * back).T @ images, (active * back).sum(dim=0)
    hits = read_rows(weight[None], bias[None], functional, edges, cumulative=True)
    alone = [0, 3]  # images 1 and 2 share a bin and come back as their mixture, the bin from 2 to 3 is empty
    assert len(hits.inputs) == 3
    for image in images[alone]:
        assert (hits.inputs - image).abs().amax(dim=1).min() < 1e-12
    mixture = (back[1] * images[1] + back[2] * images[2]) / (back[1] + back[2])
    assert (hits.inputs - mixture).abs().amax(dim=1).min() < 1e-12


def test_pictures_of_8_bits_are_claimed_and_mixtures_are_not():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 300), generator=generator) / 255
    noisy = pictures + 1e-4 * torch.randn(2, 300, generator=generator)
    assert on_grid(pictures).all() and on_grid(noisy).all()
    assert not on_grid(pictures.mean(dim=0, keepdim=True) * 0.99 + 0.003).any()
    assert not on_grid(0.3 * pictures[:1] + 0.7 * pictures[1:]).any()
    assert not on_grid(torch.full((1, 300), 7 / 255)).any()  # one value would fit by chance
    assert not on_grid(pictures * 3).any()  # outside of the range of pixels


def test_equal_hits_count_once_in_the_order_given():
    rows = torch.tensor([[1.0, 0], [1.0, 1e-6], [0, 1.0], [2.0, 0]])
    assert distinct(rows, [2, 1, 0, 3], 4) == [2, 1, 3]
    assert distinct(rows, [2, 1, 0, 3], 2) == [2, 1]
