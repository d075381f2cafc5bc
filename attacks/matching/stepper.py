"""One step of every candidate: what is done to its gradient, the learning rate of the iteration, and the optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attacks.matching.options import MatchingOptions
from attacks.solvers.lbfgs import LBFGS
from attacks.solvers.optimizers import OPTIMIZERS, learning_rate


class Stepper:
    """Move `variables`, each (V, ...), against their gradients; the first of them are the images.

    langevin: standard deviation of noise on the images' gradient, in units of the current rate, drawn from `generators`
    (one for every V / len(generators) problems); clip: largest L2 norm of that gradient; signed: hard takes its sign,
    soft tanh(s g) / s with s falling from 1 to 0; 0 and 'none' are off. They apply in this order (breaching's).
    """

    def __init__(self, variables: Sequence[Tensor], options: MatchingOptions, generators: Sequence[torch.Generator]):
        self.variables, self.lr, self.generators = list(variables), options.lr, generators
        self.langevin, self.clip, self.signed = options.langevin, options.clip, options.signed
        self.schedule, self.warmup, self.iterations = options.schedule, options.warmup, options.iterations
        problems, like = len(variables[0]), variables[0]
        if options.optimizer == "lbfgs":
            sizes = [value[0].numel() for value in variables]
            self.optimizer = LBFGS(problems, sum(sizes), lr=options.lr, dtype=like.dtype, device=like.device)
        else:
            self.optimizer = OPTIMIZERS[options.optimizer](self.variables, options.lr)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], iteration: int) -> None:
        """Take one step of every problem. Entries that are not finite count as zero; with L-BFGS the whole gradient."""
        factor = learning_rate(self.schedule, iteration, self.iterations, self.warmup)
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
