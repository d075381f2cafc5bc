"""attacks/joint/equal.py: equal patches in single precision, at which rows they stand and when they are claimed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attacks.joint.block import Places, common_ranks, entering
from attacks.joint.diagonal import Tokens, disagreement
from attacks.joint.equal import beside, plain_patch, repeated, spread, standing
from attacks.joint.joint import forms_of
from attacks.joint.placement import free_places
from attacks.joint.search import batch_tokens, token_solver
from attacks.linear.mjp_equations import CERTAIN
from attacks.linear.row_spaces import rows_of
from models.jigsaw import patchify
from tests.attacks.joint.test_joint import SMALL, bordered, leaked, pictures
from tests.attacks.small_victims import STD, generator, vit

ROWS = [0, 2, 4]  # of the patches that are there once; the content of the others stands at all that are left


def planted(twice: bool = False, plain: int | None = None) -> tuple[SimpleNamespace, Places, Tokens]:
    """Return (forms of one image of nine patches, six of them equal; its places; the tokens, the equal ones last).
    twice: the first patch stands at row 8 too, where the equal ones would; plain: a patch that is of one colour."""
    own, model = generator(), vit(**SMALL)
    places = Places.of(SimpleNamespace(model=model, gradients={}))
    patches = torch.randn(4, 192, generator=own, dtype=torch.float64)
    if plain is not None:
        patches[plain] = 0.5
    gradient = torch.randn(4, 96, generator=own, dtype=torch.float64)
    at = [ROWS.index(row) if row in ROWS else 3 for row in range(9)]
    if twice:
        at[8] = 0
    table = gradient[at] * (1 + 1e-3 * torch.randn(9, 1, generator=own, dtype=torch.float64))
    sums = torch.stack([table[[place == one for place in at]].sum(dim=0) for one in range(4)])
    span = rows_of(sums.T @ nn.functional.pad(patches, (0, 1), value=1.0), 4, torch.float64)
    leak = SimpleNamespace(model=model, batch_size=1, std=STD)
    added = torch.cat([places.rows[ROWS], places.rows[[1, 3, 5, 6, 7, 8]].mean(dim=0)[None]])
    mixing = torch.randn(5, 5, generator=own, dtype=torch.float64)
    basis = mixing @ entering(SimpleNamespace(model=model, gradients={}), patches, added)
    forms = SimpleNamespace(basis=basis, block=SimpleNamespace(leak=leak), span=span)
    error = torch.full((4,), 1e-5, dtype=torch.float64)
    tokens = Tokens(patches, torch.zeros(4, 96, dtype=torch.float64), added, error)
    return forms, Places(places.rows, places.counts, places.kinds, table), tokens


def test_a_row_fits_a_patch_that_is_there_once_and_none_a_mixture():
    forms, places, tokens = planted()
    rows, clear = standing(forms.block.leak, forms.basis, tokens.patches, places, torch.ones(9, dtype=torch.bool))
    assert rows[:3].tolist() == ROWS and clear.tolist() == [True, True, True, False]
    rows, clear = standing(forms.block.leak, forms.basis, tokens.patches, places, torch.arange(9) != ROWS[0])
    assert rows[0] != ROWS[0] and clear.tolist() == [False, True, True, False]  # its own row is taken


@pytest.mark.parametrize("plain", [0, 3])
def test_the_patch_of_one_colour_is_what_is_left_unless_it_is_found(plain):
    forms, places, tokens = planted(plain=plain)
    known, free = torch.arange(3), free_places(places, 1, torch.tensor(ROWS)) > 0
    off = torch.randn(1, 192, generator=generator(1), dtype=torch.float64)  # as far as the forms may be from it
    left = replace(tokens, patches=tokens.patches + 1e-3 * off).at([3])
    stand = standing(forms.block.leak, forms.basis, left.patches, places, free)
    found, rows = spread(forms, tokens.at(known), torch.tensor(ROWS), left, places, *stand)
    assert len(rows) == 9 and found.error.isfinite().all()
    away = (found.patches[3:] - tokens.patches[3]).abs().max()
    assert away < 1e-9 if plain == 3 else 1e-3 < away < 1e-2


@pytest.mark.parametrize("case", ["alone", "twice", "one is missing"])
def test_equal_patches_are_claimed_where_nothing_else_can_stand(case):
    forms, places, tokens = planted(case == "twice")
    known = 2 if case == "one is missing" else 3
    left = tokens.at(torch.arange(4) >= known)
    free = free_places(places, 1, torch.tensor(ROWS[:known])) > 0
    stand = standing(forms.block.leak, forms.basis, left.patches, places, free)
    found, rows = spread(forms, tokens.at(torch.arange(known)), torch.tensor(ROWS[:known]), left, places, *stand)
    assert sorted(rows.tolist()) == list(range(9)) and rows[:3].tolist() == ROWS
    assert found.patches[3:].equal(tokens.patches[3:].expand(6, -1))
    claimed = found.error.isfinite()
    assert claimed[:known].all() and claimed[3:].all() == (case == "alone") and claimed[3:].any() == (case == "alone")


def test_of_several_that_may_be_the_mixture_none_is_copied():
    forms, places, tokens = planted()
    nearest, none = torch.tensor([4, 1]), torch.tensor([False, False])
    left = tokens.at(torch.tensor([2, 3]))
    found, rows = spread(forms, tokens.at(torch.arange(2)), torch.tensor(ROWS[:2]), left, places, nearest, none)
    assert rows.tolist() == [*ROWS[:2], 4, 1] and found.error.isfinite().tolist() == [True, True, False, False]


def test_the_rows_say_which_patch_stands_elsewhere_too():
    """A mixture can be solved at one of its rows: the gradient of the other rows is then left over."""
    forms, places, tokens = planted()
    none, order = tokens.at(torch.arange(0)), torch.tensor([3, 1, 0, 2])
    stand = torch.tensor([*ROWS, 5])
    assert repeated(forms, tokens, stand, none, places) == 3
    assert repeated(forms, tokens.at(order), stand[order], none, places) == 0
    assert repeated(forms, tokens.at(torch.arange(3)), stand[:3], tokens.at([3]), places) is None  # it has no row
    assert repeated(forms, tokens.at(torch.arange(3)), stand[:3], none, places) is None  # one is not known
    unseen = replace(places, gradient=None)
    assert repeated(forms, tokens, stand, none, unseen) is None


@pytest.mark.parametrize("sixth, first", [(1.0, (6, 8)), (1e4, (None, None))])
def test_ranks_are_tried_with_and_without_the_class_tokens_of_the_other_images(sixth, first):
    """Five contents in three images: six tokens enter with the class token, and eight leave with all three."""
    values = torch.full((12,), 10.0)
    layer = SimpleNamespace(values=values, noise=1.0, basis=values)
    tokens = SimpleNamespace(values=values.index_fill(0, torch.tensor(6), sixth), noise=1.0)
    leak = SimpleNamespace(batch_size=3, model=SimpleNamespace(num_prefix_tokens=1))
    block = SimpleNamespace(leak=leak, passed=layer, tokens=tokens, entering=12, passing=14)
    ranks = common_ranks(block, SimpleNamespace(clean=False, basis=values[:5]))
    assert ranks[0] == first and set(ranks) == {(6, 8), (6, 6), (None, None)}
    assert ranks.index((6, 8)) < ranks.index((6, 6))


@pytest.mark.parametrize("colours, noise, told", [(1, 0.0, True), (1, 1e-3, False), (0, 0.0, False), (2, 0.0, False)])
def test_the_row_space_says_which_colour_a_patch_has(colours, noise, told):
    """One colour in the span is that of a patch; of two every mixture lies in it, and texture is no colour."""
    own = generator()
    patches = torch.randn(6, 192, generator=own, dtype=torch.float64)
    plain = torch.randn(colours, 3, generator=own, dtype=torch.float64).repeat_interleave(64, dim=1)
    patches[:colours] = plain + noise * patches[:colours]
    gradient = torch.randn(40, 6, generator=own, dtype=torch.float64) @ nn.functional.pad(patches, (0, 1), value=1.0)
    found = plain_patch(rows_of(gradient.float().double(), 36, torch.float32), 3)
    assert (found is not None) == told
    if told:
        patch, error = found
        assert (patch - plain[0]).square().mean().sqrt() < 3 * error < 1e-3


def test_the_error_of_what_is_left_is_how_far_the_forms_disagree():
    patch = torch.randn(1, 12, generator=generator(), dtype=torch.float64)
    each = torch.stack([nn.functional.pad(patch + step, (0, 1), value=1.0) for step in (0.02, -0.02)])
    assert disagreement(3 * each, patch).sqrt().item() == pytest.approx(0.02 / 2**0.5)
    assert disagreement(torch.cat([each, 0 * each]), patch).sqrt().item() == pytest.approx(0.02 / 2**0.5)


@pytest.mark.parametrize("number, color", [(2, 1.0), (3, 0.0)])
def test_no_claim_about_equal_patches_is_false(number, color):
    """25 patches, 16 of them in a border: all are claimed, each at a row where it is, to its predicted error."""
    model = vit(**SMALL | {"image_size": 40, "depth": 5, "embed_dim": 180}).float()
    private, leak = leaked(model, bordered(pictures(number, 3, side=40), color))
    places = Places.of(leak)
    tokens, rows, _ = batch_tokens(leak, forms_of(leak, places), places, generator())
    assert len(rows) == 9 * number + 16 and (tokens.error * max(STD) < CERTAIN).all()
    true = patchify(private.model_input.double(), 8)[:, rows].transpose(0, 1)  # (n, B, P)
    wrong = (tokens.patches[:, None] - true).square().mean(dim=2).sqrt().amin(dim=1)
    assert (wrong < 10 * tokens.error).all()
    forms = forms_of(leak, places)
    if number == 2:  # a patch that is missing is found again, beside the others; they come first
        kept = torch.arange(18)[torch.arange(18) != 4]
        solver = token_solver(forms, tokens.mixed, generator())
        again, at = beside(tokens.at(kept), rows[kept], places, solver)
        assert len(again.patches) == 18 and at[-1] == rows[4]
        assert (again.patches[-1] - tokens.patches[4]).abs().max() < 0.01
    tokens, rows, _ = batch_tokens(leak, forms, places, generator(), polish=False)
    assert tokens.error.isinf().all() and set(rows.tolist()) == set(range(25))
