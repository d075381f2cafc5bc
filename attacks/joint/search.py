"""Find the tokens of a batch: diagonalise, place, solve each one, take the solved ones out, and again for the rest.

The forms of a single precision gradient are too noisy for some tokens. Those that are found are taken out of the forms
(deflation), which leaves a smaller problem, with fewer places to choose from.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attacks.joint.block import Places, entering, first_block
from attacks.joint.diagonal import Tokens, tokens_of
from attacks.joint.equal import equal_tokens
from attacks.joint.forms import Forms
from attacks.joint.placement import free_places, nearest_rows, placed_tokens, with_mask
from attacks.joint.polish import polished
from attacks.joint.token_solver import TokenSolver, outputs_of
from attacks.linear.mjp_equations import CERTAIN
from attacks.linear.row_spaces import affine_hull
from attacks.threat_model.leak import Leak

ROUNDS = 7
NEGLIGIBLE = 1e-6  # predicted error of a pixel (range 1) below which no polish is worth it


def batch_tokens(
    leak: Leak, forms: Forms, places: Places | None, generator: torch.Generator, polish: bool = True
) -> tuple[Tokens, Tensor, Places | None]:
    """Return (the distinct tokens of a batch, the row of the table that was added to each (n,), zeros without one, the
    places with the mask that these rows tell where the gradients do not)."""
    images, scale = leak.batch_size, max(leak.std)
    tokens = tokens_of(forms)
    places = with_mask(tokens, places)
    equal = forms.merged and places is not None
    tokens, rows = placed_tokens(tokens, places, free_places(places, images), forms.span.clean or equal)
    if not (polish or equal):
        return tokens, rows, places
    solver = token_solver(forms, tokens.mixed, generator)
    if equal:
        return *equal_tokens(forms, tokens, places, solver, polish), places
    done, known = torch.zeros(len(rows), dtype=torch.bool), 0
    for turn in range(ROUNDS):
        chosen = ~done & (tokens.error * scale > NEGLIGIBLE)
        tokens, rows, solved = _solved(tokens, rows, chosen, places, solver, images, turn)
        done |= solved | (tokens.error * scale < CERTAIN)
        count = int(done.sum())
        if forms.span.clean or count == known or bool(done.all()):
            break
        known, found = count, tokens.at(done)
        left = tokens_of(forms, entering(leak, found.patches, added_rows(leak, rows, places)[done]))
        if not len(left.patches):
            break
        left, left_rows = placed_tokens(left, places, free_places(places, images, rows[done]), False)
        # What the tokens taken out are off by is in these forms: a patch of them is known once its own equations are
        # solved.
        left = replace(left, error=torch.full_like(left.error, torch.inf))
        tokens, rows = found.joined(left), torch.cat([rows[done], left_rows])
        done = torch.arange(len(rows)) < count
    return tokens, rows, places


def token_solver(forms: Forms, mixed: Tensor, generator: torch.Generator) -> TokenSolver:
    """Return the equations of one token; mixed (n, D): what attention returned to some."""
    hull, outputs, block = affine_hull(forms.span.basis), outputs_of(forms.mixed, mixed), forms.block
    if not forms.span.clean and len(block.passed.basis) < block.passing:  # what equal patches add to others hides some
        block = first_block(block.leak, faint=True)
    return TokenSolver(block, hull, outputs, forms.span.clean, generator)


def added_rows(leak: Leak, rows: Tensor, places: Places | None) -> Tensor:
    """Return what is added (n, D) to tokens at rows (n,) of the table."""
    if places is None:
        return torch.zeros(len(rows), leak.model.embed_dim, dtype=torch.float64)
    return places.rows[rows]


def _solved(
    tokens: Tokens,
    rows: Tensor,
    chosen: Tensor,
    places: Places | None,
    solver: TokenSolver,
    images: int,
    turn: int,
) -> tuple[Tokens, Tensor, Tensor]:
    """Return (the tokens with the chosen ones solved, their rows, which are (n,) bool); after the first turn at the
    second nearest row too where the nearest has no solution."""
    leak = solver.leak
    tokens, solved = polished(tokens, chosen, added_rows(leak, rows, places), solver)
    rest = chosen & ~solved
    if not turn or places is None or not bool(rest.any()):
        return tokens, rows, solved
    free = free_places(places, images, rows[~rest]) > 0
    others = free[None] & (torch.arange(len(free))[None] != rows[:, None])
    rest &= others.any(dim=1)
    second = torch.where(rest, nearest_rows(tokens, places, others), rows)
    tokens, again = polished(tokens, rest, added_rows(leak, second, places), solver)
    return tokens, torch.where(again, second, rows), solved | again
