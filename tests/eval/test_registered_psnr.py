"""Registered PSNR: shifts and mirror images cost nothing, and nothing scores below its plain PSNR."""

import pytest
import torch

from eval.psnr_ssim import psnr
from eval.registered_psnr import registered_psnr
from utils.errors import UserError

PICTURE = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("moved", [PICTURE.roll((2, -3), (2, 3)), PICTURE.flip(3), PICTURE.flip(3).roll(1, 2)])
def test_shifted_and_mirrored_pictures_are_recognised(moved):
    assert psnr(moved, PICTURE) < 12
    assert registered_psnr(moved, PICTURE) == torch.inf


def test_it_is_never_below_psnr_and_rotations_are_not_undone():
    noisy = (PICTURE + 0.1 * torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert registered_psnr(noisy, PICTURE) >= psnr(noisy, PICTURE) - 1e-6
    assert registered_psnr(PICTURE.flip(2), PICTURE) < 15


def test_pictures_smaller_than_two_shifts_are_refused():
    with pytest.raises(UserError, match="too small to be shifted"):
        registered_psnr(PICTURE[:, :, :5], PICTURE[:, :, :5])
