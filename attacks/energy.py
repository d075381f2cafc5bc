"""What an attack minimises, the distance between gradients plus priors on the images, and its derivative."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks import priors
from attacks.labels import classifier_of
from attacks.leak import Leak
from attacks.local_step import (
    autograd_gradient,
    classes_of,
    client_model,
    functional_gradient,
    seeded,
    shared_gradient,
    training_loss,
)
from attacks.objectives import OBJECTIVES, pos_embed_cosine
from models.checkpoints import load_model
from models.jigsaw import shuffle_patches
from utils.errors import UserError, look_up

TV_FORMS = {
    "anisotropic": {"border": "none"},
    "padded": {"border": "zero"},
    "isotropic": {"inner_exp": 2.0, "outer_exp": 0.5, "border": "zero"},
    "opponents": {"inner_exp": 2.0, "outer_exp": 0.5, "border": "zero", "double_opponents": True},
}
PRECISIONS = ("highest", "high", "medium", "bf16")


@dataclass(frozen=True)
class Phase:
    """Weights for one part of the run: of the objective, of APRIL's term and of the priors by name; 0 is left out."""

    objective: float
    pos_embed_cosine: float
    priors: dict[str, float]


class Energy:
    """The function every problem minimises, for one model and one kind of client step.

    names: the tensors compared. A candidate is images (B, C, H, W) in the model's normalised space with targets
    (B, classes): probabilities, or with `joint` their logits. `given` holds what differs between problems:
    'target/NAME' leaked gradients; where known 'target_square' (), the target's squared length, 'mask' (1, N), 'source'
    (1, N), 'holes' (1, N) and a BatchNorm layer's shared statistics 'mean/LAYER' and 'variance/LAYER' (C,); for their
    priors 'consensus' (B, C, H, W) and 'features' (B, F). With a source, the candidate is the picture before the
    shuffle; with holes it is the one after, and priors on neighbours do not look across the borders of those patches.
    """

    def __init__(
        self,
        leak: Leak,
        names: Sequence[str],
        like: Tensor,
        *,
        objective: str | Callable[..., Tensor],
        layer_weights: str,
        tv_form: str,
        joint: bool,
        image_prior_checkpoint: str,
        finite_difference: float,
        precision: str,
    ):
        if like.dtype == torch.float64 and precision != "highest":
            raise UserError(f"precision '{precision}' is of float32 arithmetic: leave it out in float64")
        self.model = client_model(leak.model, training=leak.training, dtype=like.dtype).requires_grad_()
        self.parameters = dict(self.model.named_parameters())
        self.dropout_seed = leak.dropout_seed if leak.training else None
        self.names, self.leak, self.joint, self.precision = tuple(names), leak, joint, precision
        options = {} if layer_weights == "equal" else {"layer_weights": layer_weights}
        known = objective if callable(objective) else look_up(OBJECTIVES, objective, "objective")
        self.distance = partial(known, **options)
        self.tv = partial(priors.total_variation, **look_up(TV_FORMS, tv_form, "tv_form"))
        self.image_prior = ImagePrior(image_prior_checkpoint, leak, like) if image_prior_checkpoint else None
        self.finite_difference = finite_difference
        self.length = _length(self.parameters[name].detach() for name in names)
        if finite_difference and leak.local is not None:
            raise UserError("finite_difference works on single gradients, not on updates of several local steps")
        self.classes = classes_of(leak.model, leak.image_shape)

    def value(
        self, phase: Phase, images: Tensor, targets: Tensor, given: dict[str, Tensor], gradient=functional_gradient
    ) -> tuple[Tensor, Tensor]:
        """(what is minimised, the objective alone) of one candidate, both scalars."""
        shown, *mask = self._inputs(images, given)
        soft = targets.softmax(dim=1) if self.joint else targets
        with seeded(self.dropout_seed):
            candidate = shared_gradient(
                self.model, self.parameters, self.names, shown, soft, *mask or [None], self.leak.local, gradient
            )
        distance = self._distance(phase, candidate, given)
        return phase.objective * distance + self._priors(phase, images, given), distance

    def derivative(self, phase: Phase, problems: int, *, chunk: int, compile: bool) -> Callable:  # noqa: A002
        """(images (V, B, C, H, W), targets (V, B, classes), given) -> ([d/d images, and d/d targets if joint], values
        (V,), objectives alone (V,)), for V independent problems: vectorised, or one after the other where chunk is 1,
        where dropout is drawn anew from its seed, and in bf16, which vectorised normalisation layers do not take."""
        exact = self._derivative(phase, problems, chunk, compile and not self.finite_difference, difference=False)
        if not self.finite_difference:
            return exact
        return Checked(self._derivative(phase, problems, chunk, compile, difference=True), exact)

    def _derivative(self, phase: Phase, problems: int, chunk: int, compile: bool, *, difference: bool):  # noqa: A002
        together = problems > 1 and chunk != 1 and self.dropout_seed is None and self.precision != "bf16"
        where = (0, 1) if self.joint else (0,)
        if not (difference or together or compile):
            return self._with_precision(partial(self._in_turn, partial(self._by_autograd, phase, where)))
        functional = grad_and_value(partial(self.value, phase), argnums=where, has_aux=True)
        one = partial(self._difference, phase, where) if difference else functional
        several = vmap(one, chunk_size=chunk or None) if together else one
        several = compiled(several) if compile and self.dropout_seed is None else several
        many = several if together else partial(self._in_turn, several)
        return torch.no_grad()(self._with_precision(many, fused_attention=difference and not together))

    def _inputs(self, images: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the client's model was fed if the candidate is true: shuffled pictures, and the mask if it takes one."""
        shown = shuffle_patches(images, given["source"], self.leak.model.patch_size) if "source" in given else images
        return (shown, given["mask"]) if "mask" in given else (shown,)

    def _forward(self, images: Tensor, given: dict[str, Tensor]) -> Tensor:
        """The logits of a candidate, as the client's first pass would give them."""
        with seeded(self.dropout_seed):
            return self.model(*self._inputs(images, given))

    @cached_property
    def classifier(self) -> str:
        """Name of the layer whose input the feature prior compares."""
        return classifier_of(self.leak.model, self.leak.image_shape)

    def _distance(self, phase: Phase, candidate: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
        target = {name: given[f"target/{name}"] for name in self.names}
        known = {"target_square": given["target_square"]} if "target_square" in given else {}
        distance = self.distance(candidate, target, **known)
        if phase.pos_embed_cosine:
            distance = distance + phase.pos_embed_cosine * pos_embed_cosine(candidate, target)
        return distance

    def _priors(self, phase: Phase, images: Tensor, given: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the priors that have a weight."""
        total = images.new_zeros(())
        for name, weight in phase.priors.items():
            if weight:
                total = total + weight * getattr(self, f"_{name}")(images, given)
        return total

    def _seams(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        if "holes" not in given:
            return None
        return priors.shuffled_seams(given["holes"][0], self.leak.model.grid, self.leak.model.patch_size)

    def _tv(self, images: Tensor, given: dict) -> Tensor:
        return self.tv(images, seams=self._seams(given))

    def _l2(self, images: Tensor, given: dict) -> Tensor:
        return priors.l2_norm(images)

    def _mean_square(self, images: Tensor, given: dict) -> Tensor:
        return priors.mean_power(images)

    def _orthogonality(self, images: Tensor, given: dict) -> Tensor:
        return priors.orthogonality(images)

    def _patch_prior(self, images: Tensor, given: dict) -> Tensor:
        return priors.patch_border(images, patch_size=self.leak.model.patch_size, seams=self._seams(given))

    def _group(self, images: Tensor, given: dict) -> Tensor:
        return priors.group(images, given["consensus"])

    def _image_prior(self, images: Tensor, given: dict) -> Tensor:
        if self.image_prior is None:
            raise UserError(
                "the image prior needs a CNN with BatchNorm: pass its file as image_prior_checkpoint, or image_prior 0"
            )
        return self.image_prior(images)

    def _batch_norm(self, images: Tensor, given: dict) -> Tensor:
        with priors.BatchNormStatistics(self.model) as seen:
            if not seen.layers:
                raise UserError("the batch_norm prior needs a victim with BatchNorm layers: set batch_norm to 0")
            self._forward(images, given)
            statistics = list(seen.values)
        if self.leak.statistics is not None:
            targets = [(given[f"mean/{name}"], given[f"variance/{name}"]) for name in seen.names]
        else:
            kept = priors.running_statistics(self.leak.model, seen.names)
            targets = [tuple(part.to(images) for part in parts) for parts in kept]
        return priors.batch_norm_distance(statistics, targets)

    def _features(self, images: Tensor, given: dict) -> Tensor:
        with priors.LayerInputs(self.model, [self.classifier]) as seen:
            self._forward(images, given)
            return priors.feature_distance(seen.values.pop(), given["features"])

    def _difference(self, phase: Phase, where: tuple[int, ...], images: Tensor, targets: Tensor, given: dict) -> tuple:
        """`grad_and_value` of `value` without a second derivative (Pearlmutter, 1994, one-sided).

        d/dx <v, dL/dtheta> is the change of dL/dx when theta moves along v = d objective / d gradient, here by
        `finite_difference` of its own length. Attention may then run fused, which has no second derivative.
        """

        def loss(parameters: dict, images: Tensor, targets: Tensor) -> Tensor:
            shown, *mask = self._inputs(images, given)
            soft = targets.softmax(dim=1) if self.joint else targets
            with seeded(self.dropout_seed):
                return training_loss(self.model, self.parameters | parameters, shown, soft, *mask or [None])

        wanted = {name: self.parameters[name] for name in self.names}
        places = tuple(place + 1 for place in where)
        candidate, *here = grad(loss, argnums=(0, *places))(wanted, images, targets)
        along, distance = grad_and_value(partial(self._distance, phase))(candidate, given)
        step = self.finite_difference * self.length / _length(along.values()).clamp_min(1e-12)
        moved = {name: value + step * along[name] for name, value in wanted.items()}
        there = grad(loss, argnums=places)(moved, images, targets)
        of_priors, prior = grad_and_value(partial(self._priors, phase))(images, given)
        gradients = [phase.objective * (b - a) / step for a, b in zip(here, there, strict=True)]
        gradients[0] = gradients[0] + of_priors
        return tuple(gradients), (phase.objective * distance + prior, distance)

    def _by_autograd(self, phase: Phase, where: tuple[int, ...], *candidate) -> tuple:
        """`grad_and_value` of `value` by plain autograd."""
        candidate = [part.detach().requires_grad_() if k in where else part for k, part in enumerate(candidate)]
        total, distance = self.value(phase, *candidate, gradient=autograd_gradient)
        return torch.autograd.grad(total, [candidate[k] for k in where]), (total.detach(), distance.detach())

    def _in_turn(self, one: Callable, images: Tensor, targets: Tensor, given: dict[str, Tensor]) -> tuple:
        """The function of one problem for each of several."""
        results = []
        for k in range(len(images)):
            results.append(one(images[k], targets[k], {name: value[k] for name, value in given.items()}))
        gradients, values = zip(*results, strict=True)
        return tuple(map(torch.stack, zip(*gradients, strict=True))), tuple(map(torch.stack, zip(*values, strict=True)))

    def _with_precision(self, function: Callable, *, fused_attention: bool = False) -> Callable:
        """Run `function` at the precision of matrix products asked for, with attention that has a second derivative
        and can be vectorised, which the fused kernels cannot."""
        device = next(iter(self.parameters.values())).device.type

        def call(*arguments):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest" if self.precision == "bf16" else self.precision)
            try:
                with (
                    nullcontext() if fused_attention else sdpa_kernel(SDPBackend.MATH),
                    torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"),
                ):
                    gradients, (total, distance) = function(*arguments)
            finally:
                torch.set_float32_matmul_precision(before)
            return gradients, total.detach(), distance.detach()

        return call


def compiled(function: Callable) -> Callable:
    """A function like Energy's derivatives as one graph, traced and compiled at its first call, for those shapes only.

    Traced by running it, whose record has no Python left in it: hooks in a network (the priors that look into one) are
    no obstacle, and every derivative has a graph of its own, where torch.compile on the function itself would share
    one cache of eight entries among all attacks of a process. Small graphs on a processor are called from C++: from
    Python, the calls are a seventh of a LeNet's time. Raises what the compiler raises; nothing falls back.
    """
    graphs = []

    def call(images: Tensor, targets: Tensor, given: dict[str, Tensor]) -> tuple:
        def flat(images: Tensor, targets: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            gradients, values = function(images, targets, dict(zip(given, values, strict=True)))
            return *gradients, *values

        inputs = images, targets, *given.values()
        if not graphs:
            graph = make_fx(flat)(*inputs)
            small = images.device.type == "cpu" and len(graph.graph.nodes) < 1000
            graphs.append(torch.compile(graph, dynamic=False, options={"cpp_wrapper": small}))
        *gradients, total, distance = graphs[0](*inputs)
        return tuple(gradients), (total, distance)

    return call


class Checked:
    """A derivative by finite differences that is compared with the exact one at every CHECK_EVERY-th call.

    Where the cosine of the two, by the images of a problem, falls below LEAST, that problem goes on exactly. lowest
    (V,): the smallest cosine of every problem so far.
    """

    CHECK_EVERY, LEAST = 100, 0.99

    def __init__(self, quick: Callable, exact: Callable):
        self.quick, self.exact, self.calls = quick, exact, 0
        self.lowest, self.some_failed = torch.ones(()), False

    def __call__(self, images: Tensor, targets: Tensor, given: dict[str, Tensor]) -> tuple:
        quick = self.quick(images, targets, given)
        check = self.calls % self.CHECK_EVERY == 0
        self.calls += 1
        if not (check or self.some_failed):
            return quick
        exact = self.exact(images, targets, given)
        if check:
            ours, theirs = (found[0][0].flatten(1) for found in (quick, exact))
            cosine = torch.nn.functional.cosine_similarity(ours, theirs).nan_to_num(-1.0)
            self.lowest = torch.minimum(self.lowest.to(cosine), cosine)
            self.some_failed = bool((self.lowest < self.LEAST).any())
        failed = self.lowest < self.LEAST
        pairs = zip(quick[0], exact[0], strict=True)
        return tuple(torch.where(failed.view(-1, *[1] * (a.ndim - 1)), b, a) for a, b in pairs), *quick[1:]


def _length(values: Iterable[Tensor]) -> Tensor:
    """Euclidean length of all values together."""
    return torch.stack([value.square().sum() for value in values]).sum().sqrt()


class ImagePrior:
    """What a CNN trained on photographs expects: BatchNorm statistics of the candidates against its running ones.

    The mean squared difference of means and of variances, summed over its layers (GradViT); images (B, C, H, W) in the
    victim's normalised space are turned into the network's own.
    """

    def __init__(self, checkpoint: str, leak: Leak, like: Tensor):
        self.model = load_model(checkpoint).to(like).requires_grad_(False).eval()
        own = self.model.normalize or {"mean": leak.mean, "std": leak.std}
        self.mean, self.std, self.own_mean, self.own_std = (
            torch.tensor(value, dtype=torch.float64).to(like).view(-1, 1, 1)
            for value in (leak.mean, leak.std, own["mean"], own["std"])
        )
        if not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in self.model.modules()):
            raise UserError(
                f"image_prior_checkpoint '{checkpoint}' has no BatchNorm layers: use a CNN such as ResNet-50"
            )
        try:
            self(self.mean.new_zeros(1, *leak.image_shape))
        except RuntimeError as error:
            size = "x".join(map(str, leak.image_shape))
            raise UserError(f"image_prior_checkpoint '{checkpoint}' cannot read {size} images") from error

    def __call__(self, images: Tensor) -> Tensor:
        pixels = images * self.std + self.mean
        with priors.BatchNormStatistics(self.model) as seen:
            self.model((pixels - self.own_mean) / self.own_std)
            statistics = list(seen.values)
        targets = priors.running_statistics(self.model, seen.names)
        return priors.batch_norm_distance(statistics, targets, first_scale=1.0, form="mse")
