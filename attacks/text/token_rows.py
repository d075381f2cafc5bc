"""Closed form on sentences: which tokens occur stands in the token rows of the gradient, where they stand in its
position rows. One sentence, no optimisation.

A token enters as x_i = E[w_i] + e_i. So the gradient g_i of x_i goes to row w_i of the token table and to position row
i:

    dL/dE = A^T G,   A (n, V) one-hot in w_i, G (n, D) the position rows.

1. Rows of dL/dE that are not zero are the tokens that occur; the last position row that is not zero is the length.
2. Column v of A is lstsq(G^T, row v): zeros and ones, exactly, for n <= D independent position rows. It also says how
   often and where a token occurs. This is the closed form of images (attacks/linear/closed_form.py) with one-hot
   patches.
3. MJP: hidden places have zero rows, and s, the gradient of the unknown row, is the sum of their g_i. A token that is
   nowhere hidden still has a row in the span of the visible g_i, and is placed exactly. A row that is not in that span
   belongs to a hidden token: so the set of hidden tokens is read off. How often each is hidden, and which of the few
   visible places left hold one of them too, is found by trying: the gradient of the right guess is the leaked one.
   The order of the hidden tokens is in no gradient; the language tells what it can (attacks/text/bigram_order.py).

An attacker without knowledge of MJP stops at 2 and puts the tokens it could not place into the empty places in order of
their ids. Source: derived for this project; step 1 is folklore (Melis et al., 2019), and what DLG and TAG leave unused.
"""

import torch
from torch import Tensor

from attacks.exactness import claim, numerical_rank, rounding
from attacks.text.bigram_order import order_hidden
from attacks.text.sentence import Guesses, check_table_attack, found_below, present_rows, search, with_last_token
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from attacks.threat_model.local_step import causal
from attacks.threat_model.uses import LABELS, MJP, PUBLIC

TOKENS, POSITIONS = "token_embed.weight", "pos_embed"
OUTSIDE = 3.0  # times the square root of the leak's rounding: share of a hidden token's row outside the visible span
WHOLE = 0.1  # largest distance of an entry of A from 0 or 1


def check_token_rows(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the leak is the gradient of one sentence behind a model whose token table is no decoder,
    and none of a language model's places is hidden."""
    check_table_attack(leak, options, loss, attack)
    if causal(leak.model) and leak.model.tied:
        why = "and in this model the table is the decoder too, which adds to the row of every token"
        raise RefusalError(f"attack '{attack}' reads the rows of the token table's gradient, {why}: use dager")


@checked(check_token_rows, uses=(LABELS, MJP, PUBLIC))
def token_rows(leak: Leak, *, generator: torch.Generator, sweeps: int = 40) -> Reconstruction:
    """Reconstruct one sentence from the gradients of its token and position tables, by `leak.attacker_knowledge`.

    diagnostics: length; hidden (masked places found);
    tokens (different ones found); hidden_tokens (different ones among the hidden); rank (of the position rows);
    residual (largest share of a placed token's row that its places do not explain); objective (of the guess, NaN where
    none was tried); exact_up_to_order (full rank at the rounding of the leak, and the equations hold up to it or the
    guess repeats the gradient up to it), exact (and no two different tokens are hidden).
    Raises UserError where a gradient is missing or more than one sentence is mixed in it.

    Args:
        sweeps: Rounds of the search for repetitions among hidden tokens.
    """
    table, rows = (leak.gradient(name, "token_rows").double().cpu() for name in (TOKENS, POSITIONS))
    present = present_rows(table).nonzero()[:, 0]
    seen = present_rows(rows[0], noise=table)
    length = int(seen.nonzero().max()) + 1 if seen.any() else leak.image_shape[0]
    hidden = ~seen[:length] if leak.mask is None else leak.mask.flatten().cpu()[:length]
    visible, holes = (~hidden).nonzero()[:, 0], hidden.nonzero()[:, 0]
    solution = torch.linalg.lstsq(rows[0, visible].T, table[present].T, driver="gelsd")
    weights = solution.solution  # (visible, present): A
    eps = rounding((table, rows))
    rank = numerical_rank(torch.linalg.svdvals(rows[0, visible]), max(rows.shape[1:]), eps)
    residual = (rows[0, visible].T @ weights - table[present].T).norm(dim=0) / table[present].norm(dim=1)
    ids = torch.zeros(length, dtype=torch.int64)
    ids[visible] = present[weights.argmax(dim=1)]
    diagnostics = {"length": length, "hidden": len(holes), "tokens": len(present), "rank": rank}
    outside = residual > OUTSIDE * eps**0.5
    if len(holes) == 0 or leak.attacker_knowledge == "none" or not leak.model.hides_positions:
        left = present[~torch.isin(present, ids[visible])][: len(holes)]
        ids[holes[: len(left)]] = left
        found = {"hidden_tokens": len(left), "residual": float(residual.max()), "objective": float("nan")}
        one_hot = (weights - weights.round()).abs().max() < WHOLE and bool((weights.round().sum(dim=1) == 1).all())
        exact = len(holes) == 0 and rank == length and one_hot and not outside.any()
        if causal(leak.model) and length == leak.image_shape[0] - 1:
            ids = with_last_token(leak, ids)
            exact = exact and float(Guesses(leak, None, generator)(ids[None])[0]) < found_below(eps)
        return Reconstruction(ids[None], diagnostics | found | claim(patches=bool(exact), places=True))
    bag = present[outside][: len(holes)]
    if len(bag) == 0:  # noise has hidden the difference: take the rows that fit worst
        bag = present[residual.argsort(descending=True)[:1]]
    if not outside.all():
        ids[visible] = present[~outside][weights[:, ~outside].argmax(dim=1)]
    choices = _left(weights, present, outside, visible)
    for place, tokens in choices.items():
        ids[place] = tokens[0]
    ids[holes] = bag.repeat(-(-len(holes) // len(bag)))[: len(holes)]
    objective = float("nan")
    if sweeps:
        guesses = Guesses(leak, hidden, generator)
        ids, objective = search(guesses, ids, choices, holes.tolist(), bag.tolist(), sweeps, found_below(eps))
    ids = order_hidden(leak, ids, hidden, generator)
    placed = torch.cat([residual[~outside], residual.new_zeros(1)])
    found = {"hidden_tokens": len(bag), "residual": float(placed.max())}
    solved = claim(patches=rank == len(visible) and objective < found_below(eps), places=len(bag) < 2)
    return Reconstruction(ids[None], diagnostics | found | {"objective": objective} | solved)


def _left(weights: Tensor, present: Tensor, outside: Tensor, visible: Tensor) -> dict[int, list[int]]:
    """Return the visible places that no token of the visible span claims: the hidden tokens they may hold, likeliest
    first."""
    claimed = (weights[:, ~outside] > 0.5).any(dim=1)
    order = weights[:, outside].argsort(dim=1, descending=True)
    return {int(visible[row]): present[outside][order[row]].tolist() for row in (~claimed).nonzero()[:, 0].tolist()}
