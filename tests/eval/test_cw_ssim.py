"""CW-SSIM: its formula by hand, and what it is for: shifts and small rotations cost little, noise and blur much."""

import pytest
import torch
from scipy import ndimage
from skimage.data import camera
from skimage.transform import resize

from eval.cw_ssim import STABILITY, WINDOW, _coefficients, cw_ssim
from eval.psnr_ssim import ssim
from utils.errors import UserError

PICTURE = torch.from_numpy(resize(camera(), (48, 48), anti_aliasing=True))[None, None]


def test_equal_pictures_score_one_and_the_order_does_not_matter():
    other = PICTURE.flip(3)
    assert cw_ssim(PICTURE, PICTURE).item() == pytest.approx(1, abs=1e-12)
    assert cw_ssim(PICTURE, other).item() == pytest.approx(cw_ssim(other, PICTURE).item(), abs=1e-12)
    assert 0 < cw_ssim(PICTURE, other).item() < 1


def test_a_batch_of_colours_is_the_mean_over_channels():
    pair = [torch.cat([PICTURE, PICTURE.flip(2)], dim=1), torch.cat([PICTURE.flip(3), PICTURE], dim=1)]
    each = [cw_ssim(pair[0][:, [channel]], pair[1][:, [channel]]) for channel in range(2)]
    torch.testing.assert_close(cw_ssim(*pair), torch.stack(each).mean(dim=0))
    torch.testing.assert_close(cw_ssim(*(torch.cat([images, images]) for images in pair)), cw_ssim(*pair).expand(2))


def test_one_window_is_the_formula():
    x, y = torch.rand(2, 1, 1, WINDOW, WINDOW, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for frequency in (0.25, 0.125):
        for cx, cy in zip(_coefficients(x, frequency)[0], _coefficients(y, frequency)[0], strict=True):
            cross = (cx * cy.conj()).sum().abs()
            power = cx.abs().square().sum() + cy.abs().square().sum()
            expected.append((2 * cross + STABILITY) / (power + STABILITY))
    torch.testing.assert_close(cw_ssim(x, y)[0], torch.stack(expected).mean())


def test_a_shift_and_a_small_rotation_cost_less_than_in_ssim_and_noise_costs_more():
    shifted = PICTURE.roll((1, 1), (2, 3))
    turned = torch.from_numpy(ndimage.rotate(PICTURE[0, 0].numpy(), 3, reshape=False, mode="reflect"))[None, None]
    noisy = PICTURE + 0.3 * torch.randn(PICTURE.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for moved in (shifted, turned.clamp(0, 1)):
        assert 1 - cw_ssim(moved, PICTURE).item() < (1 - ssim(moved, PICTURE).item()) / 2
        assert cw_ssim(moved, PICTURE).item() > cw_ssim(noisy.clamp(0, 1), PICTURE).item()


def test_pictures_smaller_than_a_window_are_refused():
    with pytest.raises(UserError, match="windows of 7 pixels"):
        cw_ssim(PICTURE[..., :6], PICTURE[..., :6])
