"""How candidates move: optimizers, schedules of the rate, and what is done to a gradient before and after the step.

Everything here is elementwise or per problem, so V independent problems may share one optimizer.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from attacks.lbfgs import LBFGS

# Names -> constructors of (tensors, lr). adamw is BERT's, adam_safe the multi-scale attack's. fused: one kernel a step.
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adam_safe": partial(torch.optim.Adam, betas=(0.5, 0.99), eps=1e-4, fused=True),
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, fused=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True),
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
            self.optimizer = OPTIMIZERS[optimizer](self.variables, lr=lr)
            for value in self.variables:
                value.grad = torch.zeros_like(value)  # fused kernels take for granted that both are laid out alike

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], iteration: int) -> None:
        """One step of every problem. Gradient entries that are not finite count as zero; with L-BFGS all of it does."""
        factor = self.rate(iteration)
        gradients = [self._modified(gradients[0], factor, iteration), *gradients[1:]]
        if isinstance(self.optimizer, LBFGS):
            self.optimizer.lr = self.lr * factor
            flat, slope = (
                torch.cat([value.flatten(1) for value in some], dim=1) for some in (self.variables, gradients)
            )
            moved = self.optimizer.step(flat, slope).split([value[0].numel() for value in self.variables], dim=1)
            for value, new in zip(self.variables, moved, strict=True):
                value.copy_(new.view_as(value))
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        for value, gradient in zip(self.variables, gradients, strict=True):
            torch.nan_to_num(gradient, 0.0, 0.0, 0.0, out=value.grad)
        self.optimizer.step()

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
