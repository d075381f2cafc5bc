"""What attacks on sentences share: which leaks they take, the gradient of a guess, and the search among few guesses.

A guess is the token ids of the whole sentence. Victim and attacker have the same weights and loss, so the true sentence
has an objective of 0 up to rounding. What a masked step gives away of its hidden tokens is their multiset, not their
order (they share one position row, and attention sees a set): a guess may put them in any order.
"""

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.label_recovery import first_labels
from attacks.threat_model.leak import Leak, RefusalError
from attacks.threat_model.local_step import causal, classes_of, client_model, next_tokens, training_loss
from models.position import given_mask

MOST, CHUNK = 3000, 32  # ways to fill the hidden places that are all tried; guesses differentiated at once
FOUND = 1e-7  # relative squared error of the gradient below which a guess is the sentence, up to hidden order
REPEATED = 1e4  # relative error of the gradient of the true sentence, at most, in units of the leak's rounding


def check_sentence(leak: Leak, attack: str, batches: bool = False) -> None:
    """Raise UserError unless the leak is the gradient of one sentence, or of several where the attack takes
    `batches`."""
    if len(leak.image_shape) != 1:
        raise RefusalError(f"attack '{attack}' reconstructs sentences: give it a text model, with --data.kind text")
    if batches and leak.local is not None:
        raise RefusalError(f"attack '{attack}' takes one gradient: use local_steps 1")
    if not batches and (leak.batch_size != 1 or leak.local is not None):
        raise RefusalError(f"attack '{attack}' takes one sentence and one gradient: use batch_size 1, local_steps 1")


def check_table_attack(leak: Leak, options: dict, loss: str, attack: str, batches: bool = False) -> None:
    """Raise UserError unless the leak is the gradient of one sentence, or of several where the attack takes `batches`,
    of a language model without hidden places: the check of attacks on the token table."""
    check_sentence(leak, attack, batches)
    if causal(leak.model) and leak.model.hides_positions:
        raise RefusalError(
            f"attack '{attack}' reads language models that hide no positions, and this one does: use tag"
        )


def found_below(eps: float) -> float:
    """Return the relative squared error of the gradient below which a guess is the sentence, in a leak of relative
    rounding eps: what rounding explains, and never more than FOUND."""
    return min(FOUND, (REPEATED * eps) ** 2)


