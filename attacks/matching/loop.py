"""The one optimisation loop: find images whose gradient is the leaked one.

Every gradient-matching attack is this loop with its paper's options (attacks/matching/options.py). Independent
problems, that is victims times restarts, are one tensor (V, B, C, H, W) and one vectorised derivative; no problem sees
another, so a victim's result does not depend on its company up to rounding. The truth takes no part in any decision.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attacks.matching.derivative import Checked, build_derivative
from attacks.matching.loss import ReconstructionLoss, phases_of
from attacks.matching.objectives import drawn_at_once
from attacks.matching.options import MatchingOptions, Watch, attack_with
from attacks.matching.priors import consensus, in_blocks, median_filter
from attacks.matching.problem import MatchingProblem, build_problem, kind_of
from attacks.matching.requirements import check_matching, matching_uses
from attacks.matching.scoring import AVERAGES, Score, average_restarts, build_score, choose_restart
from attacks.matching.stepper import Stepper
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.local_step import autograd_gradient, multi_label


def match(
    leaks: Sequence[Leak],
    options: MatchingOptions,
    *,
    generator: Sequence[torch.Generator],
    watch: Watch | None = None,
) -> list[Reconstruction]:
    """Reconstruct the batch behind each leak by matching gradients. Leaks of one model and one kind of step are one
    vectorised problem; others are attacked in turn.

    watch(iteration, iterations, snapshot) is called every iteration; snapshot() -> (images kept so far (victims, B, C,
    H, W), their objectives (victims,)). It is not called where leaks are attacked in turn.

    diagnostics: objective, restart (the chosen one), diverged (restarts that left the finite numbers), iterations,
    gradient_norm, mask ('inferred', 'told' or 'none'); with finite_difference also difference_cosine, the lowest cosine
    with the exact derivative that was seen (below 0.99: exact from there on). Raises UserError for leaks it cannot
    match and for options that do not go together.
    """
    if any(kind_of(leak, options.layers) != kind_of(leaks[0], options.layers) for leak in leaks):
        pairs = zip(leaks, generator, strict=True)
        return [match([leak], options, generator=[own])[0] for leak, own in pairs]
    problem = build_problem(leaks, options, generator)
    score = build_score(problem, options)  # before the work: what it needs may be missing
    best, derivatives = minimize(problem, options, watch)
    found = [best.reconstruction(victim, known, options, score) for victim, known in enumerate(problem.known)]
    if multi_label(problem.model):
        found = [replace(one, labels=best.attributes(one, victim, problem.joint)) for victim, one in enumerate(found)]
    if options.scoring_choice in AVERAGES:
        found = [_with_objective(one, victim, problem, options) for victim, one in enumerate(found)]
    if options.finite_difference:
        lowest = torch.stack([each.lowest for each in derivatives]).amin(dim=0).view(len(leaks), options.restarts)
        for cosines, one in zip(lowest, found, strict=True):
            one.diagnostics["difference_cosine"] = float(cosines[one.diagnostics["restart"]])
    return found


def _with_objective(
    found: Reconstruction, victim: int, problem: MatchingProblem, options: MatchingOptions
) -> Reconstruction:
    """Return an average of restarts with the objective of its own."""
    first = victim * options.restarts
    loss, phase = ReconstructionLoss(problem, options), list(phases_of(options).values())[-1]
    data = {name: value[first] for name, value in problem.data.items()} | {"consensus": found.images}
    _, distance = loss(phase, found.images, problem.targets[first], data, gradient=autograd_gradient)
    return replace(found, diagnostics=found.diagnostics | {"objective": distance.item()})


gradient_matching = partial(
    attack_with, run=match, check=check_matching, uses=matching_uses
)  # preset -> the attack with its options as defaults


def minimize(
    problem: MatchingProblem, options: MatchingOptions, watch: Watch | None
) -> tuple["Best", list[Callable | Checked]]:
    """Run the iterations and return the iterates to keep, and the derivatives of the phases they ran through."""
    loss, phases, derivatives = ReconstructionLoss(problem, options), phases_of(options), []
    images, targets, data = problem.images, problem.targets, dict(problem.data)
    drawn = drawn_at_once(options.layers)
    variables = [images, targets] if problem.joint else [images]
    stepper = Stepper(variables, options, problem.generators)
    best = Best(images, targets, options.restarts, options.iterations)
    if options.boxed:  # spread out, which clamps quicker
        low, high = (bound.expand(images.shape[2:]).contiguous() for bound in (problem.low, problem.high))
    for iteration in range(options.iterations + 1):  # the last one only judges where the last step has led
        if iteration in phases:
            derivatives.append(build_derivative(loss, phases[iteration], options))
            best.forget()  # totals of different phases do not compare
        if options.group:
            restarts = images.unflatten(0, (-1, options.restarts))
            data["consensus"] = consensus(restarts).repeat_interleave(options.restarts, dim=0)
        if drawn:
            data |= draw_layers(problem, options, last=iteration == options.iterations)
            best.forget()  # objectives over different tensors do not compare
        if options.keep == "last":
            best.forget()
        gradients, total, distance = derivatives[-1](images, targets, data)
        best.update(images, targets, total, distance)
        finished = iteration == options.iterations
        if options.stop_below and iteration % 10 == 0:
            finished = best.keep_below(options.stop_below, iteration) or finished
        if watch:
            watch(iteration, options.iterations, best.of_victims)
        if finished:
            break
        stepper.step(gradients, iteration)
        if options.boxed:
            images.clamp_(low, high)
            if iteration == 0:
                best.forget()  # the start may lie outside
        if (block := block_side(iteration, options)) > 1:
            images.copy_(in_blocks(images.flatten(0, 1), block).view_as(images))
        if options.median_every and (iteration + 1) % options.median_every == 0:
            images.copy_(median_filter(images.flatten(0, 1)).view_as(images))
    return best, derivatives


def block_side(iteration: int, options: MatchingOptions) -> int:
    """Return the side in pixels of the blocks in which the images are of one colour after this iteration's step."""
    if options.stages == 1:
        return 1
    stage = iteration * options.stages // max(1, options.iterations)
    return 2 ** (options.stages - 1 - stage)


