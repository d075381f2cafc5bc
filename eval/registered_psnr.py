"""Registered PSNR: the PSNR at the shift and mirror image that suit a reconstruction best.

    python -m eval.registered_psnr --source_dir DIR --target_dir DIR [--json FILE]

A picture that came back a few pixels aside, or mirrored, is found all the same and scores badly pixel by pixel. Whole
shifts up to REACH pixels in both directions are tried; what a shift pushes out of the picture is left out of the mean.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eval.mse import comparable
from utils.errors import UserError, run_command

REACH = 3  # pixels


def registered_psnr(reconstruction: Tensor, target: Tensor, reach: int = REACH) -> Tensor:
    """Return PSNR in dB at the best shift and mirror image, higher is closer. (B, C, H, W) in [0, 1] twice -> (B,).

    Never below the PSNR of the picture as it is. Raises UserError for pictures that are no larger than two shifts.
    """
    reconstruction, target = comparable(reconstruction, target)
    height, width = target.shape[2:]
    if min(height, width) <= 2 * reach:
        raise UserError(f"pictures of {height} x {width} pixels are too small to be shifted by {reach}")
    least = torch.full((len(target),), torch.inf, dtype=torch.float64, device=target.device)
    for found in (reconstruction, reconstruction.flip(3)):
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                moved = found[:, :, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
                still = target[:, :, max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]
                least = torch.minimum(least, (moved - still).double().square().flatten(1).mean(dim=1))
    return -10 * torch.log10(least)


def main(argv: Sequence[str] | None = None) -> None:
    from eval.image_folders import FolderMetric, command_line, score_folders  # here, as in eval/mse.py

    args = command_line("registered_psnr", __doc__).parse_args(argv)
    score_folders(args, {"registered_psnr": FolderMetric(registered_psnr, "dB, higher is closer")})


if __name__ == "__main__":
    run_command(main)
