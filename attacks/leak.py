"""The threat model as a type: an attack receives a Leak and returns a Reconstruction."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from utils.errors import UserError


@dataclass(frozen=True)
class Leak:
    """Everything an honest-but-curious server knows after one local step, and nothing else.

    model: architecture and weights, evaluation mode; gradients: by parameter name, unused parameters absent;
    image_shape (C, H, W); batch_size: images behind the gradient; labels (B,) int64, or None when hidden.
    """

    model: nn.Module
    gradients: dict[str, Tensor]
    image_shape: tuple[int, int, int]
    batch_size: int
    labels: Tensor | None = None

    def gradient(self, name: str, attack: str) -> Tensor:
        """One gradient by parameter name; raises UserError saying which attack misses it."""
        if name not in self.gradients:
            raise UserError(f"attack '{attack}' needs the gradient of '{name}', which this leak does not have")
        if not self.gradients[name].isfinite().all():
            raise UserError(f"the gradient of '{name}' holds NaN or infinity: nothing can be reconstructed from it")
        return self.gradients[name]


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns. images (B, C, H, W) in the model's normalised space, float32 or float64, not
    clamped; diagnostics: plain values that say how the attack went (`exact`: its equations determine the images).
    """

    images: Tensor
    diagnostics: dict = field(default_factory=dict)
