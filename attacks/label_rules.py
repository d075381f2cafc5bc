"""Labels of the private batch from the gradient of the classifier, the last linear layer; no optimisation.

For the mean cross-entropy of N images with features r_n in front of the classifier and probabilities p_n behind it,
dL/db_c = 1/N sum_n (p_nc - y_nc) and dL/dW_c = 1/N sum_n (p_nc - y_nc) r_n. Only images of class c push entry c below
zero, each by about -1/N; dL/dW_c follows suit where features are mostly positive (after a ReLU or a sigmoid).

A rule takes weight_gradient (C, F) and bias_gradient (C,), either None where it is withheld, and the number of images;
it returns that many labels (number,) int64 in ascending order. Rules that find too few fill up with random classes from
`generator`; of too many they keep those with the clearest sign. The mean gradient of several local steps (FedAvg) is
read the same way. A rule raises UserError when the gradient it reads is missing or zero, and beyond its batch limit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attacks.class_features import class_features
from attacks.threat_model.leak import RefusalError

Shared = Tensor | None
Query = Callable[[Tensor], Tensor]


def idlg(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """Return the class whose weight gradient has the smallest sum. One image; positive features make it certain.

    Source: Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020.
    """
    if number > 1:
        raise RefusalError(
            f"label rule 'idlg' reads one label, the batch has {number}: use bias_corrected, or yin if unique"
        )
    return _row_sums(weight_gradient, "idlg").argmin()[None]


def analytic(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """Return the classes with a negative bias gradient. Every label at most once, so no more images than classes.

    A class in the batch that the model already predicts with confidence for others may stay positive: it is missed,
    and a random class takes its place. Source: breaching; the sign argument is iDLG's.
    """
    evidence = required(bias_gradient, "bias", "analytic")
    _check_unique(number, len(evidence), "analytic")
    return _filled(_clearest(evidence, number), number, len(evidence), generator)


def yin(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """Return the classes whose weight gradient reaches the lowest value in any feature. Every label at most once.

    Needs positive features and no more images than classes. Source: Yin et al. (GradInversion), CVPR 2021, eq. 8.
    """
    evidence = required(weight_gradient, "weight", "yin").amin(dim=1)
    _check_unique(number, len(evidence), "yin")
    return evidence.argsort(stable=True)[:number].sort().values


def wainakh(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """Count labels: the negative row sums of the weight gradient together are the sum of N equal impacts.

    Each class with a negative sum is taken once, then the lowest again and again; every time it is relieved of one
    impact. Labels may repeat and the batch may have any size; needs positive features and an untrained model's even
    probabilities. Source: Wainakh et al., "User-Level Label Leakage from Gradients" (LLG), PoPETs 2022.
    """
    sums = _row_sums(weight_gradient, "wainakh")
    impact = (1 + 1 / len(sums)) / number * sums.clamp_max(0).sum()
    return _count(sums, impact, number)


def wainakh_whitebox(
    weight_gradient: Shared,
    bias_gradient: Shared,
    number: int,
    *,
    generator: torch.Generator,
    query: Query,
) -> Tensor:
    """Return `wainakh` with the impact measured on the model, and each class freed of what other classes put into it
    (LLG+).

    query(labels (number,)) -> the weight gradient (C, F) the model gives for dummy images with these labels. C queries,
    one per class c with all dummies labelled c: their entries (c, c) give the impact, the mean of the others in row c
    its offset. Any batch size and uneven probabilities; needs images whose features resemble those of the dummies.
    The loss is a mean over images, so the offset is that of a whole batch and is not divided again.
    """
    sums = _row_sums(weight_gradient, "wainakh_whitebox")
    classes = len(sums)
    measured = torch.stack(
        [query(torch.full((number,), label)).double().cpu().sum(dim=1) for label in range(classes)], dim=1
    )  # row sums (C, C), one column per query
    impact = (1 + 1 / classes) / number * measured.diagonal().mean()
    offset = (measured.sum(dim=1) - measured.diagonal()) / (classes - 1)
    return _count(sums, impact, number, offset)


def bias_corrected(
    weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator
) -> Tensor:
    """Return `wainakh` on the bias gradient, where no feature blurs the counts. Any batch size, labels may repeat.

    Source: breaching's default rule.
    """
    evidence = required(bias_gradient, "bias", "bias_corrected")
    return _count(evidence, evidence.clamp_max(0).sum() / number, number)


def geng(
    weight_gradient: Shared,
    bias_gradient: Shared,
    number: int,
    *,
    generator: torch.Generator,
    statistics: Sequence[tuple[Tensor, float]],
) -> Tensor:
    """Count labels by what the model makes of dummy images: row c of dL/dW sums to (p_c - n_c / N) O, so that n_c = N
    (p_c - sum_c / O), rounded so that the counts add up to N.

    statistics: of `dummy_statistics`, for each step the mean probabilities p (C,) and the mean feature sum O. Labels
    may repeat and the batch may have any size; needs positive features, of about the sum that dummies have. Source:
    Geng et al., "Towards General Deep Leakage in Federated Learning", 2021.
    """
    sums = _row_sums(weight_gradient, "geng")
    pull = torch.stack([probabilities.double() * total for probabilities, total in statistics]).sum(dim=0)  # (C,)
    whole = sum(total for _, total in statistics)
    left = number * (pull - len(statistics) * sums) / whole  # (C,), images of each class, not yet whole numbers
    labels = []
    for _ in range(number):  # the largest remainders
        labels.append(int(left.argmax()))
        left[labels[-1]] -= 1
    return torch.tensor(sorted(labels))


def dimitrov(
    weight_gradient: Shared,
    bias_gradient: Shared,
    number: int,
    *,
    generator: torch.Generator,
    statistics: Sequence[tuple[Tensor, float]],
) -> Tensor:
    """Return `geng` for the mean gradient of several local steps, whose probabilities and feature sums are taken to
    move in a straight line from the weights before to those after the round; one pair for each step.

    Source: Dimitrov et al., "Data Leakage in Federated Averaging", TMLR 2022, section 4.3.
    """
    return geng(weight_gradient, bias_gradient, number, generator=generator, statistics=statistics)


def of_class_features(
    weight_gradient: Shared,
    bias_gradient: Shared,
    number: int,
    *,
    generator: torch.Generator,
    classifier: tuple[Tensor, Tensor],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Return the labels of the images whose features the classifier's gradient gives away, repetitions counted exactly.

    classifier: its weight (C, F) and bias (C,); weights: of the images in the gradient, default 1 / number each. What
    is not found is filled up as by `bias_corrected` from what the found ones leave of the bias. Up to C / 2 and F
    images. Derived for this project: attacks/class_features.py.
    """
    weight = required(weight_gradient, "weight", "class_features")
    bias = required(bias_gradient, "bias", "class_features")
    dtype = weight_gradient.dtype
    found = class_features(weight.to(dtype), bias.to(dtype), classifier, number, generator=generator, weights=weights)
    labels, missing = found.labels.repeat_interleave(found.counts), number - found.found
    if missing <= 0:
        return labels[:number]
    left = bias + torch.bincount(labels, minlength=len(bias)) / number
    return torch.cat([labels, _count(left, left.clamp_max(0).sum() / missing, missing)]).sort().values


