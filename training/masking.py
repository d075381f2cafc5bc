"""When a training step is masked, and what is permuted then: images, position embeddings inside the model, or nothing.

Sources: the MJP paper (CVPR 2023) and its code; docs/method.md lists where the two differ and which option gives which.
"""

import torch
from torch import Tensor, nn

from models.jigsaw import Jigsaw, pixel_patch_shuffle, shuffle_inputs, shuffle_patches
from models.token_jigsaw import TokenJigsaw
from training.options import JigsawOptions
from utils.distributed import Processes


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` of the CPU on `device`, copied while the host goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def shuffled_where(model: nn.Module, wanted: str, defended: bool) -> str:
    """Return what a masked step permutes: 'pixels', 'positions' inside the model, or 'nothing'.

    wanted: 'pixels', or 'auto' for the cheapest that trains the same. A class token attends to a set, so moving patches
    is moving their position embeddings the other way; and where all masked patches share one of these, the order of
    their contents makes no difference at all. defended: a defence looks at the images.
    """
    if wanted == "pixels" or defended or not hasattr(model, "order_matters"):
        return "pixels"
    return "positions" if model.order_matters else "nothing"


class MaskPolicy:
    """Decides at every training step whether the jigsaw fires, and applies it to the batch.

    All processes draw the same stream, so one mask covers the global batch (or, per_sample, each its own rows).
    """

    def __init__(self, grid: tuple[int, int], options: JigsawOptions, seed: int):
        self.options, self.move = options, "pixels" if options.shuffle == "pps" else options.move
        self.jigsaw = Jigsaw(grid, options.mask_ratio, **options.sampler("image"), seed=seed)
        number = grid[0] * grid[1]
        self.nothing, self.stay = torch.zeros(1, number, dtype=torch.bool), torch.arange(number)[None]

    def __call__(
        self, images: Tensor, epoch: int, patch_size: int, processes: Processes, move: str = "pixels"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (images, mask, source): the batch and its mask, all-false on steps without the jigsaw.

        move: 'pixels' permutes the images and leaves source None; 'positions' leaves the images and gives the
        permutation for the model to apply, the identity where nothing moves; 'nothing' does neither.
        """
        options, jigsaw, device = self.options, self.jigsaw, images.device
        active = options.on and epoch >= options.start_epoch
        moves = move == "positions" and options.on
        if not active or jigsaw.rng.random() >= options.probability:
            return images, upload(self.nothing, device), upload(self.stay, device) if moves else None
        if options.shuffle == "pps":
            return pixel_patch_shuffle(images, patch_size, jigsaw.rng), upload(self.nothing, device), None
        mask, source = jigsaw.draw(len(images) * processes.world_size if options.per_sample else 1)
        if options.per_sample:
            mask, source = (rows[processes.rank :: processes.world_size] for rows in (mask, source))
        mask, source = upload(mask, device), upload(source, device)
        if move == "pixels":
            return shuffle_patches(images, source, patch_size), mask, None
        return images, mask, source if moves else None


class TokenPolicy:
    """The same for batches of token ids (B, n): every sentence has its own mask, all-false if nothing is shuffled."""

    def __init__(self, options: JigsawOptions, seed: int):
        cut = options.sampler("text") | {"shrinking": options.shrinking_window}
        self.options, self.move = options, "pixels"
        self.jigsaw = TokenJigsaw(options.mask_ratio, **cut, seed=seed)

    def __call__(
        self, ids: Tensor, epoch: int, patch_size: int, processes: Processes, move: str = "pixels"
    ) -> tuple[Tensor, Tensor, None]:
        """Return (ids, mask, None) as `MaskPolicy` gives (images, mask, source); ids themselves are permuted."""
        options, jigsaw = self.options, self.jigsaw
        if not jigsaw.mask_ratio or epoch < options.start_epoch or jigsaw.rng.random() >= options.probability:
            return ids, torch.zeros_like(ids, dtype=torch.bool), None
        mask, source = jigsaw.draw(ids.cpu(), processes.rank, processes.world_size)
        return shuffle_inputs(ids, source, patch_size), mask.to(ids.device), None


def build_policy(model: nn.Module, options: JigsawOptions, seed: int) -> MaskPolicy | TokenPolicy:
    """Return the policy that masks the inputs of `model`: images, or the token ids of a text model."""
    return TokenPolicy(options, seed) if hasattr(model, "vocab_size") else MaskPolicy(model.grid, options, seed)
