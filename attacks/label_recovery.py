"""Labels of the private batch from the gradient of the classifier, the last linear layer; no optimisation.

For the mean cross-entropy of N images with features r_n in front of the classifier and probabilities p_n behind it,
dL/db_c = 1/N sum_n (p_nc - y_nc) and dL/dW_c = 1/N sum_n (p_nc - y_nc) r_n. Only images of class c push entry c below
zero, each by about -1/N; dL/dW_c follows suit where features are mostly positive (after a ReLU or a sigmoid).

A rule takes weight_gradient (C, F) and bias_gradient (C,), either None where it is withheld, and the number of images;
it returns that many labels (number,) int64 in ascending order. Rules that find too few fill up with random classes from
`generator`; of too many they keep those with the clearest sign. The mean gradient of several local steps (FedAvg) is
read the same way. A rule raises UserError when the gradient it reads is missing or zero, and beyond its batch limit.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attacks.class_features import ClassFeatures, class_features
from attacks.threat_model.leak import Leak
from attacks.threat_model.local_step import blank, causal, client_model, multi_label, seeded, training_loss
from utils.errors import UserError, look_up

Shared = Tensor | None
Query = Callable[[Tensor], Tensor]


def idlg(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """The class whose weight gradient has the smallest sum. One image; positive features make it certain.

    Source: Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020.
    """
    if number > 1:
        raise UserError(
            f"label rule 'idlg' reads one label, the batch has {number}: use bias_corrected, or yin if unique"
        )
    return _row_sums(weight_gradient, "idlg").argmin()[None]


def analytic(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """The classes with a negative bias gradient. Every label at most once, so no more images than classes.

    A class in the batch that the model already predicts with confidence for others may stay positive: it is missed,
    and a random class takes its place. Source: breaching; the sign argument is iDLG's.
    """
    evidence = _required(bias_gradient, "bias", "analytic")
    _check_unique(number, len(evidence), "analytic")
    return _filled(_clearest(evidence, number), number, len(evidence), generator)


def yin(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """The classes whose weight gradient reaches the lowest value in any feature. Every label at most once.

    Needs positive features and no more images than classes. Source: Yin et al. (GradInversion), CVPR 2021, eq. 8.
    """
    evidence = _required(weight_gradient, "weight", "yin").amin(dim=1)
    _check_unique(number, len(evidence), "yin")
    return evidence.argsort(stable=True)[:number].sort().values


def wainakh(weight_gradient: Shared, bias_gradient: Shared, number: int, *, generator: torch.Generator) -> Tensor:
    """Counts: what the negative row sums of the weight gradient hold together is the sum of N equal impacts.

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
    """`wainakh` with the impact measured on the model, and each class freed of what other classes put into it (LLG+).

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
    """`wainakh` on the bias gradient, where no feature blurs the counts. Any batch size, labels may repeat.

    Source: breaching's default rule.
    """
    evidence = _required(bias_gradient, "bias", "bias_corrected")
    return _count(evidence, evidence.clamp_max(0).sum() / number, number)


def geng(
    weight_gradient: Shared,
    bias_gradient: Shared,
    number: int,
    *,
    generator: torch.Generator,
    statistics: Sequence[tuple[Tensor, float]],
) -> Tensor:
    """Counts by what the model makes of dummy images: row c of dL/dW sums to (p_c - n_c / N) O, so that
    n_c = N (p_c - sum_c / O), rounded so that the counts add up to N.

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
    """`geng` for the mean gradient of several local steps, whose probabilities and feature sums are taken to move in a
    straight line from the weights before to those after the round; one pair for each step.

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
    """The labels of the images whose features the classifier's gradient gives away, repetitions counted exactly.

    classifier: its weight (C, F) and bias (C,); weights: of the images in the gradient, default 1 / number each. What
    is not found is filled up as by `bias_corrected` from what the found ones leave of the bias. Up to C / 2 and F
    images. Derived for this project: attacks/class_features.py.
    """
    weight = _required(weight_gradient, "weight", "class_features")
    bias = _required(bias_gradient, "bias", "class_features")
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
DUMMIES = 100  # images of noise on which a model's statistics are measured (Dimitrov et al., 2022)
ONE_GRADIENT = "label rule 'dimitrov' reads the update of several local steps: for one gradient use geng"
BIAS_RULES = ("analytic", "bias_corrected")  # the others read the weight


def recover_class_features(leak: Leak, generator: torch.Generator) -> ClassFeatures:
    """Return features, logits and labels of the images behind a leak, from the gradient of its classifier alone.

    Raises UserError for models that do not end in a linear layer with bias, leaks without its gradients, gradients of
    zero, and more images than its equations tell apart.
    """
    name, *shared = classifier_gradients(leak)
    for part in ("weight", "bias"):
        leak.gradient(_parameter(name, part), "class features")
    for value, part in zip(shared, ("weight", "bias"), strict=True):
        _required(value, part, "class_features")
    layer, weights = leak.model.get_submodule(name), leak.aggregate and leak.aggregate.image_weights
    classifier = layer.weight, layer.bias
    return class_features(*shared, classifier, leak.batch_size, generator=generator, weights=weights)


def recover_labels(leak: Leak, rule: str, generator: torch.Generator) -> Tensor:
    """Labels (B,) int64, ascending, of the batch behind a leak, by the name of a rule.

    Raises UserError for unknown rules, batches beyond the rule's limit, models that do not end in a linear layer, and
    leaks without the gradient the rule reads, which it names.
    """
    read = look_up(LABELS, rule, "label rule")
    name, weight_gradient, bias_gradient = classifier_gradients(leak)
    leak.gradient(_parameter(name, "bias" if rule in BIAS_RULES else "weight"), f"label rule {rule}")
    options = {}
    if rule == "wainakh_whitebox":
        options["query"] = dummy_query(leak, name, generator)
    elif rule in ("geng", "dimitrov"):
        options["statistics"] = dummy_statistics(leak, name, generator, moving=rule == "dimitrov")
    elif rule == "class_features":
        leak.gradient(_parameter(name, "bias"), f"label rule {rule}")
        layer = leak.model.get_submodule(name)
        options["classifier"] = layer.weight, layer.bias
        options["weights"] = leak.aggregate and leak.aggregate.image_weights
    labels = read(weight_gradient, bias_gradient, leak.batch_size, generator=generator, **options)
    return labels.to(next(iter(leak.gradients.values())).device)


def check_attributes(leak: Leak) -> str:
    """Return the name of the classifier's bias. Raises UserError where `attributes_of` cannot read what is hidden."""
    if leak.batch_size > 1:
        raise UserError(
            f"hidden attributes are read off the gradient of one image, and this leak is of {leak.batch_size}: use "
            f"labels joint, or --labels known"
        )
    name = _parameter(classifier_of(leak.model, leak.image_shape), "bias")
    leak.gradient(name, "reading attributes")
    return name


