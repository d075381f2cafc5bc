"""What a defence is: two hooks of a client, one on its images before the step and one on its gradient after it.

`Defense` itself changes nothing; every defence is a frozen dataclass that overrides one hook and whose fields are its
options. Training (engine.py) and attacks (attacks/victim.py) call the same two hooks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import UserError

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """The step behind a gradient, which never leaves the client. images (B, C, H, W) normalised, as the model saw them;
    targets (B,) labels or (B, classes) probabilities; mask (1 or B, N) bool or None. loss(parameters, images, targets,
    mask) -> the mean loss under those parameters, a scalar; None where the update is of several local steps."""

    model: nn.Module
    images: Tensor
    targets: Tensor
    mask: Tensor | None
    loss: Callable[[Gradients, Tensor, Tensor, Tensor | None], Tensor] | None

    def per_example(self, names: Sequence[str], defense: str) -> Gradients:
        """The gradient of every example on its own, (B, ...) by parameter name.

        Raises UserError where examples do not have one: after several local steps, and where BatchNorm mixes them.
        """
        if self.loss is None:
            raise UserError(f"defence '{defense}' needs the gradients of single images, not an update of local steps")
        for name, layer in self.model.named_modules():
            if isinstance(layer, _BatchNorm) and (layer.training or not layer.track_running_stats):
                raise UserError(
                    f"defence '{defense}' does not apply to this model: BatchNorm in '{name}' mixes the images of a "
                    f"batch, which leaves no gradient per image; use a model without it"
                )
        parameters = {name: value.detach() for name, value in self.model.named_parameters() if name in set(names)}
        mask = self.mask if self.mask is None or len(self.mask) > 1 else self.mask[0]
        each = (None, 0, 0, 0 if self.mask is not None and len(self.mask) > 1 else None)

        def one(own: Gradients, image: Tensor, target: Tensor, hidden: Tensor | None) -> Tensor:
            return self.loss(own, image[None], target[None], None if hidden is None else hidden[None])

        with sdpa_kernel(SDPBackend.MATH):
            return vmap(grad(one), in_dims=each, randomness="different")(parameters, self.images, self.targets, mask)


def mean_loss(criterion: Callable[[Tensor, Tensor], Tensor], model: nn.Module) -> Callable:
    """The `loss` of a Step for a model (images, mask) -> logits."""

    def loss(parameters: Gradients, images: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        return criterion(functional_call(model, parameters, (images,) if mask is None else (images, mask)), targets)

    return loss


@dataclass(frozen=True, kw_only=True)
class Defense:
    """No defence, and the base of all. `strength` names the option that says how strong one is, `off` its value at
    which nothing changes, not a bit."""

    strength: ClassVar[str] = ""
    off: ClassVar[object] = 0
    looks_at_images: ClassVar[bool] = False  # at those behind a gradient, not at the gradient alone
    takes_text: ClassVar[bool] = True  # token ids can be neither mixed, nor turned, nor differentiated

    def check(self, model: nn.Module) -> None:
        """Raise UserError in one line if the defence does not apply to this model."""

    def check_training(self, amp: str, *, alone: bool, mixing: bool) -> None:
        """Raise UserError in one line if a recipe cannot train under it. alone: one process, whose every step is an
        update; mixing: the recipe has Mixup or CutMix of its own."""
        if self.active and self.changes_gradients and (amp == "fp16" or (self.looks_at_images and not alone)):
            raise UserError(
                "a defence on gradients trains without --optim.amp fp16, and one that looks at single images in "
                "one process without --optim.accumulation"
            )

    def images(
        self, images: Tensor, targets: Tensor, *, generator: torch.Generator, mean, std, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """What the client trains on instead of images (B, C, H, W), normalised by mean and std, and targets (B,)."""
        return images, targets

    def gradients(self, gradients: Gradients, step: Step, *, generator: torch.Generator) -> Gradients:
        """What the client shares instead of its gradients by parameter name. `generator` lives on the CPU."""
        return gradients

    def account(self, sample_rate: float, steps: int) -> dict:
        """What training under it for so many steps guarantees, as plain values; nothing, for most."""
        return {}

    def withheld(self) -> list[str]:
        """Patterns of the names of gradients that are not shared at all."""
        return []

    @property
    def changes_gradients(self) -> bool:
        return type(self).gradients is not Defense.gradients

    @property
    def active(self) -> bool:
        return bool(self.strength) and getattr(self, self.strength) != self.off

    def __str__(self) -> str:
        """Its options, for people."""
        return ", ".join(f"{item.name} {getattr(self, item.name)}" for item in fields(self))


def require(condition: bool, option: str, rule: str, value) -> None:
    """Raise UserError naming the option, the rule and the value unless `condition` holds."""
    if not condition:
        raise UserError(f"--defense_options.{option} must be {rule}, got {value}")