def present_rows(rows: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return which rows (n, D) of a gradient hold more than noise, (n,) bool. noise: rows most of which hold nothing
    else, default the same; where any of them is exactly zero, so is the noise."""
    power, silent = rows.square().sum(dim=1), (rows if noise is None else noise).square().sum(dim=1)
    floor = silent.median() * (1 + 6 * (2 / rows.shape[1]) ** 0.5) if silent.all() else 0
    return power > floor


@torch.no_grad()
def with_last_token(leak: Leak, ids: Tensor) -> Tensor:
    """Return a sentence (n,) from all of its tokens but the last (n - 1,), which a language model only has to predict.

    With the first tokens the logits are known, and the decoder's gradient holds (probabilities - one-hot targets) /
    (n - 1) of every place: what the known targets leave of it is the last one. The bias has the sum of it over places,
    the matrix its product with what the decoder reads. In a matrix that is the token table too, the row of every input
    also holds that input's gradient, which its position row repeats. 0 where none of these gradients is shared.
    """
    model = client_model(leak.model, training=False)
    names = ["pos_embed", "token_embed.weight"] if leak.model.tied else ["head.weight"]
    names = ["head.bias"] if "head.bias" in leak.gradients else names
    if not all(name in leak.gradients for name in names):
        return torch.cat([ids, ids.new_zeros(1)])
    *inputs, decoder = (leak.gradients[name] for name in names)
    ids = ids.to(decoder.device)
    features = model.features(torch.cat([ids, ids[-1:]])[None])[0]  # (n - 1, D); the last token is read by none
    targets = torch.nn.functional.one_hot(ids[1:], model.vocab_size).to(features)  # (n - 2, V)
    left = model.head(features).softmax(dim=1)  # (n - 1, V)
    left[:-1] -= targets
    if names == ["head.bias"]:
        counts = left.sum(dim=0) - len(ids) * decoder  # (V,): 1 for the last token
    else:
        rest = left.T @ features - len(ids) * decoder  # (V, D): in the row of the last token what its decoder read
        for rows in inputs:
            rest.index_add_(0, ids, len(ids) * rows[0, : len(ids)])
        counts = rest @ features[-1]
    return torch.cat([ids, counts.argmax()[None]]).cpu()


class Guesses:
    """Scores guesses by the gradient they would have given: the squared error over the leaked gradient, mean over its
    tensors; lower is closer, 0 is the truth."""

    def __init__(self, leak: Leak, hidden: Tensor | None, generator: torch.Generator):
        self.model = client_model(leak.model, training=False)
        own = {name: value.detach() for name, value in self.model.named_parameters()}
        self.goal = {name: value for name, value in leak.gradients.items() if value.any()}
        self.parameters = {name: own[name] for name in self.goal}
        self.sizes = {name: value.square().sum() for name, value in self.goal.items()}
        like, classes = next(iter(own.values())), classes_of(leak.model, leak.image_shape)
        self.targets = None  # of a language model: the guess itself
        if not causal(leak.model):
            self.targets = first_labels(leak, "bias_corrected", classes, 1, generator)[0].to(like)
        self.mask = None if hidden is None else given_mask(leak.model, hidden[None].to(like.device))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Return the scores (K,) of K guesses (K, n), side by side."""
        with sdpa_kernel(SDPBackend.MATH):
            device = next(iter(self.goal.values())).device
            return vmap(self._one, chunk_size=CHUNK)(ids.to(device)).cpu()

    def _one(self, ids: Tensor) -> Tensor:
        targets = next_tokens(self.model, ids[None]) if self.targets is None else self.targets
        found = grad(lambda own: training_loss(self.model, own, ids[None], targets, self.mask))(self.parameters)
        parts = [(found[name] - goal).square().sum() / self.sizes[name] for name, goal in self.goal.items()]
        return torch.stack(parts).mean()


def search(
    guesses: Guesses,
    ids: Tensor,
    choices: dict[int, Sequence[int]],
    hidden: Sequence[int],
    bag: Sequence[int],
    sweeps: int,
    found: float = FOUND,
) -> tuple[Tensor, float]:
    """Return the best guess (n,) from `ids` on, and its score: every way the bag fills the hidden places where there
    are at most MOST, then the best single change, `sweeps` times; stops below the score `found`, at the truth.

    choices: the tokens a visible place may hold, where there are several. hidden: the masked places, bag: which tokens
    they hold, each at least once; a change gives the place of a token that is there twice to another of the bag.
    """
    candidates, extra = [ids], len(hidden) - len(bag)
    if extra > 0 and math.comb(len(hidden) - 1, extra) <= MOST:
        for more in combinations_with_replacement(bag, extra):
            candidates.append(ids.clone())
            candidates[-1][hidden] = torch.tensor([*bag, *more])
    best, score = ids, math.inf
    for _ in range(sweeps + 1):
        scores = guesses(torch.stack(candidates)) if candidates else torch.tensor([math.inf])
        if not scores.min() < score:
            break
        best, score = candidates[int(scores.argmin())], float(scores.min())
        if score < found:
            break
        held = best[hidden].tolist()
        spare = {token: place for place, token in zip(hidden, held, strict=True) if held.count(token) > 1}
        changes = [(place, token) for place, tokens in choices.items() for token in tokens if token != best[place]]
        changes += [(place, other) for token, place in spare.items() for other in bag if other != token]
        candidates = []
        for place, token in changes:
            candidates.append(best.clone())
            candidates[-1][place] = token
    return best, score
