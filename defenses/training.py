"""How a defence on gradients enters a training step, and the account that is kept of its guarantee."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from defenses.accounting import History, extended
from defenses.base import Defense, Step
from models.task import reached_by_examples


def clipped_backward(defense: Defense, step: Step, public: Tensor, share: float, update_size: int) -> Tensor:
    """Add one step's part of an update to the gradients of its model, and return its loss, a scalar.

    The clipped gradients of its examples are divided by the examples of the whole update. public: what the loss holds
    beside its examples, a scalar that depends on none of them; its gradient counts `share` of the update.
    """
    if public.requires_grad:
        (share * public).backward()
    total, losses = defense.clipped_sum(step, reached_by_examples(step.model))
    for name, value in total.items():
        parameter, mean = step.model.get_parameter(name), value / update_size
        parameter.grad = mean if parameter.grad is None else parameter.grad + mean
    return losses.mean() + public.detach()


def defend(
    defense: Defense, step: Step, add_up: Callable[[Tensor], Tensor], update_size: int, generator: torch.Generator
) -> None:
    """Put what the client would share in the place of its gradient; what it withholds is not updated.

    Clipped gradients of several processes are first added up by `add_up`. All processes call this with generators in
    the same state, so that each adds the same noise, once, and their models stay equal.
    """
    parameters = {name: value for name, value in step.model.named_parameters() if value.grad is not None}
    gradients = {name: value.grad for name, value in parameters.items()}
    if defense.clips_examples:
        gradients = {name: add_up(value) for name, value in gradients.items()}
        private = {name: gradients[name] for name in reached_by_examples(step.model)}
        shared = gradients | defense.noised(private, update_size, generator)
    else:
        shared = defense.gradients(gradients, step, generator=generator)
    for name, value in parameters.items():
        value.grad = shared.get(name)


@dataclass(frozen=True)
class Account:
    """What a run spends under its defence from update number `first` on, after a history that may be empty or unknown.

    sample_rate: the share of the training set in an update. start: what a guarantee must say of the weights that the
    run began with, or None.
    """

    defense: Defense
    sample_rate: float
    first: int
    history: History | None
    start: str | None

    def guarantee(self, updates: int) -> dict:
        """Return what holds after update number `updates`, as `Defense.account` does."""
        told = self.defense.account(self.sample_rate, updates - self.first, self.history)
        if self.start and told.get("epsilon_shuffled") is not None:
            told["privacy"] += f"; {self.start}"
        return told

    def state(self, updates: int) -> dict:
        """Return plain values for a checkpoint: the history, from which a resumed run goes on, and its guarantee."""
        history = extended(self.history, self.defense.guaranteed_noise, self.sample_rate, updates - self.first)
        return {"history": history, "start": self.start, **self.guarantee(updates)}


def describe_start(path: str, content: dict, classes: list[str]) -> str:
    """Return what a guarantee must say of a run on these classes that starts from a checkpoint of this content."""
    same = ", which may be these: its classes are the same" if content.get("classes") == classes else ""
    return f"training before {path} is not counted, so this holds only for images that it has not seen{same}"


def describe_guarantee(guarantee: dict) -> str:
    """Return a guarantee as one line of a log."""
    return ", ".join(f"{key}: {value}" for key, value in guarantee.items() if value is not None or key == "epsilon")
