"""Peak signal-to-noise ratio and structural similarity of a reconstruction."""

import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from eval.mse import mse

SSIM_WINDOW = 11  # pixels: the Gaussian of sigma 1.5 cut off at 3.5 sigma


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, peak 1, higher is closer. (B, C, H, W) in [0, 1] twice -> (B,). Equal: inf."""
    return -10 * torch.log10(mse(reconstruction, target))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity, 1 is equal. (B, C, H, W) in [0, 1] twice -> (B,); sides of at least 11 pixels.

    Wang et al., 2004: Gaussian window of sigma 1.5, K = (0.01, 0.03), borders cropped, channel mean; scikit-image.
    """
    pairs = zip(reconstruction.double().cpu().numpy(), target.double().cpu().numpy(), strict=True)
    values = [
        structural_similarity(
            a, b, data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in pairs
    ]
    return torch.tensor(values, dtype=torch.float64)
