"""Which tokens of a batch of sentences belong together: the second half of DAGER (Petrov et al., NeurIPS 2024).

The first block tells which tokens stand at which place in any of the sentences. The input of the second block mixes
all tokens of one sentence, and the second block's query, key and value gradient spans these inputs of every sentence: a
sentence that is put together rightly has all its inputs in that span, a mixture of two has not. DAGER tries beams of
combinations; here a random mixture is improved place by place until nothing is left outside the span, and what one
sentence has taken is where the search for the next does not begin.
"""

from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from attacks.threat_model.leak import Leak
from attacks.threat_model.local_step import client_model, training_loss
from models.position import given_mask
from models.text import PAD

CHUNK = 256  # mixtures that go through the first block at once
MOST_LABELS = 4  # sentences of which all orders of the labels are tried


@dataclass(frozen=True)
class Choices:
    """What may stand at a place: tokens (k,), and which are hidden there, (k,) bool, under MJP's unknown row."""

    tokens: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Sentence:
    """A sentence that was put together: ids (n,), padded; hidden (n,) bool; distance of its inputs of the second block
    from the span, over their length, the largest."""

    ids: Tensor
    hidden: Tensor
    distance: float


class Assembly:
    """Scores mixtures of tokens by the second block's span. basis (r, D): orthonormal rows of the span."""

    def __init__(self, leak: Leak, basis: Tensor):
        self.model, self.basis = leak.model, basis

    @torch.no_grad()
    def distances(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return (K, n): how far the second block's inputs of K mixtures (K, n) are from the span, over their length; 0
        at padding."""
        parts = []
        for own, away in zip(ids.split(CHUNK), hidden.split(CHUNK), strict=True):
            device = self.model.pos_embed.device
            tokens = self.model.embed(own.to(device), given_mask(self.model, away.to(device)))
            inputs = self.model.blocks[0](tokens, self.model.attends(own.to(device))).double().cpu()  # (K, n, D)
            outside = inputs - inputs @ self.basis.T @ self.basis
            parts.append((outside.norm(dim=2) / inputs.norm(dim=2)).masked_fill(own == PAD, 0))
        return torch.cat(parts)

    def improve(self, choices: list[Choices], ids: Tensor, hidden: Tensor, sweeps: int, limit: float) -> Sentence:
        """Return the mixture after each place in turn took what is best there, until nothing changes or all inputs are
        within `limit` of the span."""
        best = float("inf")
        for _ in range(sweeps):
            before = best
            for place, those in enumerate(choices):
                if len(those.tokens) < 2:
                    continue
                tried, away = ids.repeat(len(those.tokens), 1), hidden.repeat(len(those.tokens), 1)
                tried[:, place], away[:, place] = those.tokens, those.hidden
                scores = self.distances(tried, away).sum(dim=1)
                best, number = (value.item() for value in scores.min(dim=0))
                ids, hidden = tried[number], away[number]
            if not best < before or self._worst(ids, hidden) < limit:
                break
        return Sentence(ids, hidden, self._worst(ids, hidden))

    def _worst(self, ids: Tensor, hidden: Tensor) -> float:
        return float(self.distances(ids[None], hidden[None]).max())


def assemble(
    leak: Leak, basis: Tensor, choices: list[Choices], *, tries: int, sweeps: int, limit: float,
    generator: torch.Generator,
) -> list[Sentence]:  # fmt: skip
    """Return `leak.batch_size` sentences, those in the span first: as many as were found, then the nearest others.

    choices: of every place; the first token of the last place ends every sentence. tries: mixtures to begin with,
    for each sentence; sweeps: over the places, for each mixture; limit: distance that counts as inside.
    """
    assembly, length, end = Assembly(leak, basis), len(choices), int(choices[-1].tokens[0])
    lengths = [place + 1 for place in range(1, length) if end in choices[place].tokens]
    found: list[Sentence] = []
    nearest: list[Sentence] = []
    for number in range(tries * leak.batch_size):
        if len(found) == leak.batch_size:
            break
        size = _next_length(lengths, found, number)
        inner = [_without(one, end) for one in choices[: size - 1]]
        ids, hidden = torch.full((length,), PAD), torch.zeros(length, dtype=torch.bool)
        ids[size - 1] = end
        for place, those in enumerate(inner):
            open_ = _unused(those, place, found) if number % 2 == 0 else list(range(len(those.tokens)))
            pick = open_[int(torch.randint(len(open_), (), generator=generator))]
            ids[place], hidden[place] = those.tokens[pick], those.hidden[pick]
        one = assembly.improve(inner, ids, hidden, sweeps, limit)
        if any(torch.equal(one.ids, other.ids) for other in (*found, *nearest)):
            continue
        (found if one.distance < limit else nearest).append(one)
    nearest.sort(key=lambda one: one.distance)
    rest = [*found, *nearest][: leak.batch_size]
    return [rest[place % len(rest)] for place in range(leak.batch_size)]


def _next_length(lengths: list[int], found: list[Sentence], number: int) -> int:
    """Return the length to look for: in turn, those of which no sentence was found first."""
    taken = {int((one.ids != PAD).sum()) for one in found}
    order = [size for size in lengths if size not in taken] or lengths
    return order[number % len(order)]


def _without(choices: Choices, token: int) -> Choices:
    """Return the choices other than a token; all where it is the only one."""
    keep = choices.tokens != token
    keep = keep if keep.any() else ~keep
    return Choices(choices.tokens[keep], choices.hidden[keep])


def _unused(choices: Choices, place: int, found: list[Sentence]) -> list[int]:
    """Return which choices of a place no found sentence has taken; all where each has been."""
    taken = {int(one.ids[place]) for one in found if not one.hidden[place]}
    left = [number for number, token in enumerate(choices.tokens.tolist()) if token not in taken]
    return left or list(range(len(choices.tokens)))


def gradient_error(leak: Leak, sentences: list[Sentence]) -> float:
    """Return the relative squared error of the gradient that these sentences would have given, mean over its tensors,
    for the best order of the labels; NaN where those are not told, or of too many sentences."""
    if leak.labels is None or leak.labels.dim() != 1 or len(sentences) > MOST_LABELS:
        return float("nan")
    model, goal = client_model(leak.model, training=False), leak.gradients
    own = {name: value.detach() for name, value in model.named_parameters()}
    like = next(iter(own.values()))
    ids = torch.stack([one.ids for one in sentences]).to(like.device)
    hidden = given_mask(model, torch.stack([one.hidden for one in sentences]).to(like.device))
    classes, best = model.head.out_features, float("inf")
    for labels in sorted(set(permutations(leak.labels.tolist()))):
        targets = torch.nn.functional.one_hot(torch.tensor(labels), classes).to(like)
        gradient = torch.func.grad(lambda p, y=targets: training_loss(model, p, ids, y, hidden))(own)
        errors = [
            (gradient[name] - value).square().sum() / value.square().sum()
            for name, value in goal.items()
            if value.any()
        ]
        best = min(best, float(torch.stack(errors).mean()))
    return best
