"""Mean squared error of a reconstruction."""

from torch import Tensor


def mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, lower is closer. (B, C, H, W) in [0, 1] twice -> (B,), over channels and pixels."""
    return (reconstruction.double() - target.double()).square().flatten(1).mean(dim=1)
