"""eval/fft2d.py: what is computed from pixels equals the formula on Fourier coefficients."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.fft2d import VARIANTS, fft2d
from utils.errors import UserError


def images(height: int, width: int, seed: int, number: int = 3) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_transform(x: Tensor, y: Tensor, variant: str) -> list[float]:
    """The definition, with NumPy."""
    values = []
    for a, b in zip(x.numpy(), y.numpy(), strict=True):
        u, v = np.fft.fft2(a).ravel(), np.fft.fft2(b).ravel()
        if variant == "magnitude":
            u, v = np.abs(u), np.abs(v)
        other_u, other_v = (u, v) if variant == "legacy" else (u.conj(), v.conj())
        values.append(min(2.0, abs(1 - (u * other_v).sum() / np.sqrt((u * other_u).sum() * (v * other_v).sum()))))
    return values


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(16, 16), (15, 15), (9, 14), (1, 6)])
def test_equals_the_fourier_transform(variant, size):
    x, y = images(*size, seed=0), images(*size, seed=1)
    assert fft2d(x, y, variant=variant).tolist() == pytest.approx(by_transform(x, y, variant), rel=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_close_images_keep_their_digits_in_float32(variant):
    x = images(32, 32, seed=0).float()
    y = x + 1e-3 * (images(32, 32, seed=1).float() - 0.5)
    expected = by_transform(x.double(), y.double(), variant)
    assert max(expected) < 1e-6
    assert fft2d(x, y, variant=variant).tolist() == pytest.approx(
        expected, rel=2e-3 if variant == "magnitude" else 1e-4
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_images_have_no_distance_and_black_ones_no_defined_one(variant):
    x = images(8, 8, seed=0)
    assert fft2d(x, x, variant=variant).tolist() == [0, 0, 0]
    y = x.clone()
    y[1] = 0
    assert fft2d(x, y, variant=variant).isnan().tolist() == [False, True, False]
    assert fft2d(y, x, variant=variant).isnan().tolist() == [False, True, False]


def test_conjugated_is_the_cosine_distance_of_the_pixels():
    x, y = images(10, 12, seed=0), images(10, 12, seed=1)
    cosine = torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1))
    torch.testing.assert_close(fft2d(x, y, variant="conjugated"), 1 - cosine)


def test_only_magnitude_is_blind_to_translation():
    x = images(12, 12, seed=0)
    moved = x.roll((3, 5), (2, 3))
    assert fft2d(x, moved, variant="magnitude").max() < 1e-12
    assert fft2d(x, moved, variant="conjugated").min() > 0.01


def test_legacy_is_the_default_and_does_not_see_a_point_reflection_as_such():
    x, y = images(12, 12, seed=0), images(12, 12, seed=1)
    reflected = [images.flip((2, 3)).roll((1, 1), (2, 3)) for images in (x, y)]
    torch.testing.assert_close(fft2d(*reflected), fft2d(x, y))
    torch.testing.assert_close(fft2d(x, y), fft2d(x, y, variant="legacy"))


def test_values_of_the_original_code(golden):
    data, results = golden("metrics"), golden("metrics.json")["results"]
    for name, entry in results.items():
        reference = data[entry["ref"]]
        degraded = np.rot90(reference, 2) if "rotated" in entry["deg"] else data[entry["deg"]]
        x, y = (torch.tensor(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in (degraded, reference))
        assert fft2d(x, y).item() == pytest.approx(entry["fft2d_formula_f64"], rel=1e-5, abs=1e-12), name
        assert fft2d(x, y).item() == pytest.approx(entry["fft2d"], rel=1e-4, abs=1e-7), name
        conjugated = fft2d(x, y, variant="conjugated").item()
        assert conjugated == pytest.approx(entry["fft2d_hermitian_for_info"], rel=1e-5, abs=1e-12), name


def test_a_misspelt_variant_is_named():
    with pytest.raises(UserError, match="did you mean 'conjugated'"):
        fft2d(images(4, 4, 0), images(4, 4, 1), variant="conjugate")
