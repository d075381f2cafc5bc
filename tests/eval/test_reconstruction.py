"""eval/mse.py, psnr_ssim.py and reconstruction.py: known values, scikit-image's numbers, summaries and extremes."""

import math
import statistics

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from eval.mse import mse
from eval.psnr_ssim import psnr, ssim
from eval.reconstruction import finite, score, summarize
from models.jigsaw import shuffle_patches

KEYS = ["mse", "psnr", "ssim", "psnr_shown", "psnr_visible", "psnr_visible_raw", "exact_pixels"]
NOTHING_HIDDEN = torch.zeros(1, 16, dtype=torch.bool)


def pictures(number: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth colours with some noise, in [0.2, 0.8]: room for errors on both sides."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 4, 4, generator=generator, dtype=torch.float64)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear", align_corners=False)
    noise = torch.rand(number, 3, side, side, generator=generator, dtype=torch.float64)
    return 0.2 + 0.6 * (0.9 * smooth + 0.1 * noise)


def golden_pairs(data: dict, results: dict) -> dict[str, tuple[Tensor, Tensor]]:
    """Degraded image and reference in [0, 1] of every stored pair."""
    pairs = {}
    for name, entry in results.items():
        reference = data[entry["ref"]]
        degraded = np.rot90(reference, 2) if "rotated" in entry["deg"] else data[entry["deg"]]
        pairs[name] = tuple(
            torch.tensor(image.copy()).permute(2, 0, 1)[None].double() / 255 for image in (degraded, reference)
        )
    return pairs


def test_scores_equal_the_stored_ones(golden):
    data, results = golden("metrics"), golden("metrics.json")["results"]
    for name, (degraded, reference) in golden_pairs(data, results).items():
        expected = results[name]
        assert mse(degraded, reference).item() == pytest.approx(expected["mse_f64"], rel=1e-5), name
        wanted = math.inf if expected["psnr"] is None else expected["psnr"]
        assert psnr(degraded, reference).item() == pytest.approx(wanted, abs=1e-3), name
        assert ssim(degraded, reference).item() == pytest.approx(expected["skimage_ssim"], abs=1e-6), name
        small = (degraded.float(), reference.float())
        assert psnr(*small).item() == pytest.approx(wanted, abs=1e-3), name


@pytest.mark.parametrize(("offset", "decibels"), [(0.1, 20), (-0.1, 20), (0.01, 40), (1e-5, 100)])
def test_a_constant_offset_has_a_known_error(offset, decibels):
    x = pictures()
    torch.testing.assert_close(mse(x + offset, x), torch.full((3,), offset**2, dtype=torch.float64))
    torch.testing.assert_close(psnr(x + offset, x), torch.full((3,), float(decibels), dtype=torch.float64))


def test_the_error_is_a_mean_over_channels_and_pixels():
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)
    y[0, 1, 2, 3] = 0.5
    assert mse(x, y).tolist() == [0.25 / 60, 0]
    assert mse(y, x).tolist() == [0.25 / 60, 0]


def test_equal_images_are_perfect():
    x = pictures()
    assert mse(x, x).tolist() == [0, 0, 0]
    assert psnr(x, x).tolist() == [math.inf] * 3
    torch.testing.assert_close(ssim(x, x), torch.ones(3, dtype=torch.float64))


def test_ssim_is_scikit_images_for_every_image():
    x, y = pictures(), pictures(seed=1) * 0.3 + pictures() * 0.7
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for place, value in enumerate(ssim(x, y).tolist()):
        channels = [structural_similarity(x[place, c].numpy(), y[place, c].numpy(), **options) for c in range(3)]
        assert value == pytest.approx(statistics.fmean(channels), abs=1e-12)
        assert 0.1 < value < 0.99


@pytest.mark.parametrize("metric", [mse, psnr, ssim])
def test_values_do_not_depend_on_the_rest_of_the_batch(metric):
    x, y = pictures(), pictures(seed=1)
    together = metric(x, y)
    assert together.shape == (3,)
    assert together.dtype == torch.float64
    assert len(set(together.tolist())) == 3
    for place in range(3):
        assert metric(x[place : place + 1], y[place : place + 1]).equal(together[place : place + 1])


def test_every_score_of_a_perfect_reconstruction():
    x = pictures()
    scores = score(x, x, x, NOTHING_HIDDEN, 8)
    assert list(scores) == KEYS
    assert all(value.shape == (3,) for value in scores.values())
    assert scores["mse"].tolist() == [0, 0, 0]
    assert scores["exact_pixels"].tolist() == [100, 100, 100]
    for key in ("psnr", "psnr_shown", "psnr_visible", "psnr_visible_raw"):
        assert scores[key].tolist() == [math.inf] * 3
    torch.testing.assert_close(scores["ssim"], torch.ones(3, dtype=torch.float64))


