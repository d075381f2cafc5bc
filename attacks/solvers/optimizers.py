"""Optimizers and schedules of the learning rate, elementwise: V independent problems may share one optimizer."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor


class Adam:
    """Adam and, with weight_decay, AdamW (Kingma and Ba, 2015; Loshchilov and Hutter, 2019) on tensors of any shape.

    The arithmetic of torch.optim, and its results; there, one step is up to half a millisecond of Python, which is a
    tenth of what a small network's derivative takes.
    """

    def __init__(self, variables: Sequence[Tensor], lr: float, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        self.variables, self.lr, self.betas, self.eps, self.weight_decay = variables, lr, betas, eps, weight_decay
        self.moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in variables]
        self.steps = 0

    def step(self, gradients: Sequence[Tensor]) -> None:
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in self.betas)
        for value, gradient, (mean, square) in zip(self.variables, gradients, self.moments, strict=True):
            if self.weight_decay:
                value.mul_(1 - self.lr * self.weight_decay)
            mean.lerp_(gradient, 1 - self.betas[0])
            square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            length = square.sqrt().div_(math.sqrt(second)).add_(self.eps)
            value.addcdiv_(mean, length, value=-self.lr / first)


class SGD:
    """Gradient descent, with `momentum` in Nesterov's form as torch.optim has it."""

    def __init__(self, variables: Sequence[Tensor], lr: float, *, momentum: float = 0.0):
        self.variables, self.lr, self.momentum = variables, lr, momentum
        self.sums = [torch.zeros_like(value) for value in variables]

    def step(self, gradients: Sequence[Tensor]) -> None:
        for value, gradient, past in zip(self.variables, gradients, self.sums, strict=True):
            past.mul_(self.momentum).add_(gradient)
            value.sub_(torch.add(gradient, past, alpha=self.momentum), alpha=self.lr)


# Names -> constructors of (tensors, lr). adamw is BERT's, adam_safe the multi-scale attack's.
OPTIMIZERS = {
    "adam": Adam,
    "adam_safe": partial(Adam, betas=(0.5, 0.99), eps=1e-4),
    "adamw": partial(Adam, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01),
    "momentum": partial(SGD, momentum=0.9),
    "sgd": SGD,
    "lbfgs": None,  # attacks/solvers/lbfgs.py: torch's would couple the problems
}
SIGNS = ("none", "hard", "soft")


def step_decay(iteration: int, iterations: int) -> float:
    """Return the factor on the rate: x 0.1 after 3/8, 5/8 and 7/8 of the iterations, at the integers of the official
    code, whose 24 // 1.6 is 14."""
    return 0.1 ** sum(iteration >= iterations // part for part in (2.667, 1.6, 1.142))


SCHEDULES = {
    "constant": lambda iteration, iterations: 1.0,
    "step": step_decay,
    "cosine": lambda iteration, iterations: (1 + math.cos(math.pi * iteration / iterations)) / 2,
    "linear": lambda iteration, iterations: 1 - iteration / iterations,
}


def learning_rate(schedule: str, iteration: int, iterations: int, warmup: int) -> float:
    """Return the factor on the rate at an iteration counted from 0. A warm-up rises linearly from 0 and the schedule
    follows one iteration after it has reached 1, as in breaching."""
    if warmup and iteration <= warmup:
        return iteration / warmup
    return SCHEDULES[schedule](iteration - warmup - 1 if warmup else iteration, iterations)
