"""How close a reconstruction comes to the private image, per image, in the field's scores and a few of our own."""

import math
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from eval.assignment import match_batch, order_free_error
from eval.mse import mse
from eval.psnr_ssim import SSIM_WINDOW, psnr, ssim
from models.jigsaw import patchify
from utils.errors import not_empty
from utils.statistics import RECOVERED


def score(
    original: Tensor,
    shown: Tensor,
    reconstruction: Tensor,
    hidden: Tensor,
    patch_size: int,
    *,
    extra: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Scores of (B, 3, H, W) pixel values, each (B,). The reconstruction may leave [0, 1]; it is clamped unless stated.

    shown: what the victim's model saw, the original with shuffled patches; hidden (B or 1, N) bool: the masked patches.
    mse (lower is closer), psnr in dB and ssim are against the original; psnr_shown against `shown`; psnr_visible over
    the patches that are not hidden, psnr_visible_raw the same without the clamp; psnr_masked over the hidden patches as
    a set, in the order that suits them best; psnr_patches likewise over all patches of the image; patches_recovered:
    percentage of all patches above 25 dB in that order; exact_pixels: percentage of 8-bit values that come back exactly
    (all higher is closer). psnr_baseline: what the target's mean colour scores on its own, which takes no leak at all.
    ssim is NaN for images smaller than its window, scores of patches that do not exist are NaN.
    extra: more scores by name, functions of (reconstruction, original) in [0, 1] that return (B,).
    """
    not_empty(original, "a score")
    clamped = reconstruction.clamp(0, 1)
    hidden = hidden.to(original.device).expand(len(original), -1)

    def visible_psnr(images: Tensor) -> Tensor:
        error = (patchify(images, patch_size).double() - patchify(shown, patch_size).double()).square().mean(dim=2)
        return decibels(error.masked_fill(hidden, 0).sum(1) / (~hidden).sum(1))

    def eight_bit(images: Tensor) -> Tensor:
        return (images.double() * 255).round()

    small = min(original.shape[-2:]) < SSIM_WINDOW
    masked = order_free_error(clamped, original, patch_size, hidden)
    patches = torch.stack(order_free_error(clamped, original, patch_size, torch.ones_like(hidden)))
    scores = {
        "mse": mse(clamped, original),
        "psnr": psnr(clamped, original),
        "ssim": torch.full((len(original),), math.nan) if small else ssim(clamped, original),
        "psnr_shown": psnr(clamped, shown),
        "psnr_visible": visible_psnr(clamped),
        "psnr_visible_raw": visible_psnr(reconstruction),
        "psnr_masked": decibels(torch.stack([error.mean() for error in masked])),
        "psnr_patches": decibels(patches.mean(1)),
        "patches_recovered": 100 * (decibels(patches) > RECOVERED).double().mean(1),
        "exact_pixels": 100 * (eight_bit(clamped) == eight_bit(shown)).flatten(1).double().mean(1),
        "psnr_baseline": psnr(original.mean(dim=(2, 3), keepdim=True).expand_as(original), original),
    }
    return scores | {name: metric(clamped, original) for name, metric in (extra or {}).items()}


def score_batch(
    original: Tensor,
    shown: Tensor,
    reconstruction: Tensor,
    hidden: Tensor,
    labels: Tensor | None,
    found: Tensor | None,
    patch_size: int,
    extra: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> tuple[dict[str, Tensor], list[dict]]:
    """Match a batch of reconstructions to its originals, then `score` it.

    labels (B,): the true ones, None where nobody knows them. found (B,): those the attack had to find, None if it was
    told or nobody knows. Returns (views, rows):
    the pictures by the folder they are saved in, `inputs` only where patches have moved, and {name: value} per image
    with its label. label_found (%) is 100 for an image whose label is among those found, else 0: each found label
    counts once, and their order not at all, as the gradient of a batch does not tell it. Of attributes (B, A) it is the
    percentage of an image's attributes that are right.
    """
    order = match_batch(reconstruction, original)
    reconstruction = reconstruction[order]
    scores = score(original, shown, reconstruction, hidden, patch_size, extra=extra)
    rows = [
        ({} if labels is None else {"label": _label(labels[place])})
        | {name: values[place].item() for name, values in scores.items()}
        for place in range(len(original))
    ]
    if found is not None and found.dim() == 2:
        for row, own, read in zip(rows, labels, found[order], strict=True):
            row["label_found"] = 100 * float((own == read.to(own)).double().mean())
    elif found is not None:
        left = Counter(found.tolist())
        for row in rows:
            row["label_found"] = 100.0 * (left[row["label"]] > 0)
            left[row["label"]] -= 1
    views = {"originals": original, "reconstructions": reconstruction}
    return views | ({} if shown.equal(original) else {"inputs": shown}), rows


def _label(label: Tensor) -> int | str:
    """Return a label as a plain value: the number of a class, or attributes as a word of 0 and 1."""
    return int(label) if label.dim() == 0 else "".join(str(int(value)) for value in label)


def decibels(error: Tensor) -> Tensor:
    """PSNR of a mean squared error, peak 1; 0 gives infinity."""
    return -10 * torch.log10(error)