def attributes_of(leak: Leak) -> Tensor:
    """Return the attributes (1, A) of one image, 0 or 1: entry a of the bias gradient is (sigmoid - y_a) / A, negative
    where, and only where, the attribute is there."""
    return (leak.gradients[check_attributes(leak)] < 0).float()[None]


def classifier_gradients(leak: Leak) -> tuple[str, Tensor | None, Tensor | None]:
    """(name of the classifier's layer, its weight gradient (C, F), its bias gradient (C,)); None where withheld."""
    name = classifier_of(leak.model, leak.image_shape)
    return name, *(leak.gradients.get(_parameter(name, part)) for part in ("weight", "bias"))


@torch.no_grad()
def classifier_of(model: nn.Module, image_shape: tuple[int, ...]) -> str:
    """Name of the linear layer whose output is the logits; raises UserError for models that end in something else."""
    model = copy.deepcopy(model).eval()
    outputs: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.__setitem__(name, output))
    logits = model(blank(model, image_shape))
    found = [name for name, output in outputs.items() if torch.equal(output, logits)]
    if not found:
        raise UserError("labels are read from a linear classifier, and this model's logits do not come from one")
    return found[-1]


def dummy_query(leak: Leak, name: str, generator: torch.Generator) -> Query:
    """labels -> the gradient of the classifier's weight (C, F) for as many images of N(0, 1) pixels, in the client's
    mode. name: of the classifier's layer."""
    model = client_model(leak.model, training=leak.training)
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    weight = parameters[_parameter(name, "weight")].requires_grad_()

    def query(labels: Tensor) -> Tensor:
        images = torch.randn(len(labels), *leak.image_shape, generator=generator).to(weight)
        targets = nn.functional.one_hot(labels, len(weight)).to(weight)
        with seeded(leak.dropout_seed):
            return torch.autograd.grad(training_loss(model, parameters, images, targets, None), weight)[0]

    return query


