"""How candidates move: optimizers, schedules of the rate, and what is done to a gradient before and after the step.

Everything here is elementwise or per problem, so V independent problems may share one optimizer.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attacks.lbfgs import LBFGS


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
    "lbfgs": None,  # attacks/lbfgs.py: torch's would couple the problems
}
SIGNS = ("none", "hard", "soft")


def step_decay(iteration: int, iterations: int) -> float:
    """x 0.1 after 3/8, 5/8 and 7/8 of the iterations, at the integers of the official code, whose 24 // 1.6 is 14."""
    return 0.1 ** sum(iteration >= iterations // part for part in (2.667, 1.6, 1.142))


SCHEDULES = {
    "constant": lambda iteration, iterations: 1.0,
    "step": step_decay,
    "cosine": lambda iteration, iterations: (1 + math.cos(math.pi * iteration / iterations)) / 2,
    "linear": lambda iteration, iterations: 1 - iteration / iterations,
}


def learning_rate(schedule: str, iteration: int, iterations: int, warmup: int) -> float:
    """Factor on the rate at an iteration counted from 0. A warm-up rises linearly from 0 and the schedule follows one
    iteration after it has reached 1, as in breaching."""
    if warmup and iteration <= warmup:
        return iteration / warmup
    return SCHEDULES[schedule](iteration - warmup - 1 if warmup else iteration, iterations)


class Stepper:
    """Moves `variables`, each (V, ...), against their gradients; the first of them are the images.

    langevin: standard deviation of noise on the images' gradient, in units of the current rate, drawn from `generators`
    (one for every V / len(generators) problems); clip: largest L2 norm of that gradient; signed: hard takes its sign,
    soft tanh(s g) / s with s falling from 1 to 0; 0 and 'none' are off. They apply in this order (breaching's).
    """

    def __init__(
        self,
        variables: Sequence[Tensor],
        *,
        optimizer: str,
        lr: float,
        schedule: str,
        warmup: int,
        iterations: int,
        langevin: float,
        clip: float,
        signed: str,
        generators: Sequence[torch.Generator],
    ):
        self.variables, self.lr, self.generators = list(variables), lr, generators
        self.rate = partial(learning_rate, schedule, iterations=iterations, warmup=warmup)
        self.langevin, self.clip, self.signed, self.iterations = langevin, clip, signed, iterations
        problems, like = len(variables[0]), variables[0]
        if optimizer == "lbfgs":
            sizes = [value[0].numel() for value in variables]
            self.optimizer = LBFGS(problems, sum(sizes), lr=lr, dtype=like.dtype, device=like.device)
        else:
            self.optimizer = OPTIMIZERS[optimizer](self.variables, lr)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], iteration: int) -> None:
        """One step of every problem. Gradient entries that are not finite count as zero; with L-BFGS all of it does."""
        factor = self.rate(iteration)
        gradients = [self._modified(gradients[0], factor, iteration), *gradients[1:]]
        self.optimizer.lr = self.lr * factor
        if isinstance(self.optimizer, LBFGS):
            flat, slope = (
                torch.cat([value.flatten(1) for value in some], dim=1) for some in (self.variables, gradients)
            )
            moved = self.optimizer.step(flat, slope).split([value[0].numel() for value in self.variables], dim=1)
            for value, new in zip(self.variables, moved, strict=True):
                value.copy_(new.view_as(value))
            return
        self.optimizer.step([gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients])

    def _modified(self, gradient: Tensor, factor: float, iteration: int) -> Tensor:
        if self.langevin:
            shape = (len(gradient) // len(self.generators), *gradient.shape[1:])
            noise = torch.cat([torch.randn(shape, generator=generator) for generator in self.generators])
            gradient = gradient + self.langevin * self.lr * factor * noise.to(gradient)
        if self.clip:
            norm = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
            gradient = torch.where(norm > self.clip, gradient * (self.clip / (norm + 1e-6)), gradient)
        if self.signed == "soft":
            softness = 1 - iteration / self.iterations
            return torch.tanh(softness * gradient) / softness
        return gradient.sign() if self.signed == "hard" else gradient
