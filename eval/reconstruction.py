"""How close a reconstruction comes to the private image, per image, in the field's scores and a few of our own."""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from eval.mse import mse
from eval.psnr_ssim import SSIM_WINDOW, psnr, ssim
from models.jigsaw import patchify


def score(
    original: Tensor, shown: Tensor, reconstruction: Tensor, hidden: Tensor, patch_size: int
) -> dict[str, Tensor]:
    """Scores of (B, 3, H, W) pixel values, each (B,). The reconstruction may leave [0, 1]; it is clamped unless stated.

    shown: what the victim's model saw, the original with shuffled patches; hidden (B or 1, N) bool: the masked patches.
    mse (lower is closer), psnr in dB and ssim are against the original; psnr_shown against `shown`; psnr_visible over
    the patches that are not hidden, psnr_visible_raw the same without the clamp; exact_pixels: percentage of 8-bit
    values that come back exactly (all higher is closer). ssim is NaN for images smaller than its window.
    """
    clamped = reconstruction.clamp(0, 1)
    visible = ~hidden.expand(len(original), -1)

    def visible_psnr(images: Tensor) -> Tensor:
        error = (patchify(images, patch_size).double() - patchify(shown, patch_size).double()).square().mean(dim=2)
        return -10 * torch.log10((error * visible).sum(1) / visible.sum(1))

    def eight_bit(images: Tensor) -> Tensor:
        return (images.double() * 255).round()

    small = min(original.shape[-2:]) < SSIM_WINDOW
    return {
        "mse": mse(clamped, original),
        "psnr": psnr(clamped, original),
        "ssim": torch.full((len(original),), math.nan) if small else ssim(clamped, original),
        "psnr_shown": psnr(clamped, shown),
        "psnr_visible": visible_psnr(clamped),
        "psnr_visible_raw": visible_psnr(reconstruction),
        "exact_pixels": 100 * (eight_bit(clamped) == eight_bit(shown)).flatten(1).double().mean(1),
    }


def summarize(rows: Sequence[dict], keys: Sequence[str]) -> dict[str, dict]:
    """{metric: {"mean", "std", "n"}} over the rows whose value is finite; `infinite` counts perfect PSNRs left out.

    std is the sample standard deviation, null for one value; a metric without finite values has mean null.
    """
    summary = {}
    for key in keys:
        values = [row[key] for row in rows if row[key] is not None and math.isfinite(row[key])]
        infinite = sum(row[key] is not None and math.isinf(row[key]) for row in rows)
        summary[key] = {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
        if infinite:
            summary[key]["infinite"] = infinite
    return summary


def finite(row: dict) -> dict:
    """The row with infinite and undefined numbers as None, as JSON wants them."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
