"""From leaks to the problem that gradient matching works on: the one place where matching reads a leak."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.label_recovery import classifier_gradients, classifier_of, first_labels
from attacks.matching.initialization import first_images, solved_images
from attacks.matching.objectives import COSINES, drawn_at_once, select, squared_length
from attacks.matching.options import MatchingOptions
from attacks.matching.priors import BatchNormStatistics, feature_targets, running_statistics
from attacks.threat_model.knowledge import known_mask, pixel_bounds
from attacks.threat_model.leak import Aggregate, Leak, LocalSteps
from attacks.threat_model.local_step import classes_of, client_model
from utils.errors import UserError


@dataclass(frozen=True)
class MatchingProblem:
    """V independent problems, victims times restarts, of one model and one kind of client step.

    model: a copy in the client's mode. names: the parameters whose gradients are compared. local, dropout_seed,
    aggregate: how the client, or clients, stepped (attacks/threat_model/leak.py). mean, std: of the model's input.
    data: what differs between problems, each (V, ...): 'target/NAME' leaked gradients; where known 'target_square'
    (V,), the targets' squared lengths, 'mask', 'source', 'shuffled_mask' (V, 1, N), or (V, B, N) of aggregates
    (attacks/matching/initialization.py); for their priors 'mean/LAYER' and 'variance/LAYER' (V, C) of BatchNorm layers,
    and 'features' (V, B, F).
    images (V, B, C, H, W), targets (V, B, classes): first candidates; joint: the targets are logits that are optimised
    together with the images, else they are probabilities. low, high (C, 1, 1): normalised black and white.
    restarts: problems of each victim, side by side in V. generators: one for each victim.
    known: for each victim, what the diagnostics say of its leak.
    """

    model: nn.Module
    names: tuple[str, ...]
    local: LocalSteps | None
    dropout_seed: int | None
    aggregate: Aggregate | None
    mean: Sequence[float]
    std: Sequence[float]
    data: dict[str, Tensor]
    images: Tensor
    targets: Tensor
    joint: bool
    low: Tensor
    high: Tensor
    classifier: str
    restarts: int
    generators: Sequence[torch.Generator]
    known: list[dict]


def kind_of(leak: Leak, layers: str) -> tuple:
    """Return what leaks must share to be one vectorised problem."""
    shapes = leak.model, leak.image_shape, leak.batch_size, select(leak.gradients, layers), leak.mean, leak.std
    step = leak.local, leak.training, leak.dropout_seed, leak.aggregate
    return shapes, step, leak.labels is None, leak.statistics is None, sorted(known_mask(leak))


def check_likelihood(leak: Leak, objective: str) -> None:
    """Raise UserError for the likelihood of a defence where several clients were defended apart."""
    if objective == "likelihood" and leak.aggregate is not None:
        raise UserError(
            "the likelihood is that of one client's defence, and this leak is the mean over several clients: use "
            "another objective"
        )


def build_problem(
    leaks: Sequence[Leak], options: MatchingOptions, generators: Sequence[torch.Generator]
) -> MatchingProblem:
    """Return the problem behind leaks of one kind (`kind_of`). Raises UserError where a leak lacks what options ask."""
    first, restarts = leaks[0], options.restarts
    dtype = torch.float64 if options.double else next(iter(first.gradients.values())).dtype
    device = next(iter(first.gradients.values())).device
    if dtype == torch.float64 and options.precision != "highest":
        raise UserError(f"precision '{options.precision}' is of float32 arithmetic: leave it out in float64")
    model = client_model(first.model, training=first.training, dtype=dtype)
    for name, value in model.named_parameters():  # frozen ones take no part in a client's local steps
        value.requires_grad_(value.requires_grad or name in first.gradients)
    like = torch.zeros((), dtype=dtype, device=device)
    joint = options.labels == "joint" and first.labels is None
    check_likelihood(first, options.objective)
    names = tuple(select(first.gradients, options.layers))
    images = _first_images(leaks, options, generators)  # before the labels: both draw from the generators
    targets = _first_targets(leaks, options, generators)
    data = _problem_data(leaks, names, options, joint, targets[::restarts])
    data = {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in data.items()}
    if options.objective in COSINES and not drawn_at_once(options.layers):
        each = [{name: data[f"target/{name}"][victim] for name in names} for victim in range(len(leaks))]
        data["target_square"] = torch.stack([squared_length(target, options.layer_weights) for target in each])
    low, high = pixel_bounds(first, like)
    return MatchingProblem(
        model=model,
        names=names,
        local=first.local,
        dropout_seed=first.dropout_seed if first.training else None,
        aggregate=first.aggregate,
        mean=first.mean,
        std=first.std,
        data={key: value.repeat_interleave(restarts, dim=0) for key, value in data.items()},
        images=images.to(like),
        targets=targets.to(like),
        joint=joint,
        low=low,
        high=high,
        classifier=classifier_of(first.model, first.image_shape) if options.features else "",
        restarts=restarts,
        generators=generators,
        known=[_known(leak) for leak in leaks],
    )


def _first_images(leaks: Sequence[Leak], options: MatchingOptions, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the first candidates (V, B, C, H, W), the restarts of a victim side by side."""
    pairs = zip(leaks, generators, strict=True)
    if options.init != "closed_form":
        return torch.cat([first_images(leak, options.init, options.restarts, own) for leak, own in pairs])
    likelihood = options.likelihood(leaks[0].batch_size)
    spreads = [likelihood.spread(leak.gradients) if likelihood else {} for leak in leaks]
    return torch.cat(
        [
            solved_images(leak, options.restarts, spread, options.smoothness, own)
            for (leak, own), spread in zip(pairs, spreads, strict=True)
        ]
    )


