"""attacks/linear/jigsaw_solver.py: costs against hand-made borders, and shuffled photographs put back together."""

import math

import pytest
import torch
from skimage import data, transform
from torch import Tensor

from attacks.linear.jigsaw_solver import COMPATIBILITIES, RIDGE, extrapolation, mgc, place, place_all
from models.jigsaw import Jigsaw, patchify
from utils.errors import UserError

GRID, PATCH = (14, 14), 16


def photograph(name: str) -> Tensor:
    """(N, 768) patches in [0, 1] of a photograph that comes with scikit-image."""
    image = transform.resize(getattr(data, name)(), (224, 224), anti_aliasing=True)
    return patchify(torch.from_numpy(image).permute(2, 0, 1)[None].double(), PATCH)[0]


def shuffled(patches: Tensor, ratio: float, sampler: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    mask, source = Jigsaw(GRID, ratio, sampler, seed=seed).draw_for([0])
    return patches[source[0]], mask[0], source[0]


def accuracy(patches: Tensor, ratio: float, sampler: str, compatibility: str) -> float:
    """Share of the masked patches that come back to their place."""
    shown, mask, source = shuffled(patches, ratio, sampler)
    found = source[place(shown, mask, GRID, PATCH, compatibility=compatibility)]
    return (found == torch.arange(len(found)))[mask].double().mean().item()


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("compatibility", sorted(COMPATIBILITIES))
def test_photographs_are_put_back_together(name, compatibility):
    patches = photograph(name)
    assert accuracy(patches, 0.1, "block", compatibility) > 0.9
    assert accuracy(patches, 0.27, "uniform", compatibility) > 0.9


def test_large_holes_are_filled_too():
    assert sum(accuracy(photograph(name), 0.4, "block", "mgc") for name in ("astronaut", "chelsea", "coffee")) / 3 > 0.6


@pytest.mark.parametrize("name", ["astronaut", "chelsea"])
def test_a_photograph_of_which_no_place_is_known_is_put_back_together(name):
    patches = photograph(name).view(14, 14, 3, 16, 16).permute(2, 0, 3, 1, 4).reshape(1, 3, 224, 224)
    patches = patchify(patches, 32)[0]
    order = torch.randperm(49, generator=torch.Generator().manual_seed(0))
    assert order[place_all(patches[order], (7, 7), 32)].equal(torch.arange(49))


def test_the_result_is_a_permutation_of_the_holes_alone():
    shown, mask, _ = shuffled(photograph("chelsea"), 0.4, "block")
    source = place(shown, mask, GRID, PATCH)
    assert source.sort().values.equal(torch.arange(196))
    assert source[~mask].equal(torch.arange(196)[~mask])
    assert not source[mask].equal(torch.arange(196)[mask])


@pytest.mark.parametrize("compatibility", sorted(COMPATIBILITIES))
def test_the_order_given_does_not_matter(compatibility):
    patches = photograph("coffee")
    one, mask, _ = shuffled(patches, 0.1, "block", seed=0)
    holes = mask.nonzero().flatten()
    other = one.clone()
    other[holes] = one[holes.flip(0)]
    results = [values[place(values, mask, GRID, PATCH, compatibility=compatibility)] for values in (one, other)]
    assert results[0].equal(results[1])


def test_without_holes_nothing_moves_and_without_frame_it_is_refused():
    patches = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    assert place(patches, torch.zeros(4, dtype=torch.bool), (2, 2), 2).equal(torch.arange(4))
    assert place(patches, torch.tensor([True, False, False, False]), (2, 2), 2).equal(torch.arange(4))
    with pytest.raises(UserError, match="every patch is a hole"):
        place(patches, torch.ones(4, dtype=torch.bool), (2, 2), 2)
    with pytest.raises(UserError, match="unknown compatibility 'border'"):
        place(patches, torch.tensor([True, False, False, False]), (2, 2), 2, compatibility="border")


def test_two_patches_of_a_ramp_are_told_apart():
    ramp = torch.arange(16, dtype=torch.float64).repeat(4, 1)[None, None].expand(1, 3, 4, 16) / 16
    patches = patchify(ramp, 4)[0]
    holes = torch.tensor([False, True, True, False])
    swapped = patches[[0, 2, 1, 3]]
    for compatibility in COMPATIBILITIES:
        assert place(swapped, holes, (1, 4), 4, compatibility=compatibility).tolist() == [0, 2, 1, 3]
        assert place(patches, holes, (1, 4), 4, compatibility=compatibility).tolist() == [0, 1, 2, 3]


def rows(*values: float) -> Tensor:
    """(1, 2, 1): two pixels along a border, one channel."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def test_costs_of_borders_by_hand():
    edge, inner, other, beyond = rows(2, 4), rows(1, 2), rows(3, 7), rows(5, 8)
    # Continued from the left 3 and 6, found 3 and 7; continued from the right 1 and 6, found 2 and 4.
    assert extrapolation(edge, inner, other, beyond).item() == pytest.approx(0 + 1 + 1 + 4)
    # Steps inside (1, 2) on the left, (2, 1) on the right: mean 1.5, variance 0.25 both; steps across (1, 3).
    assert mgc(edge, inner, other, beyond).item() == pytest.approx(2 * (0.25 + 2.25) / (0.25 + RIDGE))
    assert math.isfinite(mgc(rows(0, 0), rows(0, 0), rows(1, 1), rows(1, 1)).item())
