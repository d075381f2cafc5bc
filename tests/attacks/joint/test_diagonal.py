"""attacks/joint/diagonal.py: the rank of a gradient, and the axes that several forms share."""

import pytest
import torch
from torch import Tensor

from attacks.joint.diagonal import jointly, pencil, tokens_of
from attacks.joint.forms import Forms
from attacks.linear.row_spaces import rows_of
from tests.attacks.small_victims import generator


def test_the_rank_of_a_gradient_is_that_of_its_tokens():
    left, right = (torch.randn(size, generator=generator(), dtype=torch.float64) for size in ((40, 7), (7, 30)))
    gradient = left * torch.logspace(0, -4, 40)[:, None] @ right
    rows = rows_of(gradient, 12, torch.float64)
    assert rows.basis.shape == (7, 30) and rows.clean
    assert torch.allclose(right @ rows.basis.T @ rows.basis, right)
    rounded = rows_of(gradient.float().double(), 12, torch.float32)
    assert rounded.basis.shape == (7, 30) and not rounded.clean


def test_pencil_and_joint_diagonalisation_find_the_planted_axes():
    own = generator()
    mixing = torch.randn(9, 9, generator=own, dtype=torch.float64)
    diagonals = torch.randn(4, 9, generator=own, dtype=torch.float64)
    forms = mixing.T @ torch.diag_embed(diagonals) @ mixing
    for noise, tolerance in ((0.0, 1e-8), (1e-5, 1e-2)):
        wrong = noise * torch.randn(forms.shape, generator=own, dtype=torch.float64)
        axes = jointly(forms + wrong, pencil(forms + wrong))
        product = (mixing @ axes).abs()
        rest = product / product.amax(dim=0)
        assert (rest > 0.5).sum() == 9 and rest.sort(dim=0).values[-2].max() < tolerance


def planted(number: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (mixing A (7, 7), forms A^T D_f A with errors (number, 7, 7) that are no more symmetric than noise is)."""
    own = generator(seed)
    mixing = torch.randn(7, 7, generator=own, dtype=torch.float64)
    diagonals = torch.randn(number, 7, generator=own, dtype=torch.float64)
    wrong = noise * torch.randn(number, 7, 7, generator=own, dtype=torch.float64)
    return mixing, mixing.T @ torch.diag_embed(diagonals) @ mixing + wrong


def leftover(mixing: Tensor, axes: Tensor) -> float:
    """Return what is left of the other directions of the mixing in each axis, root mean square, in parts of its own."""
    product = (mixing @ axes).abs()
    rest = product / product.amax(dim=0)
    return float(rest.sort(dim=0).values[:-1].square().mean().sqrt())


def test_more_forms_than_two_make_the_axes_better():
    ratios = []
    for seed in range(5):
        mixing, forms = planted(12, 1e-3, seed)
        start = pencil(forms)
        ratios.append(leftover(mixing, jointly(forms, start)) / leftover(mixing, start))
    assert sorted(ratios)[2] < 0.5


def test_a_form_of_large_errors_that_weighs_less_does_less_harm():
    mixing, forms = planted(6, 1e-4)
    forms[3:] += 0.1 * torch.randn(3, 7, 7, generator=generator(1), dtype=torch.float64) * forms[3:].std()
    weights = torch.tensor([1.0] * 3 + [1e-2] * 3, dtype=torch.float64)
    start = pencil(forms)
    assert leftover(mixing, jointly(forms, start, weights)) < leftover(mixing, jointly(forms, start)) / 3


def test_forms_of_any_size_count_alike():
    """A form that is a thousand times larger, errors included, says no more than the others about the axes."""
    mixing, forms = planted(12, 1e-3)
    scales = torch.logspace(0, 3, 12, dtype=torch.float64)[:, None, None]
    start = pencil(forms)
    assert leftover(mixing, jointly(scales * forms, start)) == pytest.approx(leftover(mixing, jointly(forms, start)))


def test_forms_that_are_not_symmetric_are_left_out():
    """Two good forms give the tokens; four whose error shows as asymmetry do not make them worse."""
    own = generator()
    mixing, forms = planted(2, 0.0)
    bad = planted(4, 3.0, 1)[1]
    patches = torch.cat([torch.randn(7, 5, generator=own, dtype=torch.float64), torch.ones(7, 1)], dim=1)
    solved = torch.linalg.solve(mixing, patches)
    span = rows_of(patches, 6, torch.float64)
    eye = torch.eye(7, dtype=torch.float64)
    found = tokens_of(Forms(torch.cat([bad, forms]), 7, solved, None, eye, None, solved, span, 0.0, eye, None))
    assert torch.cdist(found.patches, patches[:, :-1]).min(dim=0).values.max() < 1e-8
    assert bool(found.error.isfinite().all())
