"""eval/mse.py: known values, precision, and what every metric refuses."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.fft2d import fft2d
from eval.mse import CHUNK, chunks, comparable, mse
from eval.psnr_ssim import psnr, psnr_any_order, ssim, ssim_official
from utils.errors import UserError

METRICS = [mse, psnr, ssim, ssim_official, fft2d, lambda x, y: psnr_any_order(x, y, 4)]


def batch(number: int, seed: int, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (16, 12)) -> Tensor:
    return torch.rand(number, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_known_value():
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    y[0, 1, 2, 3] = 0.5
    assert mse(x, y).tolist() == [0.25 / 60, 0]


def test_float32_images_keep_a_float64_mean():
    x, y = batch(1, 0, size=(200, 300)), batch(1, 1, size=(200, 300))
    exact = np.square(x.numpy().astype(np.float64) - y.numpy()).mean()
    assert mse(x, y).dtype == torch.float64
    assert mse(x, y).item() == pytest.approx(exact, rel=2e-8)


def test_stored_values(golden):
    data, results = golden("metrics"), golden("metrics.json")["results"]
    for name, entry in results.items():
        reference = data[entry["ref"]]
        degraded = np.rot90(reference, 2) if "rotated" in entry["deg"] else data[entry["deg"]]
        x, y = (torch.tensor(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in (degraded, reference))
        assert mse(x, y).item() == pytest.approx(entry["mse_f64"], rel=1e-6), name


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("number", [1, CHUNK, CHUNK + 3])
def test_every_metric_gives_one_value_per_image_whatever_the_batch(metric, number):
    x, y = batch(number, 0), batch(number, 1)
    together = metric(x, y)
    assert together.shape == (number,)
    assert together.dtype == torch.float64
    assert len(set(together.tolist())) == number
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(number)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_leaves_its_arguments_alone_and_takes_any_layout(metric):
    x, y = batch(2, 0), batch(2, 1)
    value = metric(x, y)
    assert x.equal(batch(2, 0)) and y.equal(batch(2, 1))
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(metric(strided, y.clone().requires_grad_()), value)
    assert not metric(x, y.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_carries_nan_to_its_image_alone(metric):
    x, y = batch(3, 0), batch(3, 1)
    x[1, 0, 5, 5] = torch.nan
    assert metric(x, y).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (torch.zeros(1, 3, 16, 12), "(2, 3, 16, 12) and (1, 3, 16, 12)"),  # must not be repeated for both
        (torch.zeros(2, 3, 12, 16), "(2, 3, 12, 16)"),
        (torch.zeros(2, 3, 16, 12, dtype=torch.uint8), "uint8"),  # must not wrap
    ],
)
def test_every_metric_refuses_what_does_not_compare(metric, other, named):
    with pytest.raises(UserError) as error:
        metric(batch(2, 0), other)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_images_are_compared_in_the_wider_precision_and_never_below_float32():
    x = batch(2, 0)
    assert comparable(x, x.double())[0].dtype == torch.float64
    assert comparable(x.half(), x.bfloat16())[0].dtype == torch.float32
    assert comparable(x, x)[1].dtype == torch.float32
    for wrong in (x[0], x[:0]):
        with pytest.raises(UserError):
            comparable(wrong, wrong)


def test_chunks_hold_every_image_once():
    x = batch(7, 0)
    pieces = list(chunks(x, x, 3))
    assert [len(a) for a, _ in pieces] == [3, 3, 1]
    assert torch.cat([b for _, b in pieces]).equal(x)