@torch.no_grad()
def dummy_statistics(leak: Leak, name: str, generator: torch.Generator, moving: bool) -> list[tuple[Tensor, float]]:
    """Return the mean probabilities (C,) and the mean sum of the classifier's features over DUMMIES images of N(0, 1)
    pixels, in the client's mode; with `moving` one pair for each local step, on a line from the weights before to those
    after the round. name: of the classifier's layer. Raises UserError for features that are not positive as a whole,
    and for `moving` without local steps."""
    if moving and leak.local is None:
        raise UserError(ONE_GRADIENT)
    model = client_model(leak.model, training=leak.training)
    images = torch.randn(DUMMIES, *leak.image_shape, generator=generator).to(next(model.parameters()))
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))

    def measure() -> tuple[Tensor, float]:
        with seeded(leak.dropout_seed):
            probabilities = model(images).softmax(dim=1).mean(dim=0).double().cpu()
        sums = seen.pop().double().sum(dim=1)  # (DUMMIES,)
        if float(sums.mean()) <= float(sums.std()):
            raise UserError(
                "label rules 'geng' and 'dimitrov' need features that are positive, as behind a ReLU, and those of "
                "this model are not: use bias_corrected"
            )
        return probabilities, float(sums.mean())

    before = measure()
    if not moving:
        return [before]
    reach = leak.local.lr * leak.local.steps
    for key, value in model.named_parameters():
        if key in leak.gradients:
            value.sub_(reach * leak.gradients[key].to(value))
    after, steps = measure(), leak.local.steps
    shares = [step / steps for step in range(steps)]  # the weights that step k starts from
    return [
        tuple((1 - share) * first + share * last for first, last in zip(before, after, strict=True)) for share in shares
    ]


def _parameter(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _required(gradient: Tensor | None, part: str, rule: str) -> Tensor:
    """The gradient in float64 on the CPU; rules are not worth a device's attention."""
    if gradient is None:
        raise UserError(f"label rule '{rule}' reads the gradient of the classifier's {part}, which is not shared")
    if not gradient.any():
        raise UserError(f"label rule '{rule}': the gradient of the classifier's {part} is zero everywhere")
    return gradient.detach().double().cpu()


def _row_sums(weight_gradient: Tensor | None, rule: str) -> Tensor:
    return _required(weight_gradient, "weight", rule).sum(dim=1)


def _check_unique(number: int, classes: int, rule: str) -> None:
    if number > classes:
        raise UserError(
            f"label rule '{rule}' finds a class once, but {number} images exceed {classes} classes: use bias_corrected"
        )


def _clearest(evidence: Tensor, number: int) -> Tensor:
    """The classes with negative evidence, at most `number`, the most negative first."""
    order = evidence.argsort(stable=True)
    return order[evidence[order] < 0][:number]


def _filled(found: Tensor, number: int, classes: int, generator: torch.Generator) -> Tensor:
    missing = torch.randint(classes, (number - len(found),), generator=generator)
    return torch.cat([found, missing]).sort().values


def _count(evidence: Tensor, impact: Tensor, number: int, offset: Tensor | float = 0.0) -> Tensor:
    """`number` classes: each with negative evidence once, then repeatedly the one with the most left after `offset`."""
    found = _clearest(evidence, number)
    left = evidence - offset
    left[found] -= impact
    labels = found.tolist()
    while len(labels) < number:
        labels.append(int(left.argmin()))
        left[labels[-1]] -= impact
    return torch.tensor(sorted(labels))


def first_labels(leak: Leak, rule: str, classes: int, restarts: int, generator: torch.Generator) -> Tensor:
    """Return what stands for the labels (restarts, B, classes), of language models (restarts, B, V, n - 1): as told,
    one-hot where they are classes or are recovered by `rule`; for 'exhaustive' every hypothesis in turn; for 'joint'
    the logits N(0, 1) of probabilities that are optimised with the images (Zhu et al., 2019)."""
    if leak.labels is None and rule == "exhaustive":
        return _hypotheses(leak.batch_size, classes, restarts)
    if leak.labels is None and rule == "joint":
        places = (leak.image_shape[0] - 1,) if causal(leak.model) else ()  # targets (B, V, n - 1)
        return torch.randn(restarts, leak.batch_size, classes, *places, generator=generator)
    if leak.labels is None and multi_label(leak.model):
        return attributes_of(leak).cpu().expand(restarts, -1, -1)
    labels = leak.labels if leak.labels is not None else recover_labels(leak, rule, generator=generator)
    soft = labels.cpu() if labels.dim() == 2 else nn.functional.one_hot(labels.cpu(), classes).float()
    return soft.expand(restarts, -1, -1)


def check_hypotheses(number: int, classes: int, restarts: int) -> None:
    """Raise UserError unless the restarts are as many as the multisets of `number` labels, or a multiple of that."""
    multisets = math.comb(classes + number - 1, number)
    if restarts % multisets:
        raise UserError(
            f"labels exhaustive tries each of the {multisets:,} ways to label {number} images with {classes} classes "
            f"in a restart of its own: set restarts to {multisets} or a multiple, not {restarts}"
        )


def _hypotheses(number: int, classes: int, restarts: int) -> Tensor:
    """Return (restarts, number, classes) one-hot: the multisets of labels, ascending, again and again."""
    check_hypotheses(number, classes, restarts)
    every = torch.tensor(list(itertools.combinations_with_replacement(range(classes), number)))  # (H, B)
    return nn.functional.one_hot(every, classes).float().repeat(restarts // len(every), 1, 1)
