"""What a client computes: one loss for the victim and for the attacker who repeats its step on a candidate."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import logsigmoid
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.threat_model.leak import Aggregate, LocalSteps
from utils.errors import UserError

NOTHING = (
    "nothing of this model is trained: all of its parameters are frozen (requires_grad False), no client shares any"
)


def client_model(model: nn.Module, *, training: bool, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of the model in the client's mode. BatchNorm in training mode normalises by its batch and keeps no
    running statistics, so a step has no side effects and may be vectorised."""
    model = copy.deepcopy(model).to(dtype).train(training)
    if training:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return model


def frozen(model: nn.Module) -> list[str]:
    """Return the names of the parameters that a client does not train (requires_grad False), and so does not share."""
    return [name for name, value in model.named_parameters() if not value.requires_grad]


def describe_frozen(model: nn.Module) -> str:
    """Return the frozen parameters as a line for people, empty where every parameter is trained."""
    names, parameters = frozen(model), dict(model.named_parameters())
    if not names:
        return ""
    values = sum(parameters[name].numel() for name in names)
    total = sum(value.numel() for value in parameters.values())
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{len(names)} of {len(parameters)} parameters are frozen and not shared ({values:,} of {total:,} values): "
        f"{', '.join(names[:3])}{more}"
    )


def training_loss(
    model: nn.Module, parameters: dict[str, Tensor], images: Tensor, targets: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the mean cross-entropy of images (B, C, H, W) under `parameters`; targets (B, classes) are probabilities.
    Scalar. Where `model.loss` is 'bce', the mean binary cross-entropy of targets (B, attributes). No parameters are the
    model's own: not to swap any saves a twentieth of a LeNet's time.

    The localization loss of MJP is left out: it depends on public values alone, so an attacker could subtract it.
    """
    inputs = (images,) if mask is None else (images, mask)
    logits = functional_call(model, parameters, inputs) if parameters else model(*inputs)
    if getattr(logits, "shape", None) != targets.shape:  # their cross-entropy would broadcast, or fail far from here
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model must map {len(images)} inputs to logits {tuple(targets.shape)}, and gives {got}")
    if multi_label(model):
        return -(targets * logsigmoid(logits) + (1 - targets) * logsigmoid(-logits)).mean()
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def multi_label(model: nn.Module) -> bool:
    """Return whether a model tells attributes, each there or not, in place of one class."""
    return getattr(model, "loss", "cross_entropy") == "bce"


def next_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the targets (B, V, n - 1) of a causal language model for token ids (B, n): one-hot in the next token."""
    vocabulary = torch.arange(model.vocab_size, device=ids.device)[:, None]  # (V, 1)
    return (ids[:, None, 1:] == vocabulary).to(next(model.parameters()))


def causal(model: nn.Module) -> bool:
    """Return whether a model predicts every next token, so that its targets are its input."""
    return getattr(model, "causal", False)


def functional_gradient(loss: Callable[[dict], Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return d loss / d parameters inside transforms of torch.func (vmap, compiled or not)."""
    return grad(loss)(parameters)


def autograd_gradient(loss: Callable[[dict], Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return d loss / d parameters by plain autograd, differentiable again: half the cost for one small network."""
    values = list(parameters.values())
    gradients = torch.autograd.grad(loss(parameters), values, create_graph=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def shared_gradient(
    model: nn.Module,
    parameters: dict[str, Tensor],
    names: tuple[str, ...],
    images: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    local: LocalSteps | None,
    gradient: Callable = functional_gradient,
    aggregate: Aggregate | None = None,
) -> dict[str, Tensor]:
    """Return the gradient a client would share for these images, by parameter name, differentiable in images and
    targets; with `aggregate` the weighted mean over its clients.

    mask (1, N), or (B, N) of an aggregate. With `local`, the client's SGD steps are unrolled inside the graph, and the
    result is the mean of their gradients (Geiping et al., 2020, section 5.3). names: the parameters wanted; with
    `local` all that require a gradient take part in the steps, and frozen ones stay as they are.
    """
    if aggregate is not None:
        total: dict[str, Tensor] = {}
        for own, weight in zip(aggregate.slices, aggregate.weights, strict=True):
            hidden = mask if mask is None or len(mask) == 1 else mask[own][:1]
            one = shared_gradient(model, parameters, names, images[own], targets[own], hidden, local, gradient)
            total = {name: total.get(name, 0) + weight * value for name, value in one.items()}
        return total
    if local is None:
        wanted = {name: parameters[name] for name in names}
        if gradient is autograd_gradient and all(parameters[name] is own for name, own in model.named_parameters()):
            return gradient(lambda own: training_loss(model, {}, images, targets, mask), wanted)
        return gradient(lambda own: training_loss(model, parameters | own, images, targets, mask), wanted)
    current = {name: value for name, value in parameters.items() if value.requires_grad}
    fixed = {name: value for name, value in parameters.items() if name not in current}
    for step in range(local.steps):
        chosen = slice_of(step, len(images), local.batch_size)
        x, y = images[chosen], targets[chosen]
        change = gradient(lambda own, x=x, y=y: training_loss(model, fixed | own, x, y, mask), current)
        current = {name: value - local.lr * change[name] for name, value in current.items()}
    return {name: (parameters[name] - current[name]) / (local.lr * local.steps) for name in names}


def seeded(dropout_seed: int | None) -> AbstractContextManager:
    """Draw dropout from `dropout_seed` and leave the global generators as they were; None does nothing."""
    return nullcontext() if dropout_seed is None else _forked(dropout_seed)


@contextmanager
def _forked(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # not naming them warns of many
        torch.manual_seed(seed)
        yield


_FOUND: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()


def once(find: Callable[[nn.Module, tuple[int, ...]], object]) -> Callable:
    """Make find(model, image_shape), which takes a pass, remember what it has found of a model, for as long as that
    lives and its parameters have the same names and sizes."""

    @wraps(find)
    def call(model: nn.Module, image_shape: tuple[int, ...]):
        sizes = tuple((name, tuple(value.shape)) for name, value in model.named_parameters())
        found, about = _FOUND.setdefault(model, {}), (find.__name__, tuple(image_shape), sizes)
        if about not in found:
            found[about] = find(model, image_shape)
        return found[about]

    return call


@once
@torch.no_grad()
def classes_of(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return how many classes the model tells apart, by a pass of a copy: in training mode BatchNorm would change."""
    return client_model(model, training=False)(blank(model, image_shape)).shape[1]


def blank(model: nn.Module, image_shape: tuple[int, ...]) -> Tensor:
    """Return zeros that the model takes: an image (1, C, H, W), the ids of a sentence (1, n), or embeddings (1, n,
    D)."""
    return next(model.parameters()).new_zeros(1, *image_shape, dtype=torch.int64 if len(image_shape) == 1 else None)


def slice_of(step: int, number: int, batch_size: int) -> list[int]:
    """Return the places in the client's batch that local step `step` trains on."""
    return [(step * batch_size + place) % number for place in range(min(batch_size, number))]


def epoch_orders(number: int, local: LocalSteps, seed: int) -> Tensor:
    """Return the images (epochs * number,) that local steps go through, in an order of its own for every epoch."""
    generator, epochs = torch.Generator().manual_seed(seed), -(-local.steps * local.batch_size // number)
    return torch.cat([torch.randperm(number, generator=generator) for _ in range(epochs)])


def active_dropout(model: nn.Module) -> str | None:
    """Return the name of the first layer that drops something at random in training mode, None without one."""
    for name, layer in model.named_modules():
        draws = any(word in type(layer).__name__.lower() for word in ("drop", "stochastic"))
        rates = ["drop_rate", *(("p", "drop_prob", "prob") if draws else ())]
        if any(getattr(layer, rate, 0) for rate in rates):
            return name or type(layer).__name__
    return None