def draw_layers(problem: MatchingProblem, options: MatchingOptions, last: bool) -> dict[str, Tensor]:
    """Return the tensors compared in an iteration under layers 'batchK', as 'weight/NAME' (V,): 1 with them, else 0.

    The same for all restarts of a victim; in the last iteration, whose objectives are compared, all.
    """
    number, names = drawn_at_once(options.layers), problem.names
    drawn = torch.zeros(len(problem.generators), len(names))
    for row, generator in zip(drawn, problem.generators, strict=True):
        row[torch.randperm(len(names), generator=generator)[:number]] = 1
    drawn = torch.ones_like(drawn) if last else drawn
    drawn = drawn.to(problem.low).repeat_interleave(problem.restarts, dim=0)
    return {f"weight/{name}": drawn[:, place].clone() for place, name in enumerate(names)}


class Best:
    """Keep the best iterate of every problem by what the loop minimises, with the values taken there."""

    def __init__(self, images: Tensor, targets: Tensor, restarts: int, iterations: int):
        self.images, self.targets, self.restarts = images.clone(), targets.clone(), restarts
        self.total, self.distance = (images.new_full((len(images),), torch.inf) for _ in range(2))
        self.finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.kept = ~self.finite  # problems of victims that are done: their total is -inf, which nothing is below
        self.iterations = torch.full_like(self.total, iterations, dtype=torch.int64)

    def update(self, images: Tensor, targets: Tensor, total: Tensor, distance: Tensor) -> None:
        better = total < self.total  # false for NaN
        torch.where(better.view(-1, *[1] * (images.dim() - 1)), images, self.images, out=self.images)
        torch.where(better.view(-1, *[1] * (targets.dim() - 1)), targets, self.targets, out=self.targets)
        torch.where(better, total, self.total, out=self.total)
        torch.where(better, distance, self.distance, out=self.distance)
        self.finite &= total.isfinite() | self.kept

    def forget(self) -> None:
        """Let whatever comes next be the best, but for problems that are done."""
        self.total = torch.where(self.kept, -torch.inf, torch.inf).to(self.total)

    def keep_below(self, objective: float, iteration: int) -> bool:
        """Fix the finds of victims with a restart below `objective`; return True once those are all victims."""
        lowest = self.distance.unflatten(0, (-1, self.restarts)).amin(dim=1)
        done = (lowest < objective).repeat_interleave(self.restarts)
        self.iterations[done & ~self.kept] = iteration
        self.kept = self.kept | done
        self.total[self.kept] = -torch.inf
        return bool(self.kept.all())

    def of_victims(self) -> tuple[Tensor, Tensor]:
        """Return (images (victims, B, C, H, W), objectives (victims,)) of the best restart of each victim."""
        distance = self.distance.unflatten(0, (-1, self.restarts))
        chosen = distance.argmin(dim=1)
        rows = torch.arange(len(chosen), device=chosen.device)
        return self.images.unflatten(0, (-1, self.restarts))[rows, chosen], distance[rows, chosen]

    def attributes(self, found: Reconstruction, victim: int, logits: bool) -> Tensor:
        """Return the attributes (B, A) int64 that go with what was found: targets, or logits, above the middle."""
        chosen = self.targets[victim * self.restarts + found.diagnostics["restart"]]
        return (chosen > (0 if logits else 0.5)).long()

    def reconstruction(self, victim: int, known: dict, options: MatchingOptions, score: Score | None) -> Reconstruction:
        """Return what was found for one victim, by `scoring_choice`. known: further diagnostics."""
        rows = slice(victim * self.restarts, (victim + 1) * self.restarts)
        finite = self.distance[rows].isfinite()
        chosen = choose_restart(self.images[rows], self.distance[rows], finite, score)
        diagnostics = {
            "objective": float(self.distance[rows][chosen]),
            "restart": chosen,
            "diverged": int((~self.finite[rows]).sum()),
            "iterations": int(self.iterations[rows.start]),
            **known,
        }
        labels = self.targets[rows][chosen].argmax(dim=1)
        if options.scoring_choice in AVERAGES:
            images = average_restarts(self.images[rows], finite, options.scoring_choice)
            return Reconstruction(images, diagnostics, labels)
        return Reconstruction(self.images[rows][chosen].clone(), diagnostics, labels)
