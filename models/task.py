"""What one training step asks of a model, as a module, so that DDP and torch.compile see the whole of it."""

import torch
from torch import Tensor, nn

from models.bottleneck import take_penalty


class Task(nn.Module):
    """A model and its own losses in one forward.

    forward(images (B, 3, H, W) or token ids (B, n), mask (1 or B, N) bool, source (1 or B, N) or None: how the model is
    to permute its patches) -> (logits (B, classes), localization loss, weighted divergence of a variational
    bottleneck), the last two scalars and 0 for models without the part.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor, source: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        moved = () if source is None else (source,)
        logits = self.model(images, mask if self.model.hides_positions else None, *moved)
        head, nothing = getattr(self.model, "localization", None), torch.zeros((), device=images.device)
        penalty = take_penalty(self.model)
        penalty = nothing if penalty is None else penalty
        if head is None:
            return logits, nothing, penalty
        unseen = self.model.unseen(images, mask) if hasattr(self.model, "unseen") else mask  # of sentences, padding too
        with torch.autocast(images.device.type, enabled=False):  # coordinates up to 13 do not fit bf16
            return logits, head(self.model.patch_pos_embed(), unseen), penalty
