"""Batches with equal patches whose gradient is rounded to single precision: every content once, then all its places.

Equal patches at different places are one token in the forms of such a gradient (attacks/joint/block.py, common_ranks),
a mixture of its places. A patch that is there once is told from it by its row: with W x + b + e_p of its own place p it
lies in the row space of query, key and value, with any other row it does not, and a mixture does with none. So patches
are solved one by one at the rows that fit them, those that are solved and fit are taken out of the forms, and what is
left last is the content of the equal patches, which stands in all places that nobody else has. Where it is of one
colour, as borders and backgrounds are, the row space of the patches says which: it holds one such patch and no other.

Solved patches alone are claimed; the equal ones if everything else is solved, the gradients of patches and positions
say that nothing else stands twice, and to the error of that colour or by which the forms disagree on them.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Places, affine, entering
from attacks.joint.diagonal import Tokens, tokens_of
from attacks.joint.forms import Forms
from attacks.joint.placement import copied, free_places
from attacks.joint.polish import SAME, more, unsure
from attacks.joint.token_solver import TokenSolver
from attacks.linear.mjp_equations import CERTAIN, centre
from attacks.linear.row_spaces import Rows, orthonormal, outside
from attacks.threat_model.leak import Leak

ROUNDS = 7
TRIES = 60  # starts at and beside patches that are known
CLEAR = 1 / 3  # of how far the second row is from the span: below that the first one is the token's
FLAT = 1e-6  # last entry of a unit vector [x; 1] below which there is no patch, and angles that are none
ALIKE = 0.1  # relative, how far apart the gradients of one patch at two places of an image are at most


def equal_tokens(
    forms: Forms, tokens: Tokens, places: Places, solver: TokenSolver, polish: bool
) -> tuple[Tokens, Tensor]:
    """Return (the patches of a batch at the rows of the table where they stand, equal ones once for each place, of
    infinite error where they are not claimed; their rows (n,)), from the tokens that the forms have. polish: solve
    them, without which nothing is claimed."""
    images, span = solver.leak.batch_size, solver.block.tokens.basis
    found, rows, left = tokens.at(torch.zeros(0, dtype=torch.long)), torch.zeros(0, dtype=torch.long), tokens
    for _ in range(ROUNDS if polish else 0):
        nearest, _ = standing(solver.leak, span, left.patches, places, free_places(places, images, rows) > 0)
        both, solved = more(found, left, places.rows[torch.cat([rows, nearest])], solver)
        new = torch.arange(len(found.patches), len(both.patches))
        again, clear = standing(solver.leak, span, both.patches[new], places, free_places(places, images, rows) > 0)
        fits = clear & (again == nearest[solved])
        if not bool(fits.any()):
            break
        found, rows = found.joined(both.at(new[fits])), torch.cat([rows, again[fits]])
        left = tokens_of(forms, entering(solver.leak, found.patches, places.rows[rows]))
        if not len(left.patches):
            break
    if polish and places.kinds is not None and len(found.patches) + 1 < forms.tokens:
        before = len(rows)
        found, rows = beside(found, rows, places, solver)
        if len(rows) > before:
            left = tokens_of(forms, entering(solver.leak, found.patches, places.rows[rows]))
    free = free_places(places, images, rows) > 0
    if not bool(free.any()):
        return found, rows
    if places.kinds is None:  # images with a mask each: a place that nobody has may be a hidden one
        nearest, _ = standing(solver.leak, span, left.patches, places, free)
        left = replace(left, error=torch.full_like(left.error, torch.inf))
        return found.joined(left), torch.cat([rows, nearest])
    nearest, clear = standing(solver.leak, span, left.patches, places, free)
    stand = torch.cat([rows, nearest[clear]])
    again = repeated(forms, found.joined(left.at(clear)), stand, left.at(~clear), places)
    if again is not None and again >= len(rows):  # a mixture that is near one of its rows
        clear[clear.nonzero()[again - len(rows), 0]] = False
    elif again is not None:  # one that was solved there: those left are no mixture
        others = torch.arange(len(rows)) != again
        left, nearest = left.joined(found.at(~others)), torch.cat([nearest, rows[~others]])
        clear = torch.arange(len(nearest)) < len(nearest) - 1
        found, rows = found.at(others), rows[others]
    return spread(forms, found, rows, left, places, nearest, clear) if len(left.patches) else (found, rows)


def beside(found: Tokens, rows: Tensor, places: Places, solver: TokenSolver) -> tuple[Tokens, Tensor]:
    """Return (the found tokens, their rows (n,)) with those that solve the equations at a row where another image has
    one already, from the patches at that row and beside it or from the middle of all."""
    leak, kinds = solver.leak, places.kinds.tolist()
    free = free_places(places, leak.batch_size, rows)
    partly = ((free > 0) & (free < leak.batch_size * places.counts) & (places.counts == 1)).nonzero()[:, 0].tolist()
    grid, tries = leak.model.grid, TRIES
    for row in partly:
        down, right = divmod(kinds.index(row), grid[1])
        steps = [(down, right), (down, right - 1), (down, right + 1), (down - 1, right), (down + 1, right)]
        near = torch.tensor([kinds[y * grid[1] + x] for y, x in steps if 0 <= y < grid[0] and 0 <= x < grid[1]])
        starts = torch.cat([solver.point[None], found.patches[torch.isin(rows, near)]])[:tries]
        tries -= len(starts)
        begun = unsure(starts, solver, places.rows[row].expand(len(starts), -1))
        both, solved = more(found, begun, places.rows[nn.functional.pad(rows, (0, len(starts)), value=row)], solver)
        new = torch.arange(len(rows), len(both.patches))
        stand, clear = standing(leak, solver.block.tokens.basis, both.patches[new], places, free > 0)
        new = new[clear & (stand == row)][: int(free[row])]
        found, rows = found.joined(both.at(new)), nn.functional.pad(rows, (0, len(new)), value=row)
    return found, rows


def standing(leak: Leak, span: Tensor, patches: Tensor, places: Places, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the row (n,) of the table, of the free ones (R,) bool, with which each patch (n, P) is nearest to the
    span (r, D) of the tokens that enter; whether no other row is nearly as near (n,))."""
    axes = orthonormal(centre(span).T)
    embedded = nn.functional.pad(patches, (0, 1), value=1.0) @ affine(leak.model.get_submodule(PATCHES)).T
    own, added = (outside(centre(part).T, axes).T for part in (embedded, places.rows))  # (n, D), (R, D)
    away = torch.cdist(own, -added, compute_mode="donot_use_mm_for_euclid_dist")
    rows = away.masked_fill(~free, torch.inf).argmin(dim=1)
    nearest = away.gather(1, rows[:, None])[:, 0]
    second = away.scatter(1, rows[:, None], torch.inf).amin(dim=1)  # of all rows, taken ones too
    return rows, nearest < CLEAR * second


