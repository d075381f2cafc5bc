"""Labels behind a leak, by the rules of attacks/label_rules.py: which layer is the classifier, what a rule reads of it,
and what stands for labels that are not told."""

import copy
import itertools
import math

import torch
from torch import Tensor, nn

from attacks.class_features import ClassFeatures, class_features
from attacks.label_rules import BIAS_RULES, LABELS, Query, required
from attacks.threat_model.leak import Leak, RefusalError
from attacks.threat_model.local_step import blank, causal, client_model, multi_label, once, seeded, training_loss
from utils.errors import UserError, look_up

ONE_GRADIENT = "label rule 'dimitrov' reads the update of several local steps: for one gradient use geng"
DUMMIES = 100  # images of noise on which a model's statistics are measured (Dimitrov et al., 2022)


def recover_class_features(leak: Leak, generator: torch.Generator) -> ClassFeatures:
    """Return features, logits and labels of the images behind a leak, from the gradient of its classifier alone.

    Raises UserError for models of attributes or that do not end in a linear layer with bias, leaks without its
    gradients, gradients of zero, and more images than its equations tell apart.
    """
    _check_classes(leak.model, "class features")
    name, *shared = classifier_gradients(leak)
    for part in ("weight", "bias"):
        leak.gradient(_parameter(name, part), "class features")
    for value, part in zip(shared, ("weight", "bias"), strict=True):
        required(value, part, "class_features")
    layer, weights = leak.model.get_submodule(name), leak.aggregate and leak.aggregate.image_weights
    classifier = layer.weight, layer.bias
    return class_features(*shared, classifier, leak.batch_size, generator=generator, weights=weights)


def recover_labels(leak: Leak, rule: str, generator: torch.Generator) -> Tensor:
    """Return labels (B,) int64, ascending, of the batch behind a leak, by the name of a rule.

    Raises UserError for unknown rules, batches beyond the rule's limit, models of attributes or that do not end in a
    linear layer, and leaks without the gradient the rule reads, which it names.
    """
    read = look_up(LABELS, rule, "label rule")
    _check_classes(leak.model, f"label rule {rule}")
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


def _check_classes(model: nn.Module, what: str) -> None:
    """Raise UserError where `what` would read one class an image off the gradient of several attributes."""
    if multi_label(model):
        raise RefusalError(f"{what} reads one class an image, and this model tells attributes, each there or not")


def check_attributes(leak: Leak) -> str:
    """Return the name of the classifier's bias. Raises UserError where `attributes_of` cannot read what is hidden."""
    if leak.batch_size > 1:
        raise RefusalError(
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
    """Return (name of the classifier's layer, its weight gradient (C, F), its bias gradient (C,)); None where
    withheld."""
    name = classifier_of(leak.model, leak.image_shape)
    return name, *(leak.gradients.get(_parameter(name, part)) for part in ("weight", "bias"))


@once
@torch.no_grad()
def classifier_of(model: nn.Module, image_shape: tuple[int, ...]) -> str:
    """Return the name of the linear layer whose output is the logits; raises UserError for models that end in something
    else."""
    model = copy.deepcopy(model).eval()
    outputs: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.__setitem__(name, output))
    logits = model(blank(model, image_shape))
    found = [name for name, output in outputs.items() if torch.equal(output, logits)]
    if not found:
        raise RefusalError("labels are read from a linear classifier, and this model's logits do not come from one")
    return found[-1]


def dummy_query(leak: Leak, name: str, generator: torch.Generator) -> Query:
    """Map labels to the gradient of the classifier's weight (C, F) for as many images of N(0, 1) pixels, in the
    client's mode. name: of the classifier's layer."""
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
        raise RefusalError(ONE_GRADIENT)
    model = client_model(leak.model, training=leak.training)
    images = torch.randn(DUMMIES, *leak.image_shape, generator=generator).to(next(model.parameters()))
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))

    def measure() -> tuple[Tensor, float]:
        with seeded(leak.dropout_seed):
            probabilities = model(images).softmax(dim=1).mean(dim=0).double().cpu()
        sums = seen.pop().double().sum(dim=1)  # (DUMMIES,)
        if float(sums.mean()) <= float(sums.std()):
            raise RefusalError(
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
