"""Exact search in the row space of the first block, in the spirit of DAGER, for tables whose gradients are not shared.

The first block's query, key and value weights have the gradient sum_i h_i x_i^T, so its rows span the inputs x_i of the
block's attention, n vectors among D dimensions. Such an input depends on its token and its position row alone,
x = E[w] + e_p (behind BERT's LayerNorm and token type, or GPT-2's first LayerNorm, where there are). The server knows
both tables: every token at every place is tried, and those whose input lies in the span are what the sentence holds
there. With MJP the unknown row is one more place: it holds the set of hidden tokens.

Several tokens fit a place where the differences of others span it: a token that is both visible at p and hidden makes
every hidden token fit p. Those, and how often a token is hidden, are decided by the gradient of the guesses, as in
attacks/text/token_rows.py. An attacker without knowledge of MJP does not try the unknown row.

Of several sentences the first block tells which tokens stand at a place in any of them; which belong together, the
second block tells (attacks/text/assembly.py).

Source: Petrov et al., DAGER, NeurIPS 2024. One sentence needs no search on the second layer: an encoder with learned
positions tells tokens and places apart in the first.
"""

import torch
from torch import Tensor

from attacks.exactness import claim, rounding
from attacks.text.assembly import Choices, assemble, gradient_error
from attacks.text.bigram_order import order_hidden
from attacks.text.sentence import Guesses, check_table_attack, found_below, search, with_last_token
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from attacks.threat_model.local_step import causal
from attacks.threat_model.uses import LABELS, MJP, PUBLIC
from utils.errors import UserError

QKV, SECOND = (f"blocks.{number}.attn.qkv.weight" for number in range(2))
NEARER = 1e-2  # a token of another sentence moves an input of the second block by little
# By rounding of the leak: singular values below this share of the largest are rounding; inputs nearer to the span than
# this are inside. Half precision has the last.
ROUNDING = {torch.finfo(torch.float64).eps: (1e-13, 1e-6), torch.finfo(torch.float32).eps: (5e-8, 1e-2)}


