"""Does a model's confidence tell how often it is right, and does it tell known images from foreign ones?

The scores of ImageNet-A and -O (Hendrycks et al., "Natural Adversarial Examples", CVPR 2021), for any labelled set. The
official code leaves the last bin, the most confident images, out of its calibration error; `legacy` does so too.
Confidences are shares in [0, 1], scores are percentages unless stated.
"""

from typing import Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from utils.errors import UserError, not_empty

BIN_SIZE = 100  # images per bin, as in the official code


def predictions(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the maximum softmax probability (N,) float64 of (N, K) logits, and whether its class is the label (N,)."""
    if logits.dim() != 2 or logits.shape[:1] != labels.shape or not len(labels):
        raise UserError(f"expected logits (N, K) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not logits.isfinite().all():
        raise UserError("the model's outputs are NaN or infinite: its weights are damaged, use an earlier checkpoint")
    # In float64, as float32 makes ties of confident images, whose order would then decide.
    confidence, found = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    return confidence, found == labels


def calibration(logits: Tensor, labels: Tensor, *, legacy: bool = False) -> dict[str, float]:
    """Return the accuracy and honesty of a classifier from (N, K) logits and (N,) labels, in percent but for the
    temperature.

    acc1; confidence: its mean, which should equal acc1; rms_calibration_error and mean_calibration_error (lower is
    better); aurra and soft_f1 (higher is better); temperature: see `fit_temperature`; images: N.
    legacy: the official omission of the last bin, in both calibration errors.
    """
    confidence, correct = predictions(logits, labels)
    return {
        "acc1": 100 * correct.double().mean().item(),
        "confidence": 100 * confidence.mean().item(),
        "rms_calibration_error": calibration_error(confidence, correct, legacy=legacy),
        "mean_calibration_error": calibration_error(confidence, correct, norm="mean", legacy=legacy),
        "aurra": aurra(confidence, correct),
        "soft_f1": soft_f1(confidence, correct),
        "temperature": fit_temperature(logits, labels),
        "images": len(labels),
    }


def calibration_error(
    confidence: Tensor,
    correct: Tensor,
    *,
    bin_size: int = BIN_SIZE,
    norm: Literal["rms", "mean", "max"] = "rms",
    legacy: bool = False,
) -> float:
    """Return the gap between mean confidence and accuracy over bins of `bin_size` images sorted by confidence; lower is
    better.

    (N,) and (N,) -> percent: the root mean square over images, the mean, or the largest gap. The last bin takes the
    remainder. legacy: that bin counts as a gap of 0, as in the official code, which makes a single bin 0.
    """
    not_empty(confidence, "calibration error")
    confidence, order = confidence.double().sort(stable=True)
    gap = confidence - correct.to(confidence)[order]
    bins = max(1, len(gap) // bin_size)
    edges = [bin_size * place for place in range(bins)] + [len(gap)]
    parts = gap.split([end - start for start, end in zip(edges, edges[1:], strict=False)])
    gaps = torch.stack([part.mean().abs() for part in parts])
    shares = torch.tensor([len(part) for part in parts]).to(gaps) / len(gap)
    if legacy:
        gaps[-1] = 0
    return 100 * {"rms": (shares * gaps**2).sum().sqrt(), "mean": (shares * gaps).sum(), "max": gaps.max()}[norm].item()


def aurra(confidence: Tensor, correct: Tensor) -> float:
    """Return the area under the response rate accuracy curve, in percent, higher is better.

    The mean, over all n, of the accuracy on the n most confident of the (N,) images.
    """
    not_empty(confidence, "AURRA")
    order = confidence.double().sort(stable=True).indices.flip(0)
    right = correct[order].double().cumsum(0)
    return 100 * (right / torch.arange(1, len(right) + 1).to(right)).mean().item()


def soft_f1(confidence: Tensor, correct: Tensor) -> float:
    """Return F1 of finding the wrong answers by their lack of confidence, counted by degrees; percent, higher is
    better."""
    not_empty(confidence, "soft F1")
    doubt, wrong = 1 - confidence.double(), (~correct.bool()).double()
    return 100 * (2 * (doubt * wrong).sum() / (doubt.sum() + wrong.sum())).item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the divisor of (N, K) logits, from 0.05 to 20, that makes their cross-entropy least: above 1 for
    overconfidence.

    The official code looks between 0.2 and 5 only.
    """
    not_empty(labels, "the temperature")
    logits, labels = logits.double().cpu(), labels.cpu()

    def loss(log_temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits / np.exp(log_temperature), labels).item()

    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def detection(foreign: Tensor, known: Tensor, *, recall: float = 0.95) -> dict[str, float]:
    """Return how well an anomaly score, higher for foreign images, finds them among known ones; all in percent.

    (M,) scores of foreign and (N,) of known images -> auroc and aupr (average precision; foreign is positive), higher
    is better, and fpr95 (or of another `recall`): the share of known images taken for foreign where that share of the
    foreign ones is found, lower is better. As in the official code the threshold is the one of nearest recall, and of
    several with that recall the one with the most false alarms.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # half a second

    if not len(foreign) or not len(known):
        raise UserError(f"detection needs foreign and known images, got {len(foreign)} and {len(known)}")
    scores = torch.cat([foreign, known]).double().cpu().numpy()
    is_foreign = np.arange(len(scores)) < len(foreign)
    false, found, _ = roc_curve(is_foreign, scores, drop_intermediate=False)
    found = found[: np.searchsorted(found, 1) + 1]  # what lies beyond finding all is nobody's choice
    nearest = len(found) - 1 - np.abs(found[::-1] - recall).argmin()
    return {
        "auroc": 100 * float(roc_auc_score(is_foreign, scores)),
        "aupr": 100 * float(average_precision_score(is_foreign, scores)),
        f"fpr{100 * recall:.0f}": 100 * float(false[nearest]),
    }
