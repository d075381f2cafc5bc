"""What one training step asks of a model, as a module, so that DDP and torch.compile see the whole of it."""

import torch
from torch import Tensor, nn

from models.bottleneck import take_penalty
from models.position import given_mask


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
        logits = self.model(images, given_mask(self.model, mask), *moved)
        penalty = take_penalty(self.model)
        penalty = torch.zeros((), device=images.device) if penalty is None else penalty
        return logits, localization_loss(self.model, images, mask), penalty


def localization_loss(model: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    """Return the localization loss of the model's position rows, a scalar; 0 for models without the head.

    Of inputs (B, 3, H, W) nothing enters it but the device; of token ids (B, n) where sentences end.
    """
    head = getattr(model, "localization", None)
    if head is None:
        return torch.zeros((), device=inputs.device)
    unseen = model.unseen(inputs, mask) if hasattr(model, "unseen") else mask  # of sentences, padding too
    with torch.autocast(inputs.device.type, enabled=False):  # coordinates up to 13 do not fit bf16
        return head(model.patch_pos_embed(), unseen)


def reached_by_examples(model: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that the classification loss may reach: all but the localization
    head's."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    return [name for name in names if not name.startswith("localization.")]