def plain_patch(span: Rows, channels: int) -> tuple[Tensor, float] | None:
    """Return (the patch (P,) of one colour in the row space of the patches, its predicted error), None where there is
    not exactly one: [x; 1] of every patch lies in it, and of other patches only what those combine to."""
    values = (span.basis.shape[1] - 1) // channels
    colours = torch.kron(torch.eye(channels), torch.ones(1, values) / values**0.5).to(span.basis)
    colours = torch.block_diag(colours, torch.ones_like(colours[:1, :1]))  # (C + 1, P + 1), orthonormal
    left, away, _ = torch.linalg.svd(colours - colours @ span.basis.T @ span.basis, full_matrices=False)
    vector = left[:, -1] @ colours
    if not float(vector[-1].abs()) > FLAT:
        return None
    vector = vector / vector[-1]
    tilt = float(span.error(vector[None]))
    off = float(away[-1] * vector.norm()) / len(vector) ** 0.5
    error = max(tilt, off) / float(away[-2].clamp_min(FLAT))
    return (vector[:-1], error) if off < SAME * tilt and error < CERTAIN else None


def spread(
    forms: Forms, found: Tokens, rows: Tensor, left: Tokens, places: Places, nearest: Tensor, clear: Tensor
) -> tuple[Tokens, Tensor]:
    """Return (the found tokens at rows (n,) and those left (m,), each at its nearest row (m,); a single one of which it
    is not clear (m,) that this is its own, at every row that has fewer tokens than it may have; the rows of all).

    A single such patch is all that can stand there if the other patches are known, and the gradients of patches and
    positions say that none of these is there twice: then its copies are claimed as it is.
    """
    leak, number = forms.block.leak, len(rows)
    plain = plain_patch(forms.span, forms.block.leak.model.get_submodule(PATCHES).in_channels)
    mixed = (~clear).nonzero()[:, 0]
    if plain is not None:  # unless it stands somewhere already
        patch, error = plain
        apart = (found.patches - patch).square().mean(dim=1).sqrt()
        plain = None if bool((apart < SAME * (error + found.error)).any()) else plain
    if plain is not None and len(mixed):
        mixed = mixed[(left.patches[mixed] - patch).square().sum(dim=1).argmin()][None]
        left = replace(left, patches=left.patches.index_copy(0, mixed, patch[None]))
        left = replace(left, error=left.error.index_fill(0, mixed, error))
    elif len(mixed) > 1:  # which of them is a mixture is not known, and one in every place hides those that are known
        mixed = mixed[:0]
    single = torch.isin(torch.arange(len(nearest)), mixed, invert=True)
    last, others = left.at(mixed), left.at(single)
    free = free_places(places, leak.batch_size, rows)
    claimed = not len(others.patches) and len(mixed) == 1 and _left_over(forms, found, last, rows, places, free)
    rows = torch.cat([rows, nearest[single]])
    others = replace(others, error=torch.full_like(others.error, torch.inf))
    free = free_places(places, leak.batch_size, rows)
    tokens, rows = copied(
        found.joined(others).joined(last),
        nn.functional.pad(rows, (0, len(mixed)), value=-1),
        torch.arange(len(rows) + len(mixed)) >= len(rows),
        free > 0,
    )
    stands = rows >= 0  # the copies, and no more what they are copies of
    tokens, rows = tokens.at(stands), rows[stands]
    if claimed:
        copies = torch.arange(number, len(rows))
        tokens = replace(tokens, error=tokens.error.index_fill(0, copies, float(last.error[0])))
    return tokens, rows


