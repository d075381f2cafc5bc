"""The victim's side: a private batch, what its model is shown, and the Leak that leaves the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.leak import Leak
from models import build_model
from models.checkpoints import load_model
from models.jigsaw import Jigsaw, shuffle_patches


@dataclass(frozen=True)
class Private:
    """A batch no attack may see. original and shown (B, C, H, W) normalised, shown with shuffled patches; labels (B,);
    hidden (1, N) bool: the patches that were masked. One mask serves the batch, as in MJP's training."""

    original: Tensor
    shown: Tensor
    labels: Tensor
    hidden: Tensor


def build_victim(
    checkpoint: str | None, name: str | None, *, seed: int, image_size: int | None, **options
) -> nn.Module:
    """The model whose gradients are shared: from a checkpoint, or named and randomly initialised. options: its own."""
    if checkpoint:
        return load_model(checkpoint, image_size=image_size, **options)
    return build_model(name, seed=seed, image_size=image_size, **options).eval()


@torch.no_grad()
def labels_of(model: nn.Module, folders: list[str], images: Tensor) -> Tensor:
    """(B,) labels: the class an image's folder is named after, where the checkpoint has one, else the prediction."""
    classes = {name: label for label, name in enumerate(model.classes or [])}
    predicted = model(images).argmax(dim=1).tolist()
    return torch.tensor([classes.get(name, label) for name, label in zip(folders, predicted, strict=True)])


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
