"""The jigsaw of MJP: which patches are occluded, and where their contents go.

Masked Jigsaw Puzzle position embeddings (Ren et al., CVPR 2023): random rectangles of patches form the mask; the
contents of the masked patches are permuted among themselves. `models/position.py` hides their positions.

Notation: a grid of (rows, columns) cells holds N patches in row-major order; `mask` (B, N) or (1, N) bool, True =
occluded; `source` of the same shape, int64: the patch that moves into each place (its own index where nothing moves).
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError, look_up
from utils.seeds import derive_seed

MIN_ASPECT = 0.3  # rectangles are between 0.3 and 1/0.3 times as high as wide
ATTEMPTS = 10  # tries per rectangle before the sampler gives up


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Map images (B, C, H, W) to patches (B, N, C*P*P), row-major, each flattened like a patch-embedding kernel."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cells = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Return the inverse of `patchify`: patches (B, N, C*P*P) -> images (B, C, rows*P, columns*P)."""
    batch, (rows, columns) = patches.shape[0], grid
    channels = patches.shape[2] // patch_size**2
    cells = patches.reshape(batch, rows, columns, channels, patch_size, patch_size)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * patch_size, columns * patch_size)


def shuffle_patches(images: Tensor, source: Tensor, patch_size: int) -> Tensor:
    """Move patch contents: place i of the result holds patch source[i]. images (B, C, H, W), source (B or 1, N)."""
    grid = images.shape[2] // patch_size, images.shape[3] // patch_size
    return unpatchify(move_tokens(patchify(images, patch_size), source.to(images.device)), patch_size, grid)


def move_tokens(tokens: Tensor, source: Tensor) -> Tensor:
    """Return the place i of the result holds token source[i]: tokens (B or 1, N, D), source (B or 1, N) -> (B or 1, N,
    D)."""
    if len(source) == 1:
        return tokens.index_select(1, source[0])
    tokens = tokens.expand(len(source), -1, -1)
    return tokens.gather(1, source[..., None].expand_as(tokens))


def shuffle_inputs(inputs: Tensor, source: Tensor, patch_size: int) -> Tensor:
    """Return `shuffle_patches` of images, or the same of token ids (B, n), whose patches are single tokens."""
    if inputs.dim() > 2:
        return shuffle_patches(inputs, source, patch_size)
    return inputs.gather(1, source.to(inputs.device).expand(len(inputs), -1))


def pixel_patch_shuffle(images: Tensor, patch_size: int, rng: random.Random) -> Tensor:
    """Return the official "pps" variant: one permutation of the pixels inside every patch, one of all patches; no
    mask."""
    grid = images.shape[2] // patch_size, images.shape[3] // patch_size
    patches = patchify(images, patch_size)
    pixels = torch.tensor(rng.sample(range(patch_size**2), patch_size**2), device=images.device)
    places = torch.tensor(rng.sample(range(patches.shape[1]), patches.shape[1]), device=images.device)
    patches = patches.unflatten(2, (-1, patch_size**2))[:, places][..., pixels].flatten(2)
    return unpatchify(patches, patch_size, grid)


def block_mask(
    grid: tuple[int, int], count: int, rng: random.Random, min_block: int = 8, max_block: int = 75
) -> list[bool]:
    """Return the union of random rectangles covering at most `count` cells; the official sampler, draw for draw.

    It can fall short of `count`: it stops when 10 tries in a row add nothing. The block size limits do not follow the
    ratio (75 is 38 % of a 14 x 14 grid), and no rectangle spans the whole grid, both as in the original.
    """
    rows, columns = grid
    mask = [False] * (rows * columns)
    covered = 0
    while covered < count:
        added = _add_block(mask, grid, min(count - covered, max_block), min_block, rng)
        if not added:
            break
        covered += added
    return mask


