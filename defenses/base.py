"""What a defence is: two hooks of a client, one on its images before the step and one on its gradient after it.

`Defense` itself changes nothing; every defence is a frozen dataclass that overrides one hook and whose fields are its
options. Training (training/trainer.py) and attacks (attacks/threat_model/client.py) call the same two hooks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from defenses.accounting import guarantee
from defenses.capacity import stored_bits
from models.bottleneck import take_penalty
from utils.errors import UserError

Gradients = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What of a training decides whether a defence can train under it, in the words of train.py's options."""

    amp: str = "none"
    processes: int = 1
    accumulation: int = 1
    mixing: bool = False
    """Mixup or CutMix is on."""
    compile: bool = False
    grad_checkpointing: bool = False
    repeats: int = 1
    on_corrupt: str = "error"
    kind: str = "image"
    """Of data: 'image' or 'text'."""
    localization: str = "none"
    shrinking_window: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Step:
    """The step behind a gradient, which never leaves the client. images (B, C, H, W) normalised, as the model saw them;
    targets (B,) labels or (B, classes) probabilities; mask (1 or B, N) bool or None. loss(parameters, images, targets,
    mask) -> the mean loss under those parameters, a scalar; None where the update is of several local steps. precision:
    the context in which it is computed."""

    model: nn.Module
    images: Tensor
    targets: Tensor
    mask: Tensor | None
    loss: Callable[[Gradients, Tensor, Tensor, Tensor | None], Tensor] | None
    precision: Callable[[], AbstractContextManager] = nullcontext

    def per_example(self, names: Sequence[str], defense: str) -> tuple[Gradients, Tensor]:
        """Return the gradient of every example on its own, (B, ...) by parameter name, and the losses (B,).

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

        with sdpa_kernel(SDPBackend.MATH), self.precision():
            by_example = vmap(grad_and_value(one), in_dims=each, randomness="different")
            return by_example(parameters, self.images, self.targets, mask)


def mean_loss(criterion: Callable[[Tensor, Tensor], Tensor], model: nn.Module) -> Callable:
    """Return the `loss` of a Step for a model (images, mask) -> logits: the criterion and, where a variational
    bottleneck trains, its weighted divergence."""

    def loss(parameters: Gradients, images: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        logits = functional_call(model, parameters, (images,) if mask is None else (images, mask))
        value, penalty = criterion(logits.float(), targets), take_penalty(model)
        return value if penalty is None else value + penalty

    return loss


@dataclass(frozen=True, kw_only=True)
class Defense:
    """No defence, and the base of all. `strength` names the option that says how strong one is, `off` its value at
    which nothing changes, not a bit."""

    strength: ClassVar[str] = ""
    off: ClassVar[object] = 0
    looks_at_images: ClassVar[bool] = False  # at all those behind a gradient together, not at the gradient alone
    takes_text: ClassVar[bool] = True  # token ids can be neither mixed, nor turned, nor differentiated

    def check(self, model: nn.Module) -> None:
        """Raise UserError in one line if the defence does not apply to this model."""

    def check_training(self, recipe: Recipe) -> None:
        """Raise UserError, in one line that names the option to change, if a recipe cannot train under it."""
        if not self.active or not self.changes_gradients:
            return
        if recipe.amp == "fp16":
            raise UserError("a defence on gradients does not train with --optim.amp fp16: set it to none or bf16")
        alone = recipe.processes == 1 and recipe.accumulation == 1
        if self.looks_at_images and not alone:
            raise UserError(
                "a defence that looks at all images of an update trains in one process without --optim.accumulation: "
                "start one process with --optim.accumulation 1"
            )

    def images(
        self, images: Tensor, targets: Tensor, *, generator: torch.Generator, mean, std, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Return what the client trains on in place of images (B, C, H, W), normalised, and targets (B,)."""
        return images, targets

    def gradients(self, gradients: Gradients, step: Step, *, generator: torch.Generator) -> Gradients:
        """Return what the client shares instead of its gradients by parameter name. `generator` lives on the CPU."""
        return gradients

    def carries(self, gradients: Gradients, images: int) -> float:
        """Return the most bits that what it shares in place of these gradients can tell of the images behind them, so
        many, beyond their labels. It holds for every distribution of images whose gradients are no longer than these,
        tensor by tensor (defenses/capacity.py)."""
        return stored_bits(gradients.values())

    def account(self, sample_rate: float, steps: int, history: Sequence | None = ()) -> dict:
        """Return what training under it for so many updates guarantees, as plain values; nothing, for most.

        sample_rate: the share of the training set in an update. history: of the updates before (defenses.accounting).
        """
        if steps and any(segment[0] for segment in history or ()):  # a guarantee that the steps under this one end
            told = guarantee([*history, [0.0, sample_rate, steps]], 0.0)
            return {"epsilon": None, "privacy": told["privacy"]}
        return {}

    def withheld(self) -> list[str]:
        """Return patterns of the names of gradients that are not shared at all."""
        return []

    @property
    def clips_examples(self) -> bool:
        """Tell whether training clips the gradient of every example on its own (`DpSgd.accumulate`)."""
        return False

    @property
    def guaranteed_noise(self) -> float:
        """The noise multiplier of an update, in units of how much one example can change; 0 is no guarantee."""
        return 0.0

    @property
    def changes_gradients(self) -> bool:
        return type(self).gradients is not Defense.gradients

    @property
    def active(self) -> bool:
        return bool(self.strength) and getattr(self, self.strength) != self.off

    def __str__(self) -> str:
        """Return its options, for people."""
        return ", ".join(f"{item.name} {getattr(self, item.name)}" for item in fields(self))


def require(condition: bool, option: str, rule: str, value) -> None:
    """Raise UserError naming the option, the rule and the value unless `condition` holds."""
    if not condition:
        raise UserError(f"--defense_options.{option} must be {rule}, got {value}")