LABELS: dict[str, Callable[..., Tensor]] = {
    "idlg": idlg,
    "analytic": analytic,
    "yin": yin,
    "wainakh": wainakh,
    "wainakh_whitebox": wainakh_whitebox,
    "bias_corrected": bias_corrected,
    "geng": geng,
    "dimitrov": dimitrov,
    "class_features": of_class_features,
}
BIAS_RULES = ("analytic", "bias_corrected")  # the others read the weight


def required(gradient: Tensor | None, part: str, rule: str) -> Tensor:
    """Return the gradient in float64 on the CPU; rules are not worth a device's attention."""
    if gradient is None:
        raise RefusalError(f"label rule '{rule}' reads the gradient of the classifier's {part}, which is not shared")
    if not gradient.any():
        raise RefusalError(f"label rule '{rule}': the gradient of the classifier's {part} is zero everywhere")
    return gradient.detach().double().cpu()


def _row_sums(weight_gradient: Tensor | None, rule: str) -> Tensor:
    return required(weight_gradient, "weight", rule).sum(dim=1)


def _check_unique(number: int, classes: int, rule: str) -> None:
    if number > classes:
        raise RefusalError(
            f"label rule '{rule}' finds a class once, but {number} images exceed {classes} classes: use bias_corrected"
        )


def _clearest(evidence: Tensor, number: int) -> Tensor:
    """Return the classes with negative evidence, at most `number`, the most negative first."""
    order = evidence.argsort(stable=True)
    return order[evidence[order] < 0][:number]


def _filled(found: Tensor, number: int, classes: int, generator: torch.Generator) -> Tensor:
    missing = torch.randint(classes, (number - len(found),), generator=generator)
    return torch.cat([found, missing]).sort().values


def _count(evidence: Tensor, impact: Tensor, number: int, offset: Tensor | float = 0.0) -> Tensor:
    """Return `number` classes: each with negative evidence once, then repeatedly the one with the most left after
    `offset`."""
    found = _clearest(evidence, number)
    left = evidence - offset
    left[found] -= impact
    labels = found.tolist()
    while len(labels) < number:
        labels.append(int(left.argmin()))
        left[labels[-1]] -= impact
    return torch.tensor(sorted(labels))
