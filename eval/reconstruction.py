"""How close a reconstruction comes to the private image, per image: METRICS is the table of all scores.

Reports, per_image.csv, results.json, tables and docs/attacks.md follow the table.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eval.assignment import match_batch, order_free_error
from eval.fft2d import fft2d
from eval.mse import mse
from eval.psnr_ssim import SSIM_WINDOW, psnr, ssim
from models.jigsaw import patchify
from reports.metrics import Metric
from utils.errors import not_empty
from utils.statistics import RECOVERED


@dataclass(frozen=True)
class Comparison:
    """What the scores of a batch are computed from: pixel values (B, C, H, W); mask (B, N) bool: the hidden ones.

    The reconstruction may leave [0, 1]. model_input: the original as the victim's model saw it, with shuffled patches.
    """

    original: Tensor
    model_input: Tensor
    reconstruction: Tensor
    mask: Tensor
    patch_size: int

    @cached_property
    def clamped(self) -> Tensor:
        """Return the reconstruction in [0, 1]."""
        return self.reconstruction.clamp(0, 1)

    @cached_property
    def patch_errors(self) -> Tensor:
        """Return the mean squared errors (B, N) of all patches, in the order that suits them best."""
        every = torch.ones_like(self.mask)
        return torch.stack(order_free_error(self.clamped, self.original, self.patch_size, every))


def against_original(metric: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Comparison], Tensor]:
    """Return a score of the clamped reconstruction against the original, of `metric` (reconstruction, original)."""
    return lambda found: metric(found.clamped, found.original)


def _ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Return SSIM, NaN for images smaller than its window."""
    small = min(original.shape[-2:]) < SSIM_WINDOW
    return torch.full((len(original),), math.nan) if small else ssim(reconstruction, original)


def _visible(found: Comparison, images: Tensor) -> Tensor:
    """Return the PSNR over the patches that are not masked, NaN where there are none."""
    cut = [patchify(each, found.patch_size).double() for each in (images, found.model_input)]
    error = (cut[0] - cut[1]).square().mean(dim=2)  # (B, N)
    return decibels(error.masked_fill(found.mask, 0).sum(1) / (~found.mask).sum(1))


def _masked(found: Comparison) -> Tensor:
    """Return the PSNR over the masked patches as a set, NaN where there are none."""
    errors = order_free_error(found.clamped, found.original, found.patch_size, found.mask)
    return decibels(torch.stack([error.mean() for error in errors]))


def _exact_pixels(found: Comparison) -> Tensor:
    """Return the percentage of 8-bit values that come back exactly."""
    one, other = ((images.double() * 255).round() for images in (found.clamped, found.model_input))
    return 100 * (one == other).flatten(1).double().mean(1)


def _baseline(found: Comparison) -> Tensor:
    return mean_colour(found.original)


def mean_colour(images: Tensor) -> Tensor:
    """Return the PSNR (B,) in dB of a picture in the mean colour of each image (B, C, H, W), which takes no leak."""
    return psnr(images.mean(dim=(2, 3), keepdim=True).expand_as(images), images)


METRICS = {
    "psnr": Metric(against_original(psnr), "PSNR", "dB", "higher", "whole image against the original"),
    "ssim": Metric(against_original(_ssim), "SSIM", "", "higher", "structural similarity to the original; 1 is equal"),
    "mse": Metric(against_original(mse), "MSE", "", "lower", "mean squared error against the original; 0 is equal"),
    "fft2d": Metric(
        against_original(fft2d),
        "FFT2D",
        "",
        "lower",
        "spectral distance of the official MJP code from the original; 0 is equal",
    ),
    **{
        f"lpips_{net}{mark}": Metric(
            None, f"LPIPS ({label}{said})", "", "lower", "perceptual distance from the original; 0 is equal"
        )
        for net, label in (("alex", "AlexNet"), ("vgg", "VGG"), ("squeeze", "SqueezeNet"))
        for mark, said in (("", ""), ("_unverified", ", weights unverified"))
    },
    "psnr_shown": Metric(
        lambda found: psnr(found.clamped, found.model_input),
        "PSNR to input",
        "dB",
        "higher",
        "against what the model saw, patches shuffled where it uses MJP",
        refines="psnr",
    ),
    "psnr_visible": Metric(
        lambda found: _visible(found, found.clamped),
        "PSNR visible",
        "dB",
        "higher",
        "patches that are not masked, against the model's input",
        refines="psnr_shown",
    ),
    "psnr_visible_raw": Metric(
        lambda found: _visible(found, found.reconstruction),
        "PSNR visible, raw",
        "dB",
        "higher",
        "the same with pixels outside 0 to 1 not clamped",
        refines="psnr_visible",
    ),
    "psnr_masked": Metric(
        _masked, "PSNR masked", "dB", "higher", "masked patches as a set, in the order that suits them best"
    ),
    "psnr_patches": Metric(
        lambda found: decibels(found.patch_errors.mean(1)),
        "PSNR any order",
        "dB",
        "higher",
        "all patches as a set, in the order that suits them best",
        refines="psnr",
    ),
    "patches_recovered": Metric(
        lambda found: 100 * (decibels(found.patch_errors) > RECOVERED).double().mean(1),
        "patches recovered",
        "%",
        "higher",
        f"patches above {RECOVERED:g} dB in that order",
    ),
    "exact_pixels": Metric(
        _exact_pixels, "values exact", "%", "higher", "8-bit values of the model's input that come back exactly"
    ),
    "psnr_baseline": Metric(
        _baseline, "PSNR of no leak", "dB", "", "what one constant picture in the image's mean colour scores"
    ),
    "label_found": Metric(None, "label found", "%", "higher", "images whose label is among those the attack found"),
    "label_read": Metric(
        None, "label read", "", "", "class the attack worked with or found; nobody here knows the true one"
    ),
    "seconds": Metric(None, "attack time", "s", "", "seconds per image"),
}


def score(
    original: Tensor,
    model_input: Tensor,
    reconstruction: Tensor,
    mask: Tensor,
    patch_size: int,
    *,
    extra: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the scores of METRICS that are functions of pictures, each (B,), of pixel values (B, 3, H, W).

    The reconstruction may leave [0, 1]; it is clamped unless stated. model_input: what the victim's model saw, the
    original with shuffled patches; mask (B or 1, N) bool: the masked patches. SSIM is NaN for images smaller than its
    window, scores of patches that do not exist are NaN. extra: more scores by name, functions of (reconstruction,
    original) in [0, 1] that return (B,), such as a loaded LPIPS.
    """
    not_empty(original, "a score")
    mask = mask.to(original.device).expand(len(original), -1)
    found = Comparison(original, model_input, reconstruction, mask, patch_size)
    scores = {name: metric.function(found) for name, metric in METRICS.items() if metric.function}
    return scores | {name: metric(found.clamped, original) for name, metric in (extra or {}).items()}


def score_batch(
    original: Tensor,
    model_input: Tensor,
    reconstruction: Tensor,
    mask: Tensor,
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
    scores = score(original, model_input, reconstruction, mask, patch_size, extra=extra)
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
    return views | ({} if model_input.equal(original) else {"inputs": model_input}), rows


def _label(label: Tensor) -> int | str:
    """Return a label as a plain value: the number of a class, or attributes as a word of 0 and 1."""
    return int(label) if label.dim() == 0 else "".join(str(int(value)) for value in label)


def decibels(error: Tensor) -> Tensor:
    """Return PSNR of a mean squared error, peak 1; 0 gives infinity."""
    return -10 * torch.log10(error)
