"""The victim's side: a private batch, what its model is shown, and the Leak that leaves the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.leak import Leak
from models.jigsaw import Jigsaw, shuffle_patches


@dataclass(frozen=True)
class Private:
    """A batch no attack may see. original and shown (B, C, H, W) normalised, shown with shuffled patches; labels (B,);
    hidden (1, N) bool: the patches that were masked. One mask serves the batch, as in MJP's training."""

    original: Tensor
    shown: Tensor
    labels: Tensor
    hidden: Tensor


def prepare(model: nn.Module, images: Tensor, labels: Tensor, jigsaw: Jigsaw, index: int) -> Private:
    """Apply the victim's jigsaw; mask and permutation are fixed by the jigsaw's seed and `index`."""
    hidden, source = jigsaw.draw_for([index])
    return Private(images, shuffle_patches(images, source, model.patch_size), labels.to(images.device), hidden)


def share(
    model: nn.Module,
    private: Private,
    defense: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    reveal_labels: bool,
) -> Leak:
    """One local step: the gradient of the mean cross-entropy, defended, with what else the server knows.

    Models with an unknown position embedding hide the masked positions; others only see shuffled patches. The
    localization loss is left out: it depends on public values alone, so an attacker could subtract it.
    """
    model.eval()
    parameters = dict(model.named_parameters())
    mask = private.hidden.to(private.shown.device) if model.hides_positions else None
    loss = nn.functional.cross_entropy(model(private.shown, mask), private.labels)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    shared = {name: value for name, value in zip(parameters, gradients, strict=True) if value is not None}
    batch_size, *image_shape = private.shown.shape
    return Leak(model, defense(shared), tuple(image_shape), batch_size, private.labels if reveal_labels else None)
