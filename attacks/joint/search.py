"""Find the tokens of a batch: diagonalise, place, solve each one, take the solved ones out, and again for the rest.

The forms of a single precision gradient are too noisy for some tokens. Those that are found are taken out of the forms
(deflation), which leaves a smaller problem, with fewer places to choose from.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Places, affine, prefix_tokens
from attacks.joint.diagonal import Tokens, tokens_of
from attacks.joint.forms import Forms
from attacks.joint.images import copied, free_places, mixtures, nearest_rows, placed_tokens, with_mask
from attacks.joint.polish import TokenSolver, more, outputs_of, polished, unsure
from attacks.linear.mjp_equations import CERTAIN, centre
from attacks.linear.row_spaces import affine_hull
from attacks.threat_model.leak import Leak

ROUNDS = 7
TRIES = 60  # starts beside patches that are known
ALIKE = 0.1  # relative, how far apart the gradients of one patch at two places of an image are at most
NEGLIGIBLE = 1e-6  # predicted error of a pixel (range 1) below which no polish is worth it


def batch_tokens(
    leak: Leak, forms: Forms, places: Places | None, generator: torch.Generator, polish: bool = True
) -> tuple[Tokens, Tensor, Places | None]:
    """Return (the distinct tokens of a batch, the row of the table that was added to each (n,), zeros without one, the
    places with the mask that these rows tell where the gradients do not)."""
    images, scale = leak.batch_size, max(leak.std)
    tokens = tokens_of(forms)
    places = with_mask(tokens, places)
    whole = forms.span.clean or forms.merged  # no copies are tried
    tokens, rows = placed_tokens(tokens, places, free_places(places, images), whole)
    if not polish:
        return *_spread(leak, forms, tokens, rows, places, torch.zeros_like(rows, dtype=torch.bool)), places
    solver = token_solver(forms, tokens.mixed, generator)
    done, known, own = torch.zeros(len(rows), dtype=torch.bool), 0, torch.zeros(len(rows), dtype=torch.bool)
    for turn in range(ROUNDS):
        chosen = ~done & (tokens.error * scale > NEGLIGIBLE)
        tokens, rows, solved = _solved(tokens, rows, chosen, places, solver, images, turn)
        own |= solved
        done = own | (tokens.error * scale < CERTAIN)
        if forms.merged and places is not None:
            done |= mixtures(tokens, rows, places)
        count = int(done.sum())
        if forms.span.clean or count == known or bool(done.all()):
            break
        known, found = count, tokens.at(done)
        added = added_rows(leak, rows, places)
        if forms.merged and places is not None:  # a mixture has a row of its own
            added = torch.where((~own & mixtures(tokens, rows, places))[:, None], tokens.places, added)
        left = tokens_of(forms, _entering(leak, found, added[done]))
        if not len(left.patches):
            break
        left, left_rows = placed_tokens(left, places, free_places(places, images, rows[done]), forms.merged)
        if not forms.merged:
            # What the tokens taken out are off by is in these forms, and no asymmetry shows it: a patch of them is
            # known once its own equations are solved.
            left = replace(left, error=torch.full_like(left.error, torch.inf))
        own = torch.cat([own[done], torch.zeros(len(left_rows), dtype=torch.bool)])
        tokens, rows = found.joined(left), torch.cat([rows[done], left_rows])
        done = torch.arange(len(rows)) < count
    if forms.merged and places is not None:
        tokens, rows, own = _grown(tokens, rows, own, places, solver, forms)
    return *_spread(leak, forms, tokens, rows, places, own), places


def _grown(
    tokens: Tokens, rows: Tensor, own: Tensor, places: Places, solver: TokenSolver, forms: Forms
) -> tuple[Tokens, Tensor, Tensor]:
    """Return (the tokens, their rows, which are solved at one row) with those that are missing, if they are found at
    rows where another image has a patch already, from the middle of all patches or a patch beside it."""
    leak = solver.leak
    kept = own | (tokens.error * max(leak.std) < CERTAIN) | mixtures(tokens, rows, places)
    missing = len(kept) - int(kept.sum())
    found, stand, sure = tokens.at(kept), rows[kept], (own | ~mixtures(tokens, rows, places))[kept]
    free = free_places(places, leak.batch_size, stand[sure])
    partly = (free > 0) & (free < leak.batch_size * places.counts) & (places.counts == 1)
    grid, kinds = leak.model.grid, places.kinds.tolist()
    tries = TRIES
    for row in partly.nonzero()[:, 0].tolist():
        down, right = divmod(kinds.index(row), grid[1])
        beside = [(down, right - 1), (down, right + 1), (down - 1, right), (down + 1, right)]
        near = [kinds[y * grid[1] + x] for y, x in beside if 0 <= y < grid[0] and 0 <= x < grid[1]]
        starts = torch.cat([solver.point[None], found.patches[sure & torch.isin(stand, torch.tensor(near))]])
        for start in starts:
            if not missing or not tries or not int(free[row]):
                break
            tries -= 1
            begun = unsure(start[None], solver, places.rows[row][None])
            found, solved = more(found, begun, places.rows[torch.cat([stand, torch.tensor([row])])], solver)
            if bool(solved):
                stand = nn.functional.pad(stand, (0, 1), value=row)
                sure = nn.functional.pad(sure, (0, 1), value=True)
                free[row] -= 1
                missing -= 1
    rest = (~kept).nonzero()[:missing, 0]
    return (
        found.joined(tokens.at(rest)),
        torch.cat([stand, rows[rest]]),
        nn.functional.pad(sure, (0, len(rest)), value=False),
    )


def token_solver(forms: Forms, mixed: Tensor, generator: torch.Generator) -> TokenSolver:
    """Return the equations of one token; mixed (n, D): what attention returned to some."""
    hull, outputs = affine_hull(forms.span.basis), outputs_of(forms.mixed, mixed)
    return TokenSolver(forms.block, hull, outputs, forms.span.clean, generator)


def _spread(
    leak: Leak, forms: Forms, tokens: Tokens, rows: Tensor, places: Places | None, own: Tensor
) -> tuple[Tokens, Tensor]:
    """Return (the tokens with those that are equal patches of several places at every row that has fewer tokens than
    it may have; their rows (n,)); own (n,) bool: solved at one row.

    A single such patch is all that can stand there if the other patches are known, and the gradients of patches and
    positions say that none of these is there twice: then its copies are claimed as it is.
    """
    if places is None or not forms.merged:
        return tokens, rows
    mixed = ~own & mixtures(tokens, rows, places)
    if not bool(mixed.any()):
        return tokens, rows
    free = free_places(places, leak.batch_size, rows[~mixed])
    known = bool((own | (tokens.error * max(leak.std) < CERTAIN))[~mixed].all())
    tokens, rows = tokens.at(~mixed).joined(tokens.at(mixed)), rows[~mixed]
    claimed = known and int(mixed.sum()) == 1 and _left_over(forms, tokens, rows, places, free)
    last, number = tokens.error[-1], len(rows)
    tokens, rows = copied(
        tokens,
        nn.functional.pad(rows, (0, len(mixed) - number), value=-1),
        torch.arange(len(mixed)) >= number,
        free > 0,
    )
    stands = rows >= 0  # the copies, and no more what they are copies of
    tokens, rows = tokens.at(stands), rows[stands]
    if claimed:
        tokens = replace(tokens, error=tokens.error.index_fill(0, torch.arange(number, len(rows)), float(last)))
    return tokens, rows


def _left_over(forms: Forms, tokens: Tokens, rows: Tensor, places: Places, free: Tensor) -> bool:
    """Return whether the last token stands in all places that are free (R,), and the others once, at rows (n - 1,).

    The gradient of the patch projection, sum g [x; 1]^T, says the g of every other patch, and the rows of the position
    gradient what is left when these are taken away: nothing where no place is free, and where there are some, what is
    left at another row too, for the g of equal patches of one image is nearly the same everywhere. The g of another
    patch is not (measured: 0.01 and 1.1 times its size apart).
    """
    if len(tokens.patches) != len(forms.span.basis) or places.gradient is None:
        return False
    sums = forms.span.on(nn.functional.pad(tokens.patches, (0, 1), value=1.0))  # (D, n)
    rest = places.gradient.index_add(0, rows, -sums[:, :-1].T)  # (R, D)
    size, open_rows = rest.norm(dim=1), free > 0
    if bool((size[~open_rows] > ALIKE * size[open_rows].median()).any()):
        return False
    apart = torch.cdist(rest, rest, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    others = open_rows[None] & (free[:, None] == free[None])
    return bool((apart.masked_fill(~others, torch.inf).min(dim=1).values < ALIKE * size)[open_rows].all())


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


def _entering(leak: Leak, tokens: Tokens, added: Tensor) -> Tensor:
    """Return the centred tokens z^ (m, D) of patches with what is added to each (n, D), prefix tokens first."""
    prefix, _ = prefix_tokens(leak)
    embedded = nn.functional.pad(tokens.patches, (0, 1), value=1.0) @ affine(leak.model.get_submodule(PATCHES)).T
    return centre(torch.cat([prefix, embedded + added]))
