"""CW-SSIM, structural similarity of complex wavelet coefficients: small shifts and rotations of a picture cost little.

    python -m eval.cw_ssim --source_dir DIR --target_dir DIR [--json FILE]

Sampat, Wang, Gupta, Bovik and Markey, "Complex Wavelet Structural Similarity", IEEE Transactions on Image Processing
2009, eq. 10: a shift turns the phases of all coefficients in a window alike, which a product |sum c_x c_y*| does not
see. The paper has a steerable pyramid; here the wavelets are Gabor functions (scikit-image), so values are not the
paper's and compare with each other only.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from skimage.filters import gabor_kernel
from torch import Tensor, nn

from eval.mse import comparable
from utils.errors import UserError, run_command

FREQUENCIES = (0.25, 0.125)  # cycles per pixel, an octave apart
ORIENTATIONS = 8
WINDOW = 7  # pixels
STABILITY = 0.01  # K of eq. 10, which keeps windows without structure from deciding


def cw_ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return CW-SSIM in [0, 1], higher is closer. (B, C, H, W) in [0, 1] twice -> (B,), the mean over wavelets, windows
    and channels. Raises UserError for pictures smaller than a window."""
    reconstruction, target = (images.double() for images in comparable(reconstruction, target))
    if min(target.shape[2:]) < WINDOW:
        raise UserError(f"CW-SSIM compares windows of {WINDOW} pixels: the images are {tuple(target.shape[2:])}")
    scores = []
    for frequency in FREQUENCIES:
        x, y = (_coefficients(images, frequency) for images in (reconstruction, target))  # (B * C, O, H, W) complex
        cross = torch.complex(*(_windows(part) for part in torch.view_as_real(x * y.conj()).unbind(-1))).abs()
        power = _windows(x.abs().square()) + _windows(y.abs().square())
        scores.append(((2 * cross + STABILITY) / (power + STABILITY)).mean(dim=(1, 2, 3)))
    return torch.stack(scores).mean(dim=0).view(target.shape[:2]).mean(dim=1)


def _coefficients(images: Tensor, frequency: float) -> Tensor:
    """Return the wavelet coefficients (B * C, ORIENTATIONS, H, W), complex, of images mirrored at their borders."""
    images, out = images.flatten(0, 1)[:, None], []
    for kernel in _kernels(frequency):
        rows, columns = (size // 2 for size in kernel.shape)
        padded = np.pad(images.cpu().numpy(), ((0, 0), (0, 0), (rows, rows), (columns, columns)), mode="symmetric")
        weight = torch.stack([kernel.real, kernel.imag])[:, None].to(images)  # (2, 1, h, w)
        found = nn.functional.conv2d(torch.from_numpy(padded).to(images), weight)
        out.append(torch.complex(found[:, 0], found[:, 1]))
    return torch.stack(out, dim=1)


@cache
def _kernels(frequency: float) -> list[Tensor]:
    """Return the Gabor functions of one frequency, odd sizes, blind to constant pictures and of unit energy."""
    kernels = []
    for place in range(ORIENTATIONS):
        kernel = gabor_kernel(frequency, theta=np.pi * place / ORIENTATIONS)
        envelope = np.abs(kernel)
        kernel = kernel - envelope * kernel.sum() / envelope.sum()
        kernels.append(torch.from_numpy(kernel / np.linalg.norm(kernel)))
    return kernels


def _windows(values: Tensor) -> Tensor:
    """Return the sums over windows."""
    return nn.functional.avg_pool2d(values, WINDOW, stride=1) * WINDOW**2


def main(argv: Sequence[str] | None = None) -> None:
    from eval.image_folders import FolderMetric, command_line, score_folders  # here, as in eval/mse.py

    args = command_line("cw_ssim", __doc__).parse_args(argv)
    score_folders(args, {"cw_ssim": FolderMetric(cw_ssim, "1 is equal, higher is closer")})


if __name__ == "__main__":
    run_command(main)