def _left_over(forms: Forms, found: Tokens, last: Tokens, rows: Tensor, places: Places, free: Tensor) -> bool:
    """Return whether the last token stands in all places that are free (R,), and those found once, at rows (n,).

    The gradient of the patch projection, sum g [x; 1]^T, says the g of every other patch, and the rows of the position
    gradient what is left when these are taken away: nothing where no place is free, and where there are some, what is
    left at another row too, for the g of equal patches of one image is nearly the same everywhere. The g of another
    patch is not (measured: 0.01 and 1.1 times its size apart).
    """
    if len(found.patches) + 1 != len(forms.span.basis) or places.gradient is None:
        return False
    rest = _rest(_sums(forms, torch.cat([found.patches, last.patches])), rows, places)
    size, open_rows = rest.norm(dim=1), free > 0
    if bool((size[~open_rows] > ALIKE * size[open_rows].median()).any()):
        return False
    return bool(_alike(rest, free)[open_rows].all())


def repeated(forms: Forms, found: Tokens, rows: Tensor, left: Tokens, places: Places) -> int | None:
    """Return which of n found tokens, at rows (n,), stands in other places that are free too, None where none is seen
    to; left: what has no row.

    What the gradient of the patch projection says of all its places is taken from the one row where it was found, which
    leaves most there; given back, that row has what is left at another.
    """
    patches = torch.cat([found.patches, left.patches])
    if not len(rows) or len(patches) != len(forms.span.basis) or places.gradient is None:
        return None
    sums = _sums(forms, patches)
    rest = _rest(sums, rows, places)
    most = int(rest[rows].norm(dim=1).argmax())
    rest[rows[most]] += sums[:, most]
    others = rows[torch.arange(len(rows)) != most]
    alike = _alike(rest, free_places(places, forms.block.leak.batch_size, others))
    return most if bool(alike[rows[most]]) else None


def _sums(forms: Forms, patches: Tensor) -> Tensor:
    """Return the gradient (D, n) of each of the patches (n, P), summed over all its places; they are all that there
    are."""
    return forms.span.on(nn.functional.pad(patches, (0, 1), value=1.0))


def _rest(sums: Tensor, rows: Tensor, places: Places) -> Tensor:
    """Return what the gradient of the rows (R, D) has beyond the sums (D, .) of the first n patches, at rows (n,)."""
    return places.gradient.index_add(0, rows, -sums[:, : len(rows)].T)


def _alike(rest: Tensor, free: Tensor) -> Tensor:
    """Return at which rows (R,) of those with free places (R,) another one, of as many, has the same rest (R, D)."""
    apart = torch.cdist(rest, rest, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    others = (free > 0)[None] & (free[:, None] == free[None])
    return apart.masked_fill(~others, torch.inf).min(dim=1).values < ALIKE * rest.norm(dim=1)
