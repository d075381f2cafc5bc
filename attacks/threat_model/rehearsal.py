"""A client's step tried on noise before a campaign, so that what a stranger's network cannot do is said before work."""

from collections.abc import Iterable

import torch
from torch import Tensor

from attacks.threat_model.client import Client, PrivateBatch, share
from attacks.threat_model.local_step import client_model, multi_label
from attacks.threat_model.victim import title
from utils.channels import channels_of
from utils.errors import UserError


def rehearse(client: Client, sizes: Iterable[int]) -> None:
    """Take one step of the client, without its defence on gradients, on batches of each of these sizes.

    The batches are N(0, 1) noise; with local steps their slices are tried. Raises UserError in one line for what the
    network raises, for a gradient that is empty, zero, NaN or infinite, and for one that does not depend on the images.
    """
    local = client.terms.local
    for size in sorted(set(sizes)):
        noise = torch.Generator().manual_seed(0)
        _try_defense(client, size, noise)
        size = min(size, local.batch_size) if local else size
        one, other = (_noise(client, size, noise) for _ in range(2))
        gradients = _step(client, one)
        about = f"{title(client.model)}, in a step on {size} images of N(0, 1) noise,"
        if not any(value.any() for value in gradients.values()):
            raise UserError(f"{about} gives no gradient: its output does not depend on any parameter that is trained")
        if broken := [name for name, value in gradients.items() if not value.isfinite().all()]:
            raise UserError(
                f"{about} gives a gradient that is NaN or infinite (of '{broken[0]}'): nothing can be reconstructed "
                f"from it; check its weights and its normalisation"
            )
        if _same_outputs(client, one, other) and _same(gradients, _step(client, other)):
            raise UserError(
                f"{about} gives the same gradient for two different batches: its output does not depend on the images, "
                f"and nothing of them leaks"
            )


def _noise(client: Client, size: int, generator: torch.Generator) -> Tensor:
    """Return images (size, C, S, S) of N(0, 1) noise as the client's model takes them."""
    side = client.model.arguments["image_size"]
    return torch.randn(size, channels_of(client.model), side, side, generator=generator).to(
        next(client.model.parameters())
    )


def _try_defense(client: Client, size: int, generator: torch.Generator) -> None:
    """Let the defence on images see a batch of this size, which may be too small for it."""
    images = _noise(client, size, generator)
    labels = torch.zeros(size, dtype=torch.int64, device=images.device)
    client.defense.images(images, labels, generator=generator, num_classes=2, **client.terms.scale)


def _step(client: Client, images: Tensor) -> dict[str, Tensor]:
    """Return the gradient of one undefended step, every label 0."""
    rows, columns = client.model.grid
    mask = torch.zeros(1, rows * columns, dtype=torch.bool)
    shape = (len(images), 1) if multi_label(client.model) else (len(images),)
    labels = torch.zeros(shape, dtype=torch.int64, device=images.device)
    private = PrivateBatch(images, images, labels, mask, torch.arange(rows * columns)[None])
    mode = {key: getattr(client.terms, key) for key in ("training", "dropout_seed")}
    return share(client.model, private, lambda gradients, step: gradients, True, noise_seed=0, **mode).gradients


@torch.no_grad()
def _same_outputs(client: Client, one: Tensor, other: Tensor) -> bool:
    model = client_model(client.model, training=False)
    return torch.equal(model(one.clone()), model(other.clone()))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
