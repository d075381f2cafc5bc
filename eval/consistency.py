"""Consistency: does a model see the same thing in an image and in its shuffled version? (MJP, CVPR 2023)"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eval.accuracy import shuffled_view, sum_over_images
from models.jigsaw import Jigsaw
from models.token_jigsaw import TokenJigsaw
from utils.distributed import Processes


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

    def score(images: Tensor, labels: Tensor, index: Tensor) -> Iterator[Tensor]:
        clean, predicted = _features(model, images, None)
        for jigsaw in jigsaws:
            shuffled, again = _features(model, *shuffled_view(model, images, index, jigsaw))
            distance = (clean - shuffled).float().norm(dim=1).double()
            yield torch.stack([distance.sum(), distance.square().sum(), (predicted == again).sum().double()])

    sums, counts = sum_over_images(loader, processes, len(jigsaws), score, "consistency", log)
    images = counts["images"]
    return [
        {
            "mask_ratio": jigsaw.mask_ratio,
            "diff_norm": distance / images,
            "diff_norm_image_std": max(0.0, (square - distance**2 / images) / max(1, images - 1)) ** 0.5,
            "consistency": 100 * same / images,
        }
        | counts
        for jigsaw, (distance, square, same) in zip(jigsaws, sums, strict=True)
    ]


def _features(model: nn.Module, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the features (B, D) the classifier reads and the predicted class (B,), from one pass through the
    backbone."""
    tokens = model.forward_features(images, mask)
    return model.forward_head(tokens, pre_logits=True), model.forward_head(tokens).argmax(dim=1)
