"""What gradient matching minimises: the distance between gradients plus priors on the images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from attacks.matching import priors
from attacks.matching.image_prior import ImagePrior
from attacks.matching.objectives import OBJECTIVES, pos_embed_cosine
from attacks.matching.options import MatchingOptions
from attacks.matching.problem import MatchingProblem
from attacks.threat_model.local_step import functional_gradient, multi_label, seeded, shared_gradient, training_loss
from models.jigsaw import shuffle_patches
from utils.errors import look_up

TV_FORMS = {
    "anisotropic": {"border": "none"},
    "padded": {"border": "zero"},
    "wang": {"inner_exp": 2.0, "outer_exp": 1.25, "border": "zero"},
    "isotropic": {"inner_exp": 2.0, "outer_exp": 0.5, "border": "zero"},
    "opponents": {"inner_exp": 2.0, "outer_exp": 0.5, "border": "zero", "double_opponents": True},
}
PRIORS = (
    "tv",
    "l2",
    "mean_square",
    "orthogonality",
    "features",
    "patch_prior",
    "batch_norm",
    "group",
    "epoch_order",
    "image_prior",
)


@dataclass(frozen=True)
class Phase:
    """Weights for one part of the run: of the objective, of APRIL's term and of the priors by name; 0 is left out."""

    objective: float
    pos_embed_cosine: float
    priors: dict[str, float]


def phases_of(options: MatchingOptions) -> dict[int, Phase]:
    """Return the phases of a run by the iteration at which they begin."""
    weights = {name: getattr(options, name) for name in PRIORS}
    if options.second_phase >= 1:
        return {0: Phase(options.objective_weight, options.pos_embed_cosine, weights)}
    return {
        0: Phase(options.objective_weight, options.pos_embed_cosine, weights | {"image_prior": 0.0}),
        int(options.second_phase * options.iterations): Phase(
            options.second_objective_weight, options.pos_embed_cosine, weights
        ),
    }


