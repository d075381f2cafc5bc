"""The threat model as a type: an attack receives a Leak and returns a Reconstruction."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps

from torch import Tensor, nn

from attacks.certified import Certificate
from utils.errors import UserError


class RefusalError(UserError):
    """An attack cannot read the leak it is given. That is a result about model, step and what was shared, where any
    other UserError is a mistake in an option or a file."""


@dataclass(frozen=True)
class LocalSteps:
    """FedAvg: the client takes `steps` plain SGD steps of rate `lr` before it shares its update. Step k trains on the
    images k * batch_size to (k + 1) * batch_size of its batch, counted around the end (McMahan et al., 2017)."""

    steps: int
    lr: float
    batch_size: int


@dataclass(frozen=True)
class Aggregate:
    """Secure aggregation (Bonawitz et al., CCS 2017): the server sees the weighted mean of what several clients share,
    and nothing of each. sizes: images of every client, which stand one after another in the batch; weights: of every
    client, summing to one."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def slices(self) -> list[slice]:
        """Return the places of every client's images in the batch."""
        ends = [sum(self.sizes[: place + 1]) for place in range(len(self.sizes))]
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    @property
    def image_weights(self) -> tuple[float, ...]:
        """Return the weight of every image in the gradient."""
        pairs = zip(self.sizes, self.weights, strict=True)
        return tuple(weight / size for size, weight in pairs for _ in range(size))


@dataclass(frozen=True)
class Leak:
    """Everything an honest-but-curious server knows after one round, and nothing else.

    model: architecture and weights before the round. gradients: by parameter name; withheld, frozen and unused ones are
    absent. With `local`, the weight update divided by -(steps * lr): the mean of the local gradients.
    image_shape (C, H, W), or (n,), the length of a sentence in tokens; batch_size: images behind the gradient; labels:
    the targets of the step, (B,) int64 or (B, classes) probabilities where a defence mixed them, or None when hidden.
    mean, std: normalisation of the model's input, which bounds the pixels.
    training: the step ran in training mode (BatchNorm uses statistics of the batch), with dropout drawn from
    dropout_seed. statistics: by BatchNorm layer name, the (mean, biased variance) of its input over the private batch,
    for clients that share them.
    attacker_knowledge: of MJP (attacks/threat_model/uses.py). none: unaware of it; method: knows the code and has to
    infer the mask; mask: is also told the mask (N,) bool; permutation: is told mask and permutation, by which patch i
    of the input is patch source[i] of the image, source (N,).
    aggregate: the clients behind the gradient where they are several; mask and source are then (B, N), as each client
    draws its own, and `local` is the round of each.
    public: token ids (n,) of sentences of the same kind that anybody can read.
    """

    model: nn.Module
    gradients: dict[str, Tensor]
    image_shape: tuple[int, ...]
    batch_size: int
    labels: Tensor | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    local: LocalSteps | None = None
    training: bool = False
    dropout_seed: int | None = None
    statistics: dict[str, tuple[Tensor, Tensor]] | None = None
    attacker_knowledge: str = "method"
    mask: Tensor | None = None
    source: Tensor | None = None
    public: tuple[Tensor, ...] = ()
    aggregate: Aggregate | None = None

    def gradient(self, name: str, attack: str) -> Tensor:
        """Return one gradient by parameter name; raises UserError saying which attack misses it."""
        if name not in self.gradients:
            raise RefusalError(f"attack '{attack}' needs the gradient of '{name}', which this leak does not have")
        if not self.gradients[name].isfinite().all():
            raise RefusalError(f"the gradient of '{name}' holds NaN or infinity: nothing can be reconstructed from it")
        return self.gradients[name]


def on_cpu(leak: Leak) -> Leak:
    """Return the leak with its model and everything else it holds on the CPU; where all is there already, itself.

    Attacks by equations work there, in float64: what they make beside the leak is then where its own tensors are.
    """
    told = {name: getattr(leak, name) for name in ("labels", "mask", "source")}
    tensors = [*leak.gradients.values(), *leak.public, *(value for value in told.values() if value is not None)]
    tensors += [*leak.model.parameters(), *leak.model.buffers()]
    tensors += [value for pair in (leak.statistics or {}).values() for value in pair]
    if all(value.device.type == "cpu" for value in tensors):
        return leak
    statistics = leak.statistics and {name: tuple(v.cpu() for v in pair) for name, pair in leak.statistics.items()}
    return replace(
        leak,
        model=copy.deepcopy(leak.model).cpu(),
        gradients={name: value.cpu() for name, value in leak.gradients.items()},
        statistics=statistics,
        public=tuple(value.cpu() for value in leak.public),
        **{name: None if value is None else value.cpu() for name, value in told.items()},
    )


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns. images (B, C, H, W) in the model's normalised space, float32 or float64, not clamped, or
    token ids (B, n) int64, 0 where nothing was found; labels (B,) int64 the attack worked with or found, in the order
    of the images, None where it needs none; diagnostics: plain values that say how the attack went (`exact`: its
    equations determine the images); certificate: how far each value can be off by the attack's own equations, None
    where it predicts no errors; features (n, F): of images, by an attack that finds these and no pictures (B = 0), in
    the order of the labels."""

    images: Tensor
    diagnostics: dict = field(default_factory=dict)
    labels: Tensor | None = None
    certificate: Certificate | None = None
    features: Tensor | None = None


def vectorized(attack: Callable) -> Callable:
    """Let an attack written for several independent leaks also be called with one.

    attack(leaks, *, generator, **options) -> list of Reconstruction, with one generator per leak; called with a single
    Leak and a single generator it returns a single Reconstruction. Results do not depend on which leaks go together.
    """

    @wraps(attack)
    def call(leak: Leak | Sequence[Leak], *, generator, **options):
        if isinstance(leak, Leak):
            return attack([leak], generator=[generator], **options)[0]
        return attack(leak, generator=generator, **options)

    call.vectorized = True
    return call
