"""The jigsaw of MJP on a sentence: which tokens are occluded, and where they go.

The places of a sentence but its first and last ([CLS] and [SEP]) are cut into consecutive windows of `window` tokens,
the last one as long as what is left. A window is cut into consecutive blocks of `ngram` tokens, the last one as long as
what is left. Of its b blocks, m = ceil(mask_ratio * b) are chosen at random and put back in a random order into the
places the chosen blocks had; all these places are masked. A window with m < 2 is left alone: there is nothing to
permute. With ngram 1, single tokens, this is the scheme of the follow-up to MJP (TPAMI 2025); the ceiling is its own,
so that small ratios mask more than they say: 0.1 of a window of 16 is 2 tokens, not 1.

shrinking: its published code keeps the length of a sentence's last, shorter window for all later sentences of the
batch, until at length 1 nothing is shuffled any more. That is there for comparison, in training batches only.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from models.text import PAD
from utils.errors import UserError
from utils.seeds import derive_seed


class TokenJigsaw:
    """Draws masks and permutations for batches of token ids (B, n). Every sentence has its own, fixed by a seed and its
    place in the global batch (training) or its index in the data set (evaluation), so that neither the batch size nor
    the number of processes changes anything. The state is that of one generator, as of `models.jigsaw.Jigsaw`."""

    def __init__(self, mask_ratio: float, *, window: int = 16, ngram: int = 1, shrinking: bool = False, seed: int = 0):
        for name, value in (("window", window), ("ngram", ngram)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        self.mask_ratio, self.window, self.ngram, self.shrinking = mask_ratio, window, ngram, shrinking
        self.seed, self.rng = seed, random.Random(seed)

    @property
    def count(self) -> bool:
        """Return whether anything is masked at all."""
        return self.mask_ratio > 0

    def draw(self, ids: Tensor, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Return masks (B, n) bool and sources (B, n) int64 of a training batch, on the CPU: place i of the result
        holds token source[i]. Sentence i of process `rank` stands at place rank + i * world_size of the global
        batch."""
        base = self.rng.getrandbits(63)
        seeds = [derive_seed(base, "sentence", rank + place * world_size) for place in range(len(ids))]
        return self._draw(ids, seeds, self.shrinking)

    def draw_for(self, indices: Sequence[int], ids: Tensor) -> tuple[Tensor, Tensor]:
        """Draw masks of evaluated sentences, each fixed by (seed, sentence index) alone."""
        return self._draw(ids, [derive_seed(self.seed, "jigsaw", int(index)) for index in indices], False)

    def _draw(self, ids: Tensor, seeds: Sequence[int], shrinking: bool) -> tuple[Tensor, Tensor]:
        window, source = self.window, torch.arange(ids.shape[1]).repeat(len(ids), 1)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (length, seed) in enumerate(zip((ids != PAD).sum(1).tolist(), seeds, strict=True)):
            rng, first, last = random.Random(seed), 1, length - 1
            while first < last:
                width = min(window, last - first)
                window = width if shrinking else window
                places, origins = self._permute(range(first, first + width), rng)
                mask[row, places], source[row, places] = True, torch.tensor(origins, dtype=torch.int64)
                first += width
        return mask, source

    def _permute(self, places: range, rng: random.Random) -> tuple[list[int], list[int]]:
        """Return the masked places of one window, and the place each of their tokens comes from."""
        blocks = [places[start : start + self.ngram] for start in range(0, len(places), self.ngram)]
        number = math.ceil(self.mask_ratio * len(blocks) - 1e-9)  # 0.7 * 10 is 7.000000000000001
        if number < 2:
            return [], []
        chosen = sorted(rng.sample(range(len(blocks)), number))
        order = rng.sample(chosen, number)
        return [place for block in chosen for place in blocks[block]], [place for b in order for place in blocks[b]]

    def state_dict(self) -> dict:
        version, numbers, gauss = self.rng.getstate()
        return {"version": version, "numbers": list(numbers), "gauss": gauss}

    def load_state_dict(self, state: dict) -> None:
        self.rng.setstate((state["version"], tuple(state["numbers"]), state["gauss"]))