class ReconstructionLoss:
    """The function every problem minimises. It sees one problem of a MatchingProblem at a time, without the first axis.

    A candidate is images (B, C, H, W) in the model's normalised space with targets (B, classes). problem_data holds the
    problem's own part of `MatchingProblem.data`, and 'consensus' (B, C, H, W) for the group prior. With a source, the
    candidate is the picture before the shuffle; with a shuffled_mask it is the one after, and priors on neighbours do
    not look across the borders of those patches.
    """

    def __init__(self, problem: MatchingProblem, options: MatchingOptions):
        self.problem, self.model, self.names = problem, problem.model, problem.names
        self.parameters = dict(self.model.named_parameters())
        known = options.likelihood(problem.images.shape[1]) or look_up(OBJECTIVES, options.objective, "objective")
        weights = {} if options.layer_weights == "equal" else {"layer_weights": options.layer_weights}
        self.objective = partial(known, **weights)
        self.tv = partial(priors.total_variation, **look_up(TV_FORMS, options.tv_form, "tv_form"))
        self.task, self.epochs, self.image_prior = options.task, options.epochs, None
        if options.image_prior_checkpoint:
            self.image_prior = ImagePrior(options.image_prior_checkpoint, problem)

    def __call__(
        self,
        phase: Phase,
        images: Tensor,
        targets: Tensor,
        problem_data: dict[str, Tensor],
        gradient: Callable = functional_gradient,
    ) -> tuple[Tensor, Tensor]:
        """Return (what is minimised, the objective alone) of one candidate, both scalars."""
        problem = self.problem
        model_input, mask = self._inputs(images, problem_data)
        with seeded(problem.dropout_seed):
            candidate = shared_gradient(
                self.model,
                self.parameters,
                self.names,
                model_input,
                self._probabilities(targets),
                mask,
                problem.local,
                gradient,
                problem.aggregate,
            )
        distance = self.distance(phase, candidate, problem_data)
        total = phase.objective * distance + self.prior(phase, images, problem_data)
        if self.task:
            total = total + self.task * self.training_loss({}, images, targets, problem_data)
        return total, distance

    def training_loss(self, changed: dict[str, Tensor], images: Tensor, targets: Tensor, data: dict) -> Tensor:
        """Return the client's loss on a candidate, with some parameters `changed`; a scalar."""
        model_input, mask = self._inputs(images, data)
        with seeded(self.problem.dropout_seed):
            parameters = self.parameters | changed
            return training_loss(self.model, parameters, model_input, self._probabilities(targets), mask)

    def distance(self, phase: Phase, candidate: dict[str, Tensor], problem_data: dict[str, Tensor]) -> Tensor:
        """Return how far a candidate's gradient, by parameter name, is from the leaked one; a scalar."""
        target = {name: problem_data[f"target/{name}"] for name in self.names}
        known = {"target_square": problem_data["target_square"]} if "target_square" in problem_data else {}
        if f"weight/{self.names[0]}" in problem_data:  # those drawn for this iteration
            known["layer_weights"] = {name: problem_data[f"weight/{name}"] for name in self.names}
        distance = self.objective(candidate, target, **known)
        if phase.pos_embed_cosine:
            distance = distance + phase.pos_embed_cosine * pos_embed_cosine(candidate, target)
        return distance

    def prior(self, phase: Phase, images: Tensor, problem_data: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the priors that have a weight; a scalar."""
        total = images.new_zeros(())
        for name, weight in phase.priors.items():
            if weight:
                total = total + weight * getattr(self, f"_{name}")(images, problem_data)
        return total

    def _probabilities(self, targets: Tensor) -> Tensor:
        if not self.problem.joint:
            return targets
        return targets.sigmoid() if multi_label(self.model) else targets.softmax(dim=1)

    def _inputs(self, images: Tensor, data: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return what the client's model was fed if the candidate is true: shuffled pictures, and the mask it takes."""
        if "source" in data:
            images = shuffle_patches(images, data["source"], self.model.patch_size)
        return images, data.get("mask")

    def _forward(self, images: Tensor, data: dict[str, Tensor]) -> None:
        """Run the client's first pass on a candidate, for what hooks record of it."""
        model_input, mask = self._inputs(images, data)
        with seeded(self.problem.dropout_seed):
            self.model(model_input) if mask is None else self.model(model_input, mask)

    def _seams(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        if "shuffled_mask" not in data:
            return None
        return priors.shuffled_seams(data["shuffled_mask"].any(dim=0), self.model.grid, self.model.patch_size)

    def _tv(self, images: Tensor, data: dict) -> Tensor:
        return self.tv(images, seams=self._seams(data))

    def _l2(self, images: Tensor, data: dict) -> Tensor:
        return priors.l2_norm(images)

    def _mean_square(self, images: Tensor, data: dict) -> Tensor:
        return priors.mean_power(images)

    def _orthogonality(self, images: Tensor, data: dict) -> Tensor:
        return priors.orthogonality(images)

    def _patch_prior(self, images: Tensor, data: dict) -> Tensor:
        return priors.patch_border(images, patch_size=self.model.patch_size, seams=self._seams(data))

    def _group(self, images: Tensor, data: dict) -> Tensor:
        return priors.group(images, data["consensus"])

    def _epoch_order(self, images: Tensor, data: dict) -> Tensor:
        return priors.epoch_order(images, self.epochs)

    def _image_prior(self, images: Tensor, data: dict) -> Tensor:
        return self.image_prior(images)

    def _batch_norm(self, images: Tensor, data: dict) -> Tensor:
        with priors.BatchNormStatistics(self.model) as seen:
            self._forward(images, data)
            statistics = list(seen.values)
        targets = [(data[f"mean/{layer}"], data[f"variance/{layer}"]) for layer in seen.names]
        return priors.batch_norm_distance(statistics, targets)

    def _features(self, images: Tensor, data: dict) -> Tensor:
        with priors.LayerInputs(self.model, [self.problem.classifier]) as seen:
            self._forward(images, data)
            return priors.feature_distance(seen.values.pop(), data["features"])
