"""The victim's side: a private batch, what its model is shown, and the Leak that leaves the device."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attacks.matching.priors import BatchNormStatistics
from attacks.threat_model.leak import Aggregate, Leak, LocalSteps
from attacks.threat_model.local_step import (
    NOTHING,
    active_dropout,
    causal,
    classes_of,
    client_model,
    epoch_orders,
    frozen,
    multi_label,
    next_tokens,
    seeded,
    slice_of,
    training_loss,
)
from attacks.threat_model.terms import Terms
from attacks.threat_model.victim import ADVICE, blame, check_classifier, labels_of
from defenses.base import Defense, Step
from models.bottleneck import bottleneck_of
from models.jigsaw import Jigsaw, shuffle_inputs
from models.position import given_mask
from models.token_jigsaw import TokenJigsaw
from utils.errors import UserError, did_you_mean
from utils.seeds import derive_seed


@dataclass(frozen=True)
class PrivateBatch:
    """A batch no attack may see, as the client trains on it.

    images: (B, C, H, W) normalised, or token ids (B, n) of sentences. model_input: the same as the model sees it,
    after the defence on images and with shuffled patches. labels (B,). mask (1, N) bool: the patches that were masked;
    source (1, N): where each patch of the input came from. One mask serves a batch of images, as in MJP's training; of
    sentences, and of an aggregate, whose clients have one each, both are (B, N). targets (B, classes): the
    probabilities trained on, where a defence made them other than the labels. carried: the most bits of the images that
    what is shared can carry (defenses/capacity.py), infinite where that is not known.
    """

    images: Tensor
    model_input: Tensor
    labels: Tensor
    mask: Tensor
    source: Tensor
    targets: Tensor | None = None
    carried: float = math.inf


class Round(NamedTuple):
    """One client's round: the batch it keeps, what leaks of it, and the generator its attacker draws from."""

    private: PrivateBatch
    leak: Leak
    generator: torch.Generator


