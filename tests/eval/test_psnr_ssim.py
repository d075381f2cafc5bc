"""eval/psnr_ssim.py against scikit-image, the definition of SSIM, the official code's numbers and brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from eval.psnr_ssim import psnr, psnr_any_order, ssim, ssim_official
from models.jigsaw import patchify, shuffle_patches, unpatchify
from utils.errors import UserError


def pictures(height: int, width: int, number: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth colours with noise, float64 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, channels, 4, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    noise = torch.rand(number, channels, height, width, generator=generator, dtype=torch.float64)
    return 0.8 * smooth + 0.2 * noise


def literature(x: Tensor, y: Tensor) -> Tensor:
    """scikit-image with the arguments of Wang et al., image by image."""
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    return torch.tensor([structural_similarity(a, b, channel_axis=0, **options) for a, b in pairs])


def definition(x: Tensor, y: Tensor, padding: int) -> Tensor:
    """SSIM with a two-dimensional window on x, y, x^2, y^2 and xy."""
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / 4.5)
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, 11, 11)

    def local(images: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(images, window, padding=padding, groups=x.shape[1])

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    values = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    return values.mean((1, 2, 3))


def extremes() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs on which float32 loses most: flat, saturated, dark, with contrast turned up or down."""
    x, one = pictures(40, 36), torch.ones(2, 3, 40, 36, dtype=torch.float64)
    board = ((torch.arange(40)[:, None] // 8 + torch.arange(36) // 8) % 2).double().expand_as(one)
    return {
        "two greys": (0.7 * one, 0.3 * one),
        "black and white": (one, 0 * one),
        "almost white": (one, one - (x > 0.5).double() / 255),
        "board and negative": (board, 1 - board),
        "board and paler board": (board, 0.8 * board + 0.1),
        "contrast": (0.9 + 0.1 * (x - 0.5), 0.9 + 0.15 * (x - 0.5)),
        "contrast around grey": (0.5 + 0.1 * (x - 0.5), x),
        "dark": (0.02 * x, 0.02 * x + 0.001),
        "grey and noise": (0.7 * one, 0.7 + 0.04 * (x - 0.5)),
    }


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (26, 27), (43, 28), (64, 59)])
@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_that_of_scikit_image_at_any_size(size, channels):
    x = pictures(*size, channels=channels)
    y = 0.6 * x + 0.4 * pictures(*size, channels=channels, seed=1)
    expected = literature(x, y)
    assert expected.min() > 0.05 and expected.max() < 0.99
    torch.testing.assert_close(ssim(x, y), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ssim(x.float(), y.float()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", extremes())
def test_float32_is_enough_at_the_extremes(name):
    x, y = (images.float() for images in extremes()[name])
    torch.testing.assert_close(ssim(x, y), literature(x, y), rtol=0, atol=3e-6)
    exact = definition(x.double(), y.double(), padding=5)
    torch.testing.assert_close(ssim_official(x, y), exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(8, 8), (5, 40), (33, 30)])
def test_the_official_variant_counts_the_border(size):
    x, y = pictures(*size), pictures(*size, seed=1)
    torch.testing.assert_close(ssim_official(x, y), definition(x, y, padding=5), rtol=0, atol=1e-12)
    if min(size) > 11:
        torch.testing.assert_close(ssim(x, y), definition(x, y, padding=0), rtol=0, atol=1e-12)
        assert (ssim(x, y) - ssim_official(x, y)).abs().min() > 1e-3


def test_ssim_is_symmetric_and_one_for_equal_images_only():
    x, y = pictures(30, 30), pictures(30, 30, seed=1)
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    for metric in (ssim, ssim_official):
        torch.testing.assert_close(metric(x, x), torch.ones(2, dtype=torch.float64))
        assert (metric(x, y) < 0.99).all()


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (1, 1)])
def test_ssim_names_the_images_it_is_too_large_for(size):
    with pytest.raises(UserError, match=f"at least 11 x 11 pixels, got {size[0]} x {size[1]}"):
        ssim(pictures(*size), pictures(*size))


def test_values_of_the_original_code(golden):
    data, results = golden("metrics"), golden("metrics.json")["results"]
    for name, entry in results.items():
        reference = data[entry["ref"]]
        degraded = np.rot90(reference, 2) if "rotated" in entry["deg"] else data[entry["deg"]]
        x, y = (torch.tensor(image.copy()).permute(2, 0, 1)[None].double() / 255 for image in (degraded, reference))
        assert ssim(x, y).item() == pytest.approx(entry["skimage_ssim"], abs=1e-9), name
        x, y = x.float(), y.float()
        assert ssim(x, y).item() == pytest.approx(entry["skimage_ssim"], abs=2e-6), name
        assert ssim_official(x, y).item() == pytest.approx(entry["ssim_f64"], abs=1e-5), name
        expected = math.inf if entry["psnr"] is None else entry["psnr"]
        assert psnr(x, y).item() == pytest.approx(expected, abs=1e-4), name


def test_a_shuffle_costs_nothing_in_any_order():
    x = pictures(24, 16)
    source = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    shuffled = shuffle_patches(x, source, 4)
    assert psnr_any_order(shuffled, x, 4).tolist() == [math.inf, math.inf]
    assert psnr(shuffled, x).max() < 40
    torch.testing.assert_close(psnr_any_order(shuffled + 0.1, x, 4), torch.full((2,), 20.0, dtype=torch.float64))


def test_the_order_is_the_best_there_is():
    x, y = pictures(8, 12, number=1), pictures(8, 12, number=1, seed=1)
    patches = patchify(x, 4)[0]
    orders = itertools.permutations(range(6))
    best = max(psnr(unpatchify(patches[list(order)][None], 4, (2, 3)), y).item() for order in orders)
    assert psnr_any_order(x, y, 4).item() == pytest.approx(best, abs=1e-9)
    assert best > psnr(x, y).item() + 0.01


def test_patches_must_fit():
    with pytest.raises(UserError, match="8 x 12 pixels cannot be cut into patches of 8 x 8"):
        psnr_any_order(pictures(8, 12), pictures(8, 12), 8)
