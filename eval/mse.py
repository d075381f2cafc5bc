"""Mean squared error of a reconstruction, for two batches of images or two folders of them.

    python -m eval.mse --source_dir DIR --target_dir DIR [--json FILE]

What every score of two batches begins with stands here too.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from utils.errors import UserError, run_command

CHUNK = 4  # images in work at once on a CPU; with more of 224 x 224 pixels they fall out of its cache


def mse(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error, lower is closer: (B, C, H, W) in [0, 1] twice -> (B,), over pixels."""
    reconstruction, target = comparable(reconstruction, target)
    # The rows are short, so float32 is enough for each; their sum is not left to it. A norm reads the differences once.
    norms = [torch.linalg.vector_norm(a - b, dim=3) for a, b in chunks(reconstruction, target, CHUNK)]
    return torch.cat(norms).double().square_().flatten(1).sum(1) / target[0].numel()


def comparable(reconstruction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two batches, detached, in float64 if one of them is, else float32. Raises UserError unless shapes
    agree."""
    if reconstruction.shape != target.shape or target.dim() != 4 or not target.numel():
        shapes = f"{tuple(reconstruction.shape)} and {tuple(target.shape)}"
        raise UserError(f"expected two image batches of one shape (B, C, H, W) and not empty, got {shapes}")
    if not (reconstruction.is_floating_point() and target.is_floating_point()):
        kinds = f"{reconstruction.dtype} and {target.dtype}".replace("torch.", "")
        raise UserError(f"expected floating-point images in [0, 1], got {kinds}: divide 8-bit values by 255")
    dtype = torch.float64 if torch.float64 in (reconstruction.dtype, target.dtype) else torch.float32
    return reconstruction.detach().to(dtype), target.detach().to(dtype)


def chunks(reconstruction: Tensor, target: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the batches in pieces of `size` images on a CPU, where that is faster, and whole elsewhere."""
    size = size if target.device.type == "cpu" else len(target)
    return zip(reconstruction.split(size), target.split(size), strict=True)


def main(argv: Sequence[str] | None = None) -> None:
    from eval.image_folders import FolderMetric, command_line, score_folders  # here: it imports this file

    args = command_line("mse", __doc__).parse_args(argv)
    score_folders(args, {"mse": FolderMetric(mse, "lower is closer")})


if __name__ == "__main__":
    run_command(main)
