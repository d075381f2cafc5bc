"""Pictures of what a run does: shuffled inputs with hidden patches marked, and which positions look alike."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from data.transforms import denormalize
from eval.accuracy import shuffled_view
from models.jigsaw import Jigsaw, patchify, unpatchify
from models.position import pos_embed_similarity


def mark_hidden(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """Tint the masked patches red. images (B, 3 or 1, H, W) in [0, 1], mask (B or 1, N) bool -> (B, 3, H, W)."""
    images = images.expand(-1, 3, -1, -1)
    grid = images.shape[2] // patch_size, images.shape[3] // patch_size
    tint = images.new_tensor([1.0, 0.2, 0.2]).view(1, 3, 1, 1).expand_as(images)
    tinted = patchify(0.65 * images + 0.35 * tint, patch_size)
    return unpatchify(
        torch.where(mask.to(images.device)[..., None], tinted, patchify(images, patch_size)), patch_size, grid
    )


def shuffled_inputs(model: nn.Module, images: Tensor, jigsaw: Jigsaw, mean, std) -> Tensor:
    """Return a picture (3, h, w) in [0, 1]: a row of originals above the same images as the model sees them when
    masked."""
    index = torch.arange(len(images))
    view, mask = shuffled_view(model, images, index, jigsaw)
    originals, view = (denormalize(x, mean, std).clamp(0, 1) for x in (images, view))
    if mask is not None:
        view = mark_hidden(view, mask, model.patch_size)
    originals = originals.expand(-1, 3, -1, -1)
    return make_grid(torch.cat([originals, view]), nrow=len(images))


def similarity_map(model: nn.Module) -> Tensor:
    """Return a picture (3, H, W) in [0, 1], one tile per position: tile i shows the cosine similarity of every PE to PE
    i."""
    rows, columns = model.grid
    similarity = pos_embed_similarity(model.patch_pos_embed().detach().float())
    tiles = (similarity.reshape(-1, 1, rows, columns) + 1) / 2
    cell = max(1, 200 // (rows * columns))  # pixels, so that small grids can be seen
    tiles = tiles.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    return make_grid(tiles, nrow=columns, padding=1)


def training_pictures(
    model: nn.Module, batches: DataLoader, jigsaw: Jigsaw, mean, std, count: int = 6
) -> dict[str, Tensor]:
    """Return what TensorBoard shows of a training run: inputs as the jigsaw changes them, and the PE similarity map."""
    dataset, device = batches.dataset, next(model.parameters()).device
    pictures = {}
    if jigsaw.count:
        chosen = sorted({place * len(dataset) // count for place in range(count)})
        images = torch.stack([dataset[index].images for index in chosen]).to(device)
        pictures["shuffled_inputs"] = shuffled_inputs(model, images, jigsaw, mean, std)
    if getattr(model, "pos_embed", None) is not None:
        pictures["pos_embed_similarity"] = similarity_map(model)
    return pictures