def check_dager(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the leak is a gradient behind a model with position rows, and holds that of the first
    block's query, key and value weights; for several sentences of the second's too."""
    check_table_attack(leak, options, loss, attack, batches=True)
    leak.gradient(QKV, attack)
    if leak.batch_size > 1:
        leak.gradient(SECOND, attack)
        if len(leak.model.blocks) < 3 or causal(leak.model):
            needed = "a classifier of 3 blocks or more: of the last one a single token is read"
            raise RefusalError(f"attack '{attack}' on several sentences needs {needed}")
        if leak.attacker_knowledge not in ("none", "method"):
            raise RefusalError(
                f"attack '{attack}' infers the masks of several sentences: use --attacker_knowledge method"
            )
    if leak.model.pos_embed is None:
        raise RefusalError(f"attack '{attack}' tells places apart by position rows, and this model has none")


@checked(check_dager, uses=(LABELS, MJP, PUBLIC))
def dager(
    leak: Leak, *, generator: torch.Generator, tolerance: float = 0.0, sweeps: int = 40, tries: int = 20
) -> Reconstruction:
    """Reconstruct sentences from the gradient of the first block's query, key and value weights.

    diagnostics: length, hidden (places that no token fits), rank (of the span), candidates (tokens per visible place,
    mean), hidden_tokens (different ones), objective (of the guess; NaN where none was tried, or where its label cannot
    be had), exact_up_to_order (the span has a dimension for every different input, and the sentence repeats the
    gradient up to the rounding of the leak), exact (and no two different tokens are hidden). Of several sentences
    also assembled (how many are inside the second block's span) and distance (from it, the largest).
    Raises UserError without that gradient, for models without position rows, and where n is not below D.

    Args:
        tolerance: Largest distance of an input from the span, over its length, that counts as inside; 0 is 1e-2 for
            float32 gradients and 1e-6 for float64.
        sweeps: Rounds of the search where several tokens fit.
        tries: Mixtures of tokens to begin with for each of several sentences.
    """
    model, gradient = leak.model, leak.gradient(QKV, "dager")
    eps = rounding([gradient])
    limit = tolerance or _inside(eps)[1]
    basis = _span(leak, gradient, eps)
    if tries < 1:
        raise UserError(f"attack 'dager' begins with at least one mixture: tries must be 1 or more, got {tries}")
    if leak.batch_size > 1:
        return _several(leak, basis, eps, limit, tries, sweeps, generator)
    length = leak.image_shape[0] - causal(model)  # the last token of a language model enters no span
    places = model.pos_embed.detach()[0, :length]
    distance = torch.stack([_distance(leak, row, basis) for row in places])  # (n, V)
    fits = distance < limit
    hides = model.hides_positions and leak.attacker_knowledge != "none"
    hidden = ~fits.any(dim=1) if leak.mask is None else leak.mask.flatten().cpu()
    ids = distance.argmin(dim=1)
    ids[hidden] = 0
    choices = {
        place: distance[place].argsort()[: int(fits[place].sum())].tolist()
        for place in range(length)
        if not hidden[place] and fits[place].sum() > 1
    }
    holes = hidden.nonzero()[:, 0]
    bag: list[int] = []
    if hides and len(holes):
        unknown = _distance(leak, model.unknown_pos_embed.detach()[0, 0], basis)
        order = unknown.argsort()
        number = int((unknown < limit).sum().clamp(1, len(holes)))
        bag = order[:number].tolist()
        ids[holes] = torch.tensor(bag).repeat(-(-len(holes) // len(bag)))[: len(holes)]
    if causal(model):
        ids = with_last_token(leak, ids)
    objective = float("nan")
    if sweeps and (choices or bag):
        guesses = Guesses(leak, hidden if hides else None, generator)
        given = choices, holes.tolist() if bag else [], bag
        ids, objective = search(guesses, ids, *given, sweeps, found_below(eps))
    elif not len(holes):
        objective = _score(leak, ids, generator)
    if bag:
        ids = order_hidden(leak, ids, hidden, generator)
    inputs = length - len(holes) + len(set(bag))  # that differ: equal hidden tokens are one
    solved = len(basis) == inputs and (bool(bag) or not len(holes)) and objective < found_below(eps)
    diagnostics = {
        "length": length,
        "hidden": len(holes),
        "rank": len(basis),
        "candidates": float(fits[~hidden].sum(dim=1).double().mean()) if (~hidden).any() else 0.0,
        "hidden_tokens": len(bag),
        "objective": objective,
        **claim(patches=solved, places=len(set(bag)) < 2),
    }
    return Reconstruction(ids[None], diagnostics)


def _inside(eps: float) -> tuple[float, float]:
    """Return the share of the largest singular value that is rounding, and the distance that counts as inside."""
    return ROUNDING.get(eps, (eps, 10 * eps**0.5))


def _span(leak: Leak, gradient: Tensor, eps: float) -> Tensor:
    """Return an orthonormal basis (r, D) of the rows of a gradient (3 D, D), r at most the tokens of the batch. Raises
    UserError where it spans everything."""
    _, values, right = torch.linalg.svd(gradient.double().cpu(), full_matrices=False)
    basis = right[values > _inside(eps)[0] * values[0]][: leak.batch_size * leak.image_shape[0]]
    if len(basis) >= gradient.shape[1]:
        raise RefusalError("attack 'dager' needs fewer tokens than dimensions: the gradient spans everything")
    return basis


def _several(
    leak: Leak, basis: Tensor, eps: float, limit: float, tries: int, sweeps: int, generator: torch.Generator
) -> Reconstruction:
    """Return the sentences of a batch. They are solved where each is inside the second block's span, and together they
    repeat the gradient up to the rounding of the leak."""
    model, length = leak.model, leak.image_shape[0]
    hidden = torch.zeros(0, dtype=torch.int64)
    if model.hides_positions and leak.attacker_knowledge != "none":
        hidden = (_distance(leak, model.unknown_pos_embed.detach()[0, 0], basis) < limit).nonzero()[:, 0]
    choices = []
    for place, row in enumerate(model.pos_embed.detach()[0, :length]):
        distance = _distance(leak, row, basis)
        seen = (distance < limit).nonzero()[:, 0]  # the lowest ids first: special tokens, as at the end of sentences
        away = hidden if 0 < place < length - 1 else hidden[:0]  # the first and the last token are never masked
        seen = seen if len(seen) + len(away) else distance.argmin()[None]
        flags = torch.cat([torch.zeros(len(seen), dtype=torch.bool), torch.ones(len(away), dtype=torch.bool)])
        choices.append(Choices(torch.cat([seen, away]), flags))
    second, near = _span(leak, leak.gradient(SECOND, "dager"), eps), NEARER * limit
    found = assemble(leak, second, choices, tries=tries, sweeps=sweeps, limit=near, generator=generator)
    inside = sum(one.distance < near for one in found)
    objective = gradient_error(leak, found) if inside == leak.batch_size else float("nan")
    solved = inside == leak.batch_size and objective < found_below(eps)
    diagnostics = {
        "length": length,
        "hidden_tokens": len(hidden),
        "rank": len(basis),
        "candidates": sum(len(one.tokens) for one in choices) / length,
        "assembled": inside,
        "distance": max(one.distance for one in found),
        "objective": objective,
        **claim(patches=solved, places=not any(one.hidden.any() for one in found)),
    }
    return Reconstruction(torch.stack([one.ids for one in found]), diagnostics)


def _score(leak: Leak, ids: Tensor, generator: torch.Generator) -> float:
    """Return the objective of a sentence that is the only one that fits; NaN where its label cannot be had."""
    try:
        return float(Guesses(leak, None, generator)(ids[None])[0])
    except UserError:
        return float("nan")


@torch.no_grad()
def _distance(leak: Leak, row: Tensor, basis: Tensor) -> Tensor:
    """Return (V,): how far the block's input of every token at a place with position row `row` (D,) is from the span,
    over its length; infinite for padding."""
    model = leak.model
    tokens = model.token_embed.weight + row
    tokens = model.embed_norm(tokens if model.type_embed is None else tokens + model.type_embed[0, 0])
    tokens = model.blocks[0].attention_input(tokens).double().cpu()
    away = tokens - (tokens @ basis.T) @ basis
    distance = away.norm(dim=1) / tokens.norm(dim=1)
    if model.pad is not None:
        distance[model.pad] = torch.inf
    return distance