def _first_targets(leaks: Sequence[Leak], options: MatchingOptions, generators: Sequence[torch.Generator]) -> Tensor:
    """Return the probabilities, or logits, that stand for the labels at first, (V, B, classes)."""
    classes = classes_of(leaks[0].model, leaks[0].image_shape)
    pairs = zip(leaks, generators, strict=True)
    return torch.cat([first_labels(leak, options.labels, classes, options.restarts, own) for leak, own in pairs])


def _problem_data(
    leaks: Sequence[Leak], names: Sequence[str], options: MatchingOptions, joint: bool, targets: Tensor
) -> dict[str, Tensor]:
    """Return what differs between the victims (see MatchingProblem), each with the victims in front."""
    data = {f"target/{name}": [leak.gradient(name, "gradient matching") for leak in leaks] for name in names}
    puzzles = [known_mask(leak) for leak in leaks]
    data |= {key: [puzzle[key] for puzzle in puzzles] for key in puzzles[0]}
    if options.batch_norm:
        for layer, moments in _batch_norm_moments(leaks).items():
            data |= dict(zip((f"mean/{layer}", f"variance/{layer}"), zip(*moments, strict=True), strict=True))
    if options.features and joint:
        raise UserError("the feature prior needs labels to start with: use another rule than 'joint', or features 0")
    if options.features:
        found = zip(leaks, targets.argmax(dim=2), strict=True)
        data["features"] = [feature_targets(*classifier_gradients(leak)[1:], labels) for leak, labels in found]
    return {key: torch.stack(tuple(values)) for key, values in data.items()}


def _batch_norm_moments(leaks: Sequence[Leak]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return by BatchNorm layer the (mean, variance) of every victim: those it shared, else those its model keeps."""
    layers = BatchNormStatistics(leaks[0].model).layers
    if not layers:
        raise UserError("the batch_norm prior needs a victim with BatchNorm layers: set batch_norm to 0")
    if leaks[0].statistics is not None:
        return {layer: [leak.statistics[layer] for leak in leaks] for layer in leaks[0].statistics}
    kept = running_statistics(leaks[0].model, layers)
    return {layer: [moments] * len(leaks) for layer, moments in zip(layers, kept, strict=True)}


def _known(leak: Leak) -> dict:
    """Return what the diagnostics say of a leak: the length of its gradient and where the mask is known from."""
    told = "inferred" if leak.mask is None else "told"
    length = float(torch.stack([value.norm() for value in leak.gradients.values()]).norm())
    return {"gradient_norm": length, "mask": told if "mask" in known_mask(leak) else "none"}
