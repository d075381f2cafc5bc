"""Consistency: does a model see the same thing in an image and in its shuffled version? (MJP, CVPR 2023)"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader

from data.loaders import chosen, name_unreadable, readable_rows
from eval.accuracy import shuffled_view
from models.jigsaw import Jigsaw
from models.token_jigsaw import TokenJigsaw
from utils.distributed import Processes
from utils.errors import UserError
from utils.progress import track


@torch.inference_mode()
def consistency(
    model: nn.Module,
    loader: DataLoader,
    processes: Processes,
    jigsaws: Sequence[Jigsaw | TokenJigsaw],
    log: Callable[[str], None] | None = None,
) -> list[dict]:
    """Return a row per jigsaw, from one pass over the data, identical on every process. Labels are not used.

    Row: mask_ratio; diff_norm, the mean L2 distance between the features the classifier reads, lower is better, and
    diff_norm_image_std, its standard deviation over images (0 for one); consistency, the percentage of images whose
    predicted class is the same, higher is better; images; skipped and, where any were, skipped_files.
    """
    model.eval()
    sums = torch.zeros(len(jigsaws), 3, dtype=torch.float64, device=processes.device)  # distance, its square, same
    count, unreadable = torch.zeros(1, dtype=torch.float64, device=processes.device), []
    for batch in track(loader, len(loader), "consistency", log):
        readable = readable_rows(batch.labels)
        count += readable.sum().to(count)
        unreadable += batch.index[~readable].tolist()
        if not readable.any():
            continue
        images = chosen(batch.images, readable).to(processes.device, non_blocking=True)
        clean, predicted = _features(model, images, None)
        for row, jigsaw in enumerate(jigsaws):
            shuffled, again = _features(model, *shuffled_view(model, images, batch.index[readable], jigsaw))
            distance = (clean - shuffled).float().norm(dim=1).double()
            sums[row] += torch.stack([distance.sum(), distance.square().sum(), (predicted == again).sum().double()])
    images, skipped = int(processes.sum(count)), name_unreadable(loader.dataset, unreadable, processes, log)
    if images == 0:
        raise UserError(f"no image could be evaluated ({len(skipped)} unreadable)")
    sums = processes.sum(sums)
    if not sums.isfinite().all():
        raise UserError("the model's outputs are NaN or infinite: its weights are damaged, use an earlier checkpoint")
    return [
        {
            "mask_ratio": jigsaw.mask_ratio,
            "diff_norm": distance / images,
            "diff_norm_image_std": max(0.0, (square - distance**2 / images) / max(1, images - 1)) ** 0.5,
            "consistency": 100 * same / images,
            "images": images,
            "skipped": len(skipped),
        }
        | ({"skipped_files": skipped} if skipped else {})
        for jigsaw, (distance, square, same) in zip(jigsaws, sums.tolist(), strict=True)
    ]


def _features(model: nn.Module, images: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, D) the classifier reads and the predicted class (B,), from one pass through the backbone."""
    tokens = model.forward_features(images, mask)
    return model.forward_head(tokens, pre_logits=True), model.forward_head(tokens).argmax(dim=1)