@dataclass(frozen=True)
class Aggregation:
    """How the rounds of several clients are added up before the server sees them. clients: how many, of batch_size
    images each; weights: of the clients, of any sum; None: each by its number of images (FedAvg; McMahan et al.,
    2017), so that the mean is that of a step on all images together. dropout: probability that a client drops out
    before the end of a round; the sum is then over those that are left (Bonawitz et al., CCS 2017)."""

    clients: int
    batch_size: int
    weights: tuple[float, ...] | None = None
    dropout: float = 0.0

    def left(self, number: int, generator: torch.Generator) -> list[int]:
        """Return the places of the images, of `number` in a round, whose clients stay until its end; maybe none."""
        stays = torch.rand(self.clients, generator=generator) >= self.dropout
        return [place for place in range(number) if stays[place // self.batch_size]]

    def of(self, number: int) -> Aggregate:
        """Return the clients behind `number` images: fewer where images end, the last one with what is left."""
        sizes = [min(self.batch_size, number - start) for start in range(0, number, self.batch_size)]
        weights = self.weights[: len(sizes)] if self.weights else sizes
        return Aggregate(tuple(sizes), tuple(weight / sum(weights) for weight in weights))


@dataclass(frozen=True)
class Client:
    """A client of federated learning with its model, its jigsaw and its defence; what happens in a round depends on the
    seed and on the index of its first image alone. terms: of its rounds, or their fields by name; classes:
    as of `labels_of`. local_shuffle: the images have an order of their own in every epoch of its
    local steps. label_flip: every image is trained on as the class after its own, as if a dishonest server had
    rotated the rows of the classifier (Inverting Gradients' label_flip). pretraining: (steps, rate) of plain SGD on the
    batch of each round, which its weights have behind them (the hybrid attack's second setting). together: fields of an
    `Aggregation` of this client with others like it, each with images of its own."""

    model: nn.Module
    jigsaw: Jigsaw | TokenJigsaw
    defense: Defense
    seed: int
    terms: Terms
    classes: Mapping[str, int] | Sequence[str]
    label_flip: bool = False
    local_shuffle: bool = False
    pretraining: tuple[int, float] | None = None
    together: tuple | None = None

    def __post_init__(self):
        if isinstance(self.terms, Mapping):
            object.__setattr__(self, "terms", Terms(**self.terms))
        self.defense.check(self.model)
        for key in ("statistics", "dropout_seed"):
            if self.aggregation is not None and getattr(self.terms, key) not in (None, False):
                raise UserError(f"an aggregate of several clients tells no {key}: each has its own")

    @property
    def aggregation(self) -> Aggregation | None:
        """Return how the rounds of several clients are added up, None for one alone."""
        return Aggregation(*self.together) if self.together else None

    def sizes(self, number: int) -> tuple[int, ...]:
        """Return how many images the clients behind a leak of `number` have each."""
        return self.aggregation.of(number).sizes if self.aggregation else (number,)

    def round(self, index: int, images: Tensor, folders: list[str]) -> Round:
        """Share what the step on images (B, C, H, W), normalised, leaks, or the mean over the clients' steps;
        folders: their folders, as in `classes`."""
        if len(self.sizes(len(images))) == 1:
            return self._own_round(index, images, folders)
        aggregate = self.aggregation.of(len(images))
        places = aggregate.slices
        return aggregated([self._own_round(index + s.start, images[s], folders[s]) for s in places], aggregate)

    def _own_round(self, index: int, images: Tensor, folders: list[str]) -> Round:
        noise, generator = (
            torch.Generator().manual_seed(derive_seed(self.seed, use, index)) for use in ("defense", "attack")
        )
        labels = labels_of(self.model, folders, images, self.classes).to(images.device)
        about = self.terms.scale | {"num_classes": classes_of(self.model, tuple(images.shape[1:]))}
        if self.label_flip and multi_label(self.model):
            raise UserError("--label_flip is of classes, and this model tells attributes: leave it out")
        if self.label_flip:
            labels = (labels + 1) % about["num_classes"]
        protected, targets = self.defense.images(images, labels, generator=noise, **about)
        private = prepare(self.model, images, labels, self.jigsaw, index, protected)
        if targets.dim() == 2:
            targets = targets.to(images)
            private = replace(private, targets=targets)
        seeds = {"noise_seed": derive_seed(self.seed, "bottleneck", index)}
        if self.local_shuffle:
            seeds["order_seed"] = derive_seed(self.seed, "order of local steps", index)
        model = pretrained(self.model, private, *self.pretraining) if self.pretraining else self.model
        carried = math.inf

        def defended(gradients: dict[str, Tensor], step: Step) -> dict[str, Tensor]:
            nonlocal carried
            if not self.terms.statistics and not self.pretraining:  # which no defence on gradients touches
                carried = self.defense.carries(gradients, len(images))
            return self.defense.gradients(gradients, step, generator=noise)

        leak = share(model, private, defended, **vars(self.terms), **seeds)
        return Round(replace(private, carried=carried), leak, generator)


def pretrained(model: nn.Module, private: PrivateBatch, steps: int, lr: float) -> nn.Module:
    """Return a copy of the model after plain SGD steps on the whole private batch, in evaluation mode."""
    local = LocalSteps(steps, lr, len(private.model_input))
    update = share(model, private, lambda gradients, step: gradients, False, local=local).gradients
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in update.items():
            model.get_parameter(name).sub_(steps * lr * value)
    return model


def aggregated(rounds: Sequence[Round], aggregate: Aggregate) -> Round:
    """Return what a server sees of the rounds of several clients under secure aggregation: one leak of all images. The
    attacker draws from the first one's generator."""
    privates, leaks = [one.private for one in rounds], [one.leak for one in rounds]
    gradients: dict[str, Tensor] = {}
    for leak, weight in zip(leaks, aggregate.weights, strict=True):
        for name, value in leak.gradients.items():
            gradients[name] = gradients[name] + weight * value if name in gradients else weight * value
    rows = [len(private.model_input) for private in privates]

    def each(values: list[Tensor]) -> Tensor:
        """Return the mask, or permutation, of every image (B, N)."""
        parts = [value.reshape(1, -1).expand(n, -1) for value, n in zip(values, rows, strict=True)]
        return torch.cat(parts)

    soft = privates[0].targets is not None
    private = PrivateBatch(
        images=torch.cat([private.images for private in privates]),
        model_input=torch.cat([private.model_input for private in privates]),
        labels=torch.cat([private.labels for private in privates]),
        mask=each([private.mask for private in privates]),
        source=each([private.source for private in privates]),
        targets=torch.cat([private.targets for private in privates]) if soft else None,
        carried=sum(private.carried for private in privates),
    )
    told = {
        name: each([getattr(leak, name) for leak in leaks])
        for name in ("mask", "source")
        if getattr(leaks[0], name) is not None
    }
    labels = None if leaks[0].labels is None else torch.cat([leak.labels for leak in leaks])
    size = len(private.model_input)
    leak = replace(leaks[0], gradients=gradients, batch_size=size, labels=labels, aggregate=aggregate, **told)
    return Round(private, leak, rounds[0].generator)


def prepare(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    jigsaw: Jigsaw | TokenJigsaw,
    index: int,
    protected: Tensor | None = None,
) -> PrivateBatch:
    """Apply the victim's jigsaw; mask and permutation are fixed by the jigsaw's seed and `index`. protected: what a
    defence has made of the images, if anything."""
    if isinstance(jigsaw, TokenJigsaw):  # sentences differ in length: each has a mask of its own
        mask, source = jigsaw.draw_for(range(index, index + len(images)), images.cpu())
    else:
        mask, source = jigsaw.draw_for([index])
    model_input = shuffle_inputs(images if protected is None else protected, source, model.patch_size)
    return PrivateBatch(images, model_input, labels.to(images.device), mask, source)


def share(
    model: nn.Module,
    private: PrivateBatch,
    defense: Callable[[dict[str, Tensor], Step], dict[str, Tensor]],
    reveal_labels: bool,
    *,
    noise_seed: int | None = None,
    order_seed: int | None = None,
    **others,
) -> Leak:
    """Return what a client shares in one round: the gradient of its mean cross-entropy, defended, and what else the
    server knows.

    Frozen parameters (requires_grad False) are not trained and not shared. The labels that are told are the targets of
    the step: probabilities (B, classes) where a defence mixed them. Models with an unknown position embedding hide the
    masked positions; others only see shuffled patches. reveal_labels and the others are the fields of `Terms`;
    noise_seed: fixes the draws of a variational bottleneck, of which the attacker only
    knows the model; order_seed: of the order of the images in every epoch of local steps, which nobody is told; None
    keeps theirs. defense: the hook on gradients of a defence.
    Raises UserError for training with dropout and no seed, for a batch too small for BatchNorm, for idle options, for
    models that are no classifier or of which nothing is trained, and with what the model itself raises in its step.
    """
    terms = Terms(reveal_labels=reveal_labels, **others)
    if len(frozen(model)) == len(list(model.parameters())):
        raise UserError(NOTHING)
    client = client_model(model, training=terms.training)
    if (bottleneck := bottleneck_of(client)) is not None:
        bottleneck.noise_seed = noise_seed
    if terms.training and terms.dropout_seed is None and (layer := active_dropout(client)):
        raise UserError(
            f"the victim trains with dropout in '{layer}': fix it with --dropout_seed, or drop it through model_options"
        )
    mask = given_mask(model, private.mask.to(private.model_input.device))
    classes = check_classifier(model, tuple(private.model_input.shape[1:]))
    targets = _targets(model, private, classes, terms.reveal_labels)
    mode = "training" if terms.training else "evaluation"
    with blame(model, f"in a step on {len(targets)} images in {mode} mode", ADVICE):
        ordered = order_seed is None or terms.local is None
        rows = slice(None) if ordered else epoch_orders(len(targets), terms.local, order_seed)
        gradients = _gradients(client, private.model_input[rows], targets[rows], mask, terms.local, terms.dropout_seed)
        layers = _statistics(client, private.model_input, mask, terms.dropout_seed) if terms.statistics else None
    for pattern in terms.withhold:
        if not any(fnmatch(name, pattern) for name in gradients):
            raise UserError(f"--withhold '{pattern}' names no shared gradient: {did_you_mean(pattern, gradients)}")
    loss_of = partial(training_loss, client) if terms.local is None else None
    step = Step(client, private.model_input, targets, mask, loss_of)
    shared = {
        name: value
        for name, value in defense(gradients, step).items()
        if not any(fnmatch(name, pattern) for pattern in terms.withhold)
    }
    batch_size, *image_shape = private.model_input.shape
    told_source = terms.attacker_knowledge == "permutation"
    told_mask = told_source or terms.attacker_knowledge == "mask"
    return Leak(
        model=model,
        gradients=shared,
        image_shape=tuple(image_shape),
        batch_size=batch_size,
        labels=(private.labels if private.targets is None else targets) if terms.reveal_labels else None,
        mean=tuple(terms.mean),
        std=tuple(terms.std),
        local=terms.local,
        training=terms.training,
        dropout_seed=terms.dropout_seed,
        statistics=layers,
        attacker_knowledge=terms.attacker_knowledge,
        mask=private.mask[0] if told_mask else None,
        source=private.source[0] if told_source else None,
    )


def _targets(model: nn.Module, private: PrivateBatch, classes: int, reveal_labels: bool) -> Tensor:
    """Return what a step trains on: probabilities (B, classes), attributes, or of a language model its next tokens
    (B, V, n - 1), which cannot be told as labels."""
    like = next(model.parameters())
    if causal(model):
        if reveal_labels:
            raise UserError("the labels of a language model are its sentence, told to nobody: set --labels hidden")
        return next_tokens(model, private.model_input)
    if private.targets is not None:
        return private.targets.to(like)
    if multi_label(model):
        return private.labels.expand(len(private.model_input), classes).to(like)
    return nn.functional.one_hot(private.labels, classes).to(like)


def _gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    local: LocalSteps | None,
    dropout_seed: int | None,
) -> dict[str, Tensor]:
    """Return the gradient, or its mean over local steps, of the parameters that are trained and that the loss reaches.

    It is taken as a real client takes it: backward() and SGD on the model's own parameters, which are put back.
    """
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    start, reached = {name: value.detach().clone() for name, value in own.items()}, {}

    def step(chosen: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        try:
            training_loss(model, {}, images[chosen], targets[chosen], mask).backward()
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError("BatchNorm cannot train on one value per channel: use a larger batch or image") from error
        return {name: value.grad for name, value in own.items() if value.grad is not None}

    with seeded(dropout_seed):
        if local is None:
            return step(list(range(len(images))))
        for k in range(local.steps):
            change = step(slice_of(k, len(images), local.batch_size))
            reached |= change
            with torch.no_grad():
                for name, value in change.items():
                    own[name].copy_(own[name] - local.lr * value)
    with torch.no_grad():
        mean = {name: (start[name] - own[name]) / (local.lr * local.steps) for name in own if name in reached}
        for name, value in own.items():
            value.copy_(start[name])
    return mean


@torch.no_grad()
def _statistics(
    model: nn.Module, images: Tensor, mask: Tensor | None, dropout_seed: int | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the (mean, biased variance) of what enters each BatchNorm layer, over the whole batch."""
    with BatchNormStatistics(model) as seen, seeded(dropout_seed):
        if not seen.layers:
            raise UserError("--share_statistics: the victim's model has no BatchNorm layer to share statistics of")
        model(*(images.clone(),) if mask is None else (images.clone(), mask))
    return dict(zip(seen.names, seen.values, strict=True))
