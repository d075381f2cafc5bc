"""How close a reconstruction comes to the private image, per image, in the field's scores and a few of our own."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eval.assignment import match_batch, order_free_error
from eval.mse import mse
from eval.psnr_ssim import SSIM_WINDOW, psnr, ssim
from models.jigsaw import patchify
from utils.errors import not_empty

RECOVERED = 25.0  # dB: above it a picture or patch is recognisably the private one; a convention, stated with results


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


def judge(
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


def summarize(rows: Sequence[dict], keys: Sequence[str]) -> dict[str, dict]:
    """{metric: {"mean", "std", "n"}} over the rows whose value is finite; `infinite` counts perfect PSNRs left out.

    std is the sample standard deviation, null for one value; a metric without finite values has mean null. Keys that no
    row has are left out.
    """
    summary = {}
    for key in keys:
        if not any(key in row for row in rows):
            continue
        found = [row[key] for row in rows if row.get(key) is not None]
        summary[key] = describe([value for value in found if math.isfinite(value)])
        if infinite := sum(math.isinf(value) for value in found):
            summary[key]["infinite"] = infinite
    return summary


def success(rows: Sequence[dict], threshold: float = RECOVERED, *, key: str = "psnr") -> dict:
    """Return how many reconstructions are better than `threshold`: mean is their share, from 0 to 1, of n images.

    Perfect ones count, undefined ones (NaN) do not. Returns {"mean", "std", "n", "metric", "threshold"}.
    """
    not_empty(rows, "the share of successes")
    above = [float(row[key] is not None and row[key] > threshold) for row in rows]
    return describe(above) | {"metric": key, "threshold": threshold}


def describe(values: Sequence[float]) -> dict:
    """{"mean", "std", "n"} of finite values; std of fewer than two and the mean of none are None."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def finite(row: dict) -> dict:
    """The row with infinite and undefined numbers as None, as JSON wants them."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
