"""The one optimisation loop: find images whose gradient is the leaked one.

Every gradient-matching attack is this loop with its paper's options (dlg.py, inverting_gradients.py, ...). Independent
problems, that is victims times restarts, are one tensor (V, B, C, H, W) and one vectorised derivative; no problem sees
another, so a victim's result does not depend on its company. The truth takes no part in any decision.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attacks.energy import PRECISIONS, Energy, Phase
from attacks.labels import classifier_gradients
from attacks.leak import Leak, Reconstruction, vectorized
from attacks.likelihood import Likelihood
from attacks.objectives import COSINES, SCHEMES, select, squared_length
from attacks.optimizers import OPTIMIZERS, SCHEDULES, SIGNS, Stepper
from attacks.priors import consensus, feature_targets, median_filter
from attacks.solved_start import solved_images
from attacks.start import first_images, first_labels, known_puzzle, pixel_box
from utils.errors import UserError, look_up

Watch = Callable[[int, int, Callable[[], tuple[Tensor, Tensor]]], None]


@vectorized
def match(
    leaks: Sequence[Leak],
    *,
    generator: Sequence[torch.Generator],
    watch: Watch | None = None,
    objective: str = "cosine",
    objective_weight: float = 1.0,
    layers: str = "all",
    layer_weights: str = "equal",
    pos_embed_cosine: float = 0.0,
    defense: str = "",
    defense_options: dict | None = None,
    softness: float = 0.3,
    smoothness: float = 10.0,
    tv: float = 0.0,
    tv_form: str = "anisotropic",
    l2: float = 0.0,
    mean_square: float = 0.0,
    orthogonality: float = 0.0,
    patch_prior: float = 0.0,
    batch_norm: float = 0.0,
    features: float = 0.0,
    group: float = 0.0,
    image_prior: float = 0.0,
    image_prior_checkpoint: str = "",
    second_phase: float = 1.0,
    second_objective_weight: float = 1.0,
    labels: str = "bias_corrected",
    init: str = "randn",
    iterations: int = 4800,
    optimizer: str = "adam",
    lr: float = 0.1,
    schedule: str = "constant",
    warmup: int = 0,
    signed: str = "none",
    boxed: bool = True,
    clip: float = 0.0,
    langevin: float = 0.0,
    median_every: int = 0,
    restarts: int = 1,
    stop_below: float = 0.0,
    double: bool = False,
    precision: str = "highest",
    finite_difference: float = 0.0,
    compile: bool = False,  # noqa: A002
    chunk: int = 0,
) -> list[Reconstruction]:
    """Reconstruct the batch behind each leak by matching gradients. Leaks of one model and one kind of step are one
    vectorised problem; others are attacked in turn.

    Minimised, per problem: objective_weight * objective (attacks/objectives.py; `layers` chooses tensors, layer_weights
    how they count) + pos_embed_cosine * APRIL's term + the priors of attacks/priors.py by their weights: tv (tv_form
    anisotropic, padded, isotropic or opponents), l2, mean_square, orthogonality, patch_prior, batch_norm, features,
    group (distance to the mean of a victim's restarts), image_prior (BatchNorm statistics of the network in
    image_prior_checkpoint). With second_phase < 1 the image prior only sets in after that share of the iterations, and
    the objective is weighted by second_objective_weight from then on.
    The objective 'likelihood' is that of the `defense` the attacker knows, with its defense_options and `softness`
    (attacks/likelihood.py).

    labels: the rule (attacks/labels.py) where the leak does not tell, or 'joint': optimised with the images.
    init: attacks/start.py, or 'closed_form' with its `smoothness` (attacks/solved_start.py). optimizer, lr, schedule,
    warmup, clip, langevin, signed: attacks/optimizers.py. boxed: project on valid pixels after each step; median_every:
    iterations between 3 x 3 median filters, 0 is off.
    restarts: starts per victim; the lowest objective wins, priors not counted. stop_below: a victim is done once one of
    its restarts has reached this objective, looked at every 10 iterations; 0 is off.

    double: float64. precision: of float32 matrix products (highest, high, medium), or bf16 autocast. finite_difference:
    step of a one-sided difference in place of the second derivative, relative to the length of the parameters (3e-6
    suits float32); 0 is exact. Every 100 iterations it is compared with the exact derivative, and problems in which it
    is off go on exactly. compile: torch.compile the derivative, minutes for a ViT; with dropout it stays uncompiled.
    chunk: problems differentiated at once, 0 is all; bf16 and dropout take one at a time.
    watch(iteration, iterations, snapshot) is called every iteration; snapshot() -> (best images so far (victims, B, C,
    H, W), their objectives (victims,)). It is not called where leaks are attacked in turn.

    diagnostics: objective, restart (the chosen one), diverged (restarts that left the finite numbers), iterations,
    gradient_norm, mask ('inferred', 'told' or 'none'); with finite_difference also difference_cosine, the lowest cosine
    with the exact derivative that was seen (below 0.99: exact from there on). Raises UserError for leaks it cannot
    match, unknown names and options that do not go together.
    """
    options = {key: value for key, value in locals().items() if key not in ("leaks", "generator", "watch")}
    for name, known, what in (
        (optimizer, OPTIMIZERS, "optimizer"),
        (schedule, SCHEDULES, "schedule"),
        (layer_weights, SCHEMES, "layer_weights"),
        (signed, dict.fromkeys(SIGNS), "value of 'signed'"),
        (precision, dict.fromkeys(PRECISIONS), "precision"),
    ):
        look_up(known, name, what)
    if restarts < 1 or iterations < 0:
        raise UserError(f"restarts must be at least 1 and iterations at least 0, got {restarts} and {iterations}")
    if group and restarts < 2:
        raise UserError("the group prior compares restarts: set restarts to 2 or more, or group to 0")
    if image_prior and not image_prior_checkpoint:
        raise UserError("the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint, or image_prior 0")
    first = leaks[0]
    if not all(leak.gradients for leak in leaks):
        raise UserError("gradient matching needs at least one gradient: everything is withheld from this leak")
    if any(_kind(leak, layers) != _kind(first, layers) for leak in leaks):
        return [match(leak, generator=own, **options) for leak, own in zip(leaks, generator, strict=True)]
    likely = None
    if objective == "likelihood":
        if layers != "all" or layer_weights != "equal":
            raise UserError("the likelihood is of all that was shared: leave layers at 'all', layer_weights at 'equal'")
        likely = Likelihood(defense, defense_options, batch_size=first.batch_size, softness=softness)
    elif defense:
        raise UserError(f"attack_options.defense is used with objective 'likelihood', not with '{objective}'")
    like = first.gradients[next(iter(first.gradients))].new_zeros((), dtype=torch.float64 if double else None)
    names = select(first.gradients, layers)
    energy = Energy(
        first,
        names,
        like,
        objective=likely or objective,
        layer_weights=layer_weights,
        tv_form=tv_form,
        joint=labels == "joint" and first.labels is None,
        image_prior_checkpoint=image_prior_checkpoint,
        finite_difference=finite_difference,
        precision=precision,
    )
    priors = {"tv": tv, "l2": l2, "mean_square": mean_square, "orthogonality": orthogonality, "features": features}
    priors |= {"patch_prior": patch_prior, "batch_norm": batch_norm, "group": group, "image_prior": image_prior}
    phases = {0: Phase(objective_weight, pos_embed_cosine, priors)}
    if second_phase < 1:
        phases[0] = Phase(objective_weight, pos_embed_cosine, priors | {"image_prior": 0.0})
        phases[int(second_phase * iterations)] = Phase(second_objective_weight, pos_embed_cosine, priors)

    pairs = list(zip(leaks, generator, strict=True))
    starts = [
        solved_images(leak, restarts, likely.spread(leak.gradients) if likely else {}, smoothness, own)
        if init == "closed_form"
        else first_images(leak, init, restarts, own)
        for leak, own in pairs
    ]
    images = torch.cat(starts).to(like)
    targets = torch.cat([first_labels(leak, labels, energy.classes, restarts, own) for leak, own in pairs]).to(like)
    given = {f"target/{name}": [leak.gradient(name, "gradient matching") for leak in leaks] for name in names}
    puzzles = [known_puzzle(leak) for leak in leaks]
    given |= {key: [puzzle[key] for puzzle in puzzles] for key in puzzles[0]}
    if batch_norm and first.statistics is not None:
        for name in first.statistics:
            moments = zip(*(leak.statistics[name] for leak in leaks), strict=True)
            given |= dict(zip((f"mean/{name}", f"variance/{name}"), moments, strict=True))
    if features and energy.joint:
        raise UserError("the feature prior needs labels to start with: use another rule than 'joint', or features 0")
    if features:
        found = zip(leaks, targets[::restarts].argmax(dim=2), strict=True)
        given["features"] = [feature_targets(*classifier_gradients(leak)[1:], own) for leak, own in found]
    given = {key: torch.stack(values).to(like.device) for key, values in given.items()}
    given = {key: value.to(like) if value.is_floating_point() else value for key, value in given.items()}
    if objective in COSINES:
        each = [{name: given[f"target/{name}"][k] for name in names} for k in range(len(leaks))]
        given["target_square"] = torch.stack([squared_length(target, layer_weights) for target in each])
    given = {key: value.repeat_interleave(restarts, dim=0) for key, value in given.items()}

    variables = [images, targets] if energy.joint else [images]
    stepper = Stepper(
        variables,
        optimizer=optimizer,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        iterations=iterations,
        langevin=langevin,
        clip=clip,
        signed=signed,
        generators=generator,
    )
    best, derivatives = Best(images, targets, restarts, iterations), []
    low, high = pixel_box(first, like)
    if boxed:  # spread out, which clamps quicker
        low, high = (bound.expand(first.image_shape).contiguous() for bound in (low, high))
    for iteration in range(iterations + 1):  # the last one only judges where the last step has led
        if iteration in phases:
            derivative = energy.derivative(phases[iteration], len(images), chunk=chunk, compile=compile)
            derivatives.append(derivative)
            best.forget()  # totals of different phases do not compare
        if group:
            grouped = images.unflatten(0, (len(leaks), restarts))
            given["consensus"] = consensus(grouped).repeat_interleave(restarts, dim=0)
        gradients, total, distance = derivative(images, targets, given)
        best.update(images, targets, total, distance)
        finished = iteration == iterations
        if stop_below and iteration % 10 == 0:
            finished = best.keep_below(stop_below, iteration) or finished
        if watch:
            watch(iteration, iterations, best.of_victims)
        if finished:
            break
        stepper.step(gradients, iteration)
        if boxed:
            images.clamp_(low, high)
            if iteration == 0:
                best.forget()  # the start may lie outside
        if median_every and (iteration + 1) % median_every == 0:
            images.copy_(median_filter(images.flatten(0, 1)).view_as(images))
    found = [best.reconstruction(victim, leak) for victim, leak in enumerate(leaks)]
    if finite_difference:
        lowest = torch.stack([each.lowest for each in derivatives]).amin(dim=0).view(len(leaks), restarts)
        for cosines, one in zip(lowest, found, strict=True):
            one.diagnostics["difference_cosine"] = float(cosines[one.diagnostics["restart"]])
    return found


def _kind(leak: Leak, layers: str) -> tuple:
    """What leaks must share to be one vectorised problem."""
    shapes = leak.model, leak.image_shape, leak.batch_size, select(leak.gradients, layers), leak.mean, leak.std
    step = leak.local, leak.training, leak.dropout_seed
    return shapes, step, leak.labels is None, leak.statistics is None, sorted(known_puzzle(leak))


class Best:
    """The best iterate of every problem by what the loop minimises; values belong to the iterate they were taken at."""

    def __init__(self, images: Tensor, targets: Tensor, restarts: int, iterations: int):
        self.images, self.targets, self.restarts = images.clone(), targets.clone(), restarts
        self.total, self.distance = (images.new_full((len(images),), torch.inf) for _ in range(2))
        self.finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.kept = ~self.finite  # problems of victims that are done: their total is -inf, which nothing is below
        self.iterations = torch.full_like(self.total, iterations, dtype=torch.int64)

    def update(self, images: Tensor, targets: Tensor, total: Tensor, distance: Tensor) -> None:
        better = total < self.total  # false for NaN
        torch.where(better.view(-1, *[1] * (images.dim() - 1)), images, self.images, out=self.images)
        torch.where(better.view(-1, 1, 1), targets, self.targets, out=self.targets)
        torch.where(better, total, self.total, out=self.total)
        torch.where(better, distance, self.distance, out=self.distance)
        self.finite &= total.isfinite() | self.kept

    def forget(self) -> None:
        """Let whatever comes next be the best, but for problems that are done."""
        self.total = torch.where(self.kept, -torch.inf, torch.inf).to(self.total)

    def keep_below(self, objective: float, iteration: int) -> bool:
        """Change no more the finds of victims with a restart below `objective`; whether those are all victims."""
        lowest = self.distance.unflatten(0, (-1, self.restarts)).amin(dim=1)
        done = (lowest < objective).repeat_interleave(self.restarts)
        self.iterations[done & ~self.kept] = iteration
        self.kept = self.kept | done
        self.total[self.kept] = -torch.inf
        return bool(self.kept.all())

    def of_victims(self) -> tuple[Tensor, Tensor]:
        """(images (victims, B, C, H, W), objectives (victims,)) of the best restart of each victim."""
        distance = self.distance.unflatten(0, (-1, self.restarts))
        chosen = distance.argmin(dim=1)
        rows = torch.arange(len(chosen), device=chosen.device)
        return self.images.unflatten(0, (-1, self.restarts))[rows, chosen], distance[rows, chosen]

    def reconstruction(self, victim: int, leak: Leak) -> Reconstruction:
        """What was found for one victim: its restart of the lowest objective."""
        rows = slice(victim * self.restarts, (victim + 1) * self.restarts)
        chosen = int(self.distance[rows].argmin())
        told = "inferred" if leak.mask is None else "told"
        diagnostics = {
            "objective": float(self.distance[rows][chosen]),
            "restart": chosen,
            "diverged": int((~self.finite[rows]).sum()),
            "iterations": int(self.iterations[rows.start]),
            "gradient_norm": float(torch.stack([value.norm() for value in leak.gradients.values()]).norm()),
            "mask": told if "mask" in known_puzzle(leak) else "none",
        }
        labels = self.targets[rows][chosen].argmax(dim=1)
        return Reconstruction(self.images[rows][chosen].clone(), diagnostics, labels)
