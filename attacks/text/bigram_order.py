"""What the language says of the order of tokens that no gradient orders: a bigram model of public sentences.

Without public sentences the order is drawn at random. With them, counts of pairs of neighbours, smoothed, score a
sentence, and exchanges of two hidden tokens that raise the score are made until none does, from several random orders.
"""

import torch
from torch import Tensor

from attacks.threat_model.leak import Leak

SMOOTHING = 0.01
STARTS = 12


def order_hidden(leak: Leak, ids: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return ids (n,) with the tokens at the places `hidden` (n,) bool in their likeliest order."""
    places = hidden.nonzero()[:, 0]
    if len(places) < 2:
        return ids
    shuffled = ids.clone()
    shuffled[places] = ids[places][torch.randperm(len(places), generator=generator)]
    if not leak.public:
        return shuffled
    score, best = pair_scores(leak.public, ids), (-torch.inf, ids)
    for _ in range(STARTS):
        guess, value = _climb(score, shuffled.clone(), places)
        best = max(best, (value, guess), key=lambda pair: pair[0])
        shuffled[places] = ids[places][torch.randperm(len(places), generator=generator)]
    return best[1]


def pair_scores(public: tuple[Tensor, ...], ids: Tensor) -> dict[int, Tensor]:
    """Return {token: log p(next | token) (vocabulary,) float64} for the tokens of `ids`."""
    text = torch.cat([torch.cat([one, one.new_full((1,), -1)]) for one in public])
    size = int(max(text.max(), ids.max())) + 1
    scores = {}
    for token in ids.unique().tolist():
        following = text[1:][text[:-1] == token]
        counts = torch.bincount(following[following >= 0], minlength=size).double()
        scores[token] = ((counts + SMOOTHING) / (counts.sum() + SMOOTHING * size)).log()
    return scores


def _climb(score: dict[int, Tensor], ids: Tensor, places: Tensor) -> tuple[Tensor, float]:
    """Exchange pairs of hidden tokens while that raises the score of the sentence."""
    tokens = list(score)
    number = {token: row for row, token in enumerate(tokens)}
    table = torch.stack([score[token] for token in tokens])[:, tokens]  # (m, m) between the tokens at hand
    state = torch.tensor([number[int(token)] for token in ids])
    spots = places.tolist()
    pairs = [(a, b) for k, a in enumerate(spots) for b in spots[k + 1 :]]
    value = float(table[state[:-1], state[1:]].sum())
    while True:
        trials = state.repeat(len(pairs), 1)
        rows = torch.arange(len(pairs))
        one, other = torch.tensor(pairs).T
        trials[rows, one], trials[rows, other] = state[other], state[one]
        values = table[trials[:, :-1], trials[:, 1:]].sum(dim=1)
        if float(values.max()) <= value + 1e-9:
            return torch.tensor([tokens[int(row)] for row in state]), value
        state, value = trials[values.argmax()], float(values.max())