def test_scores_tell_the_original_from_what_the_model_saw():
    x = pictures()
    hidden = (torch.arange(16) < 4)[None]
    source = torch.arange(16)
    source[:4] = source[:4].roll(1)
    shown = shuffle_patches(x, source[None], 8)
    scores = score(x, shown, shown, hidden, 8)
    torch.testing.assert_close(scores["psnr"], psnr(shown, x))
    torch.testing.assert_close(scores["ssim"], ssim(shown, x))
    assert scores["psnr"].isfinite().all()
    assert scores["psnr_shown"].tolist() == scores["psnr_visible"].tolist() == [math.inf] * 3
    assert scores["exact_pixels"].tolist() == [100, 100, 100]


def test_visible_scores_leave_out_the_hidden_patches():
    x = pictures()
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[0, :4] = hidden[1, 5] = True
    reconstruction = x + 0.1
    reconstruction[0, :, :8] = 0.5  # the first four patches are the first eight rows
    reconstruction[1, :, 8:16, 8:16] = 0.5
    scores = score(x, x, reconstruction, hidden, 8)
    for key in ("psnr_visible", "psnr_visible_raw"):
        torch.testing.assert_close(scores[key], torch.full((3,), 20.0, dtype=torch.float64))
    assert (scores["psnr"][:2] - 20).abs().min() > 0.01
    assert scores["psnr"][2].item() == pytest.approx(20)


def test_one_mask_serves_every_image():
    x, hidden = pictures(), torch.arange(16)[None] < 5
    one, each = (score(x, x, x + 0.1, mask, 8) for mask in (hidden, hidden.expand(3, -1)))
    assert one["psnr_visible"].equal(each["psnr_visible"])


def test_reconstructions_are_clamped_but_for_the_raw_score():
    x = torch.ones(2, 3, 32, 32)
    x[1] = 0
    reconstruction = x + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1)
    scores = score(x, x, reconstruction, NOTHING_HIDDEN, 8)
    for key in ("psnr", "psnr_shown", "psnr_visible"):
        assert scores[key].tolist() == [math.inf, math.inf]
    assert scores["exact_pixels"].tolist() == [100, 100]
    assert scores["psnr_visible_raw"].tolist() == pytest.approx([20, 20], abs=1e-5)


def test_exact_pixels_count_equal_bytes():
    x = (torch.arange(3 * 32 * 32) % 256).view(1, 3, 32, 32) / 255
    reconstruction = x + 0.4 / 255
    assert score(x, x, reconstruction, NOTHING_HIDDEN, 8)["exact_pixels"].item() == 100
    reconstruction[:, :, :16] += 0.2 / 255  # the upper half of every channel rounds to the next byte, but for 255
    unchanged = (x[:, :, :16] == 1).sum() + x[:, :, 16:].numel()
    share = score(x, x, reconstruction, NOTHING_HIDDEN, 8)["exact_pixels"].item()
    assert share == pytest.approx(100 * unchanged.item() / x.numel())


def test_with_everything_hidden_the_visible_scores_are_undefined():
    x = pictures()
    scores = score(x, x, x + 0.1, ~NOTHING_HIDDEN, 8)
    assert scores["psnr_visible"].isnan().all()
    assert scores["psnr_visible_raw"].isnan().all()
    assert scores["psnr"].tolist() == pytest.approx([20, 20, 20])


@pytest.mark.parametrize(("side", "defined"), [(8, False), (10, False), (11, True), (12, True)])
def test_ssim_is_undefined_for_images_smaller_than_its_window(side, defined):
    x = pictures(2, side)
    scores = score(x, x, x + 0.01, torch.zeros(1, 1, dtype=torch.bool), side)
    assert scores["ssim"].isnan().tolist() == [not defined] * 2
    assert scores["psnr"].tolist() == pytest.approx([40, 40])


def test_summaries_hold_mean_and_sample_deviation():
    rows = [{"psnr": value, "other": "x"} for value in (10.0, 20.0, 60.0)]
    assert summarize(rows, ["psnr"]) == {
        "psnr": {"mean": 30.0, "std": pytest.approx(statistics.stdev([10, 20, 60])), "n": 3}
    }


def test_summaries_count_perfect_and_leave_out_undefined_values():
    rows = [{"psnr": value} for value in (10.0, math.inf, 30.0, math.nan, None, math.inf)]
    summary = summarize(rows, ["psnr"])["psnr"]
    assert summary == {"mean": 20.0, "std": pytest.approx(200**0.5), "n": 2, "infinite": 2}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], {"mean": 5.0, "std": None, "n": 1}),
        ([], {"mean": None, "std": None, "n": 0}),
        ([math.nan, None], {"mean": None, "std": None, "n": 0}),
        ([math.inf], {"mean": None, "std": None, "n": 0, "infinite": 1}),
    ],
)
def test_summaries_of_few_values(values, expected):
    assert summarize([{"ssim": value} for value in values], ["ssim"]) == {"ssim": expected}


def test_finite_replaces_what_json_cannot_hold():
    row = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.5, "e": 0, "f": True, "g": "inf", "h": None}
    assert finite(row) == {**row, "a": None, "b": None, "c": None}
    assert math.isinf(row["a"])