def _add_block(mask: list[bool], grid: tuple[int, int], budget: int, min_block: int, rng: random.Random) -> int:
    rows, columns = grid
    for _ in range(ATTEMPTS):
        area = rng.uniform(min_block, budget)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), math.log(1 / MIN_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        cells = [row * columns + column for row in range(top, top + height) for column in range(left, left + width)]
        fresh = [cell for cell in cells if not mask[cell]]
        if 0 < len(fresh) <= budget:
            for cell in fresh:
                mask[cell] = True
            return len(fresh)
    return 0


def exact_block_mask(
    grid: tuple[int, int], count: int, rng: random.Random, min_block: int = 8, max_block: int = 75
) -> list[bool]:
    """Return `block_mask`, then uniformly chosen cells until exactly `count` are covered."""
    mask = block_mask(grid, count, rng, min_block, max_block)
    free = [cell for cell, covered in enumerate(mask) if not covered]
    for cell in rng.sample(free, count - sum(mask)):
        mask[cell] = True
    return mask


def uniform_mask(
    grid: tuple[int, int], count: int, rng: random.Random, min_block: int = 8, max_block: int = 75
) -> list[bool]:
    """Return exactly `count` cells chosen uniformly at random; the block limits are not used."""
    chosen = set(rng.sample(range(grid[0] * grid[1]), count))
    return [cell in chosen for cell in range(grid[0] * grid[1])]


MASK_SAMPLERS = {"block": block_mask, "block_exact": exact_block_mask, "uniform": uniform_mask}


class Jigsaw:
    """Draws masks and permutations for one grid from one seeded generator, whose state goes into checkpoints.

    Python's generator is used because the official code does: the same seed gives the same masks, bit for bit.
    A mask ratio of 0 draws nothing and masks nothing. floor(ratio * N) cells are asked for.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        mask_ratio: float,
        mask_sampler: str = "block",
        min_block: int = 8,
        max_block: int = 75,
        seed: int = 0,
        per_batch: bool = False,
    ):
        """Keep the options. per_batch: `draw_for` gives one mask and permutation for all of its images, as the official
        evaluation."""
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        self.grid, self.mask_ratio, self.seed = tuple(grid), mask_ratio, seed
        self.count = int(math.prod(grid) * mask_ratio)
        self.blocks, self.per_batch = (min_block, max_block), per_batch
        self.sample_mask = look_up(MASK_SAMPLERS, mask_sampler, "mask sampler")
        self.rng = random.Random(seed)

    def draw(self, number: int = 1) -> tuple[Tensor, Tensor]:
        """Return `number` independent masks and permutations: (number, N) bool and (number, N) int64, on the CPU."""
        pairs = [self._draw_one(self.rng) for _ in range(number)]
        masks, sources = zip(*pairs, strict=True)
        return torch.tensor(masks), torch.tensor(sources)

    def draw_for(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw a mask and a permutation per image, each fixed by (seed, image index) alone.

        Evaluation uses these: the numbers then depend neither on batch size nor on the number of processes. With
        per_batch they are those of the first image, (1, N) each.
        """
        indices = indices[:1] if self.per_batch else indices
        pairs = [self._draw_one(random.Random(derive_seed(self.seed, "jigsaw", int(index)))) for index in indices]
        masks, sources = zip(*pairs, strict=True)
        return torch.tensor(masks), torch.tensor(sources)

    def _draw_one(self, rng: random.Random) -> tuple[list[bool], list[int]]:
        mask = self.sample_mask(self.grid, self.count, rng, *self.blocks)
        places = [cell for cell, covered in enumerate(mask) if covered]
        source = list(range(len(mask)))
        for place, origin in zip(places, rng.sample(places, len(places)), strict=True):
            source[place] = origin
        return mask, source

    def state_dict(self) -> dict:
        version, numbers, gauss = self.rng.getstate()
        return {"version": version, "numbers": list(numbers), "gauss": gauss}

    def load_state_dict(self, state: dict) -> None:
        self.rng.setstate((state["version"], tuple(state["numbers"]), state["gauss"]))
