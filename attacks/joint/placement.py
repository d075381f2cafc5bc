"""Place the tokens of a batch: the row of the position table that was added to each is the nearest one.

Where rows share their tokens, or a token stands between several rows, the number of places that each row has decides.
"""

from dataclasses import replace

import scipy
import torch
from torch import Tensor

from attacks.joint.block import Places
from attacks.joint.diagonal import Tokens
from attacks.linear.row_spaces import least_squares

NEAR = 0.1  # predicted error of a pixel, normalised, above which a token says nothing about places
MOST = 0.75  # share of a row from which on a token stands in it: of two or more it has less


def with_mask(tokens: Tokens, places: Places | None) -> Places | None:
    """Return the places with the mask that the tokens tell, where the gradients do not: nobody stands in the row of a
    masked place."""
    if places is None or places.counts is not None:
        return places
    unknown = len(places.rows) - 1
    seen = torch.bincount(nearest_rows(tokens, places), minlength=unknown + 1)[:unknown] > 0
    kinds = torch.where(seen, torch.arange(unknown), unknown)
    return replace(places, kinds=kinds, counts=torch.bincount(kinds, minlength=unknown + 1))


def free_places(places: Places | None, images: int, taken: Tensor | None = None) -> Tensor:
    """Return how many places (R,) of each row of the table, in all images together, no token of rows taken (n,) has."""
    if places is None:
        return torch.zeros(1, dtype=torch.long)
    free = images * places.counts
    return free if taken is None else (free - torch.bincount(taken, minlength=len(free))).clamp_min(0)


def nearest_rows(tokens: Tokens, places: Places, allowed: Tensor | None = None) -> Tensor:
    """Return the row (n,) of the table nearest to what was added to each token; allowed (n, R) bool."""
    apart = torch.cdist(tokens.places, places.rows, compute_mode="donot_use_mm_for_euclid_dist")
    return (apart if allowed is None else apart.masked_fill(~allowed, torch.inf)).argmin(dim=1)


def placed_tokens(tokens: Tokens, places: Places | None, free: Tensor, clean: bool) -> tuple[Tokens, Tensor]:
    """Return (the tokens, the row of the table that was added to each (n,), zeros without one); free (R,): how many
    tokens each row may have.

    Unless rounding is that of double precision (clean), equal patches at different places can be one token, a mixture
    of its places. Such a token is offered to every row that has fewer tokens than it may have.
    """
    if places is None:
        return tokens, torch.zeros(len(tokens.patches), dtype=torch.long)
    rows = nearest_rows(tokens, places)
    if places.kinds is None:  # with a mask each, a row that has fewer tokens may just be hidden
        return tokens, rows
    if clean:
        return tokens, rows if bool(torch.isin(free.nonzero()[:, 0], rows).all()) else covering(tokens, places, free)
    if len(rows) == int(free.sum()):  # as many tokens as there are places: each is taken once
        seats = torch.arange(len(places.rows)).repeat_interleave(free)
        apart = torch.cdist(tokens.places, places.rows[seats], compute_mode="donot_use_mm_for_euclid_dist").square()
        return tokens, seats[torch.from_numpy(scipy.optimize.linear_sum_assignment(apart.numpy())[1])]
    return copied(tokens, rows, mixtures(tokens, rows, places), torch.bincount(rows, minlength=len(free)) < free)


def covering(tokens: Tokens, places: Places, free: Tensor) -> Tensor:
    """Return the row of the table for each token (n,), nearest in sum, such that every row has one: each image has a
    patch at every place. free (R,): how many tokens each row may have."""
    seats = torch.arange(len(free)).repeat_interleave(free)
    apart = torch.cdist(tokens.places, places.rows[seats], compute_mode="donot_use_mm_for_euclid_dist").square()
    first = torch.nn.functional.pad(seats[1:] != seats[:-1], (1, 0), value=True)
    apart[:, first] -= apart.sum()  # dearer than all else is a row without a token
    token, seat = scipy.optimize.linear_sum_assignment(apart.numpy())
    rows = nearest_rows(tokens, places)
    return rows.index_copy(0, torch.from_numpy(token), seats[torch.from_numpy(seat)])


def mixtures(tokens: Tokens, rows: Tensor, places: Places) -> Tensor:
    """Return which tokens (n,) bool, nearest to rows (n,) of the table, stand between several of them."""
    away = (tokens.places - places.rows[rows]).norm(dim=1)
    apart = torch.cdist(places.rows, places.rows).fill_diagonal_(torch.inf).min(dim=1).values[rows]
    shares = least_squares(places.rows.T, tokens.places.T)  # (R, n): of every row in what was added
    return (away > apart / 2) & (shares.max(dim=0).values < MOST) & (tokens.error < NEAR)


def copied(tokens: Tokens, rows: Tensor, chosen: Tensor, open_rows: Tensor) -> tuple[Tokens, Tensor]:
    """Return (the tokens with a copy of each chosen one (n,) bool at every open row (R,) bool of the table that it does
    not stand in, behind them; their rows)."""
    order, added = list(range(len(rows))), rows.tolist()
    for token in chosen.nonzero()[:, 0].tolist():
        wanted = [row for row in open_rows.nonzero()[:, 0].tolist() if row != int(rows[token])]
        order += [token] * len(wanted)
        added += wanted
    tokens = tokens.at(torch.tensor(order, dtype=torch.long))
    # Nothing but a solution says that an offered token stands in that row.
    error = tokens.error.index_fill(0, torch.arange(len(rows), len(order)), torch.inf)
    return replace(tokens, error=error), torch.tensor(added)
