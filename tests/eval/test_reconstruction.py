"""eval/mse.py, psnr_ssim.py, assignment.py and reconstruction.py: known values, other libraries' numbers, extremes."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from eval.assignment import assign, match_batch, order_free_error
from eval.mse import mse
from eval.psnr_ssim import psnr, ssim
from eval.reconstruction import score, score_batch
from models.jigsaw import patchify, shuffle_patches
from utils.statistics import RECOVERED, finite, success, summarize

KEYS = [
    "psnr", "ssim", "mse", "fft2d", "psnr_shown", "psnr_visible", "psnr_visible_raw", "psnr_masked", "psnr_patches",
    "patches_recovered", "exact_pixels", "psnr_baseline",
]  # fmt: skip
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
    assert scores["patches_recovered"].tolist() == [100, 100, 100]
    for key in ("psnr", "psnr_shown", "psnr_visible", "psnr_visible_raw", "psnr_patches"):
        assert scores[key].tolist() == [math.inf] * 3
    assert scores["psnr_masked"].isnan().all()  # nothing is hidden
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
    assert scores["psnr_masked"].tolist() == scores["psnr_patches"].tolist() == [math.inf] * 3  # all but the order
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


@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_assignment_has_the_least_total_error_of_all_orders(number):
    generator = torch.Generator().manual_seed(number)
    targets = torch.rand(number, 7, generator=generator)
    rows = targets[torch.randperm(number, generator=generator)] + 0.4 * torch.rand(number, 7, generator=generator)

    def total(order) -> float:
        return (rows[list(order)] - targets).double().square().sum().item()

    best = min(itertools.permutations(range(number)), key=total)
    assert total(assign(rows, targets).tolist()) == pytest.approx(total(best), rel=1e-9)


def test_assignment_is_one_to_one_where_the_nearest_is_not():
    targets, rows = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([[0.05], [4.0], [9.0]])
    assert assign(rows, targets).tolist() == [0, 1, 2]
    assert assign(rows.flip(0), targets).tolist() == [2, 1, 0]


def test_assignment_leaves_undefined_rows_to_what_nothing_else_fits():
    targets = torch.eye(4)
    rows = targets[[2, 0, 3, 1]].clone()
    rows[1] = math.nan
    assert assign(rows, targets).tolist() == [1, 3, 0, 2]
    assert sorted(assign(rows * math.nan, targets).tolist()) == [0, 1, 2, 3]
    assert assign(rows[[1, 0, 2, 3]] + 0.1, targets[1:]).tolist() == [3, 1, 2]  # a fourth row that nobody needs
    assert assign(torch.tensor([[math.inf], [9.0], [5.0]]), torch.tensor([[0.0], [1.0]])).tolist() == [2, 1]


def test_a_batch_is_put_into_the_order_of_its_targets():
    x = pictures(6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    found = (x + 0.3 * pictures(6, seed=9))[order]
    assert found[match_batch(found, x)].equal(found[order.argsort()])
    assert match_batch(x[:1] * math.nan, x[:1]).tolist() == [0]


def test_matching_clamps_what_scores_clamp():
    x = torch.stack([torch.ones(3, 8, 8), torch.full((3, 8, 8), 0.6)])
    overshot = torch.stack([torch.full((3, 8, 8), 0.7), torch.full((3, 8, 8), 30.0)])
    assert match_batch(overshot, x).tolist() == [1, 0]


def test_masked_patches_are_compared_as_a_set():
    x = pictures()
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, :5] = hidden[2, 7] = True
    source = torch.arange(16).repeat(3, 1)
    source[:, :5] = source[:, :5].roll(2, 1)
    found = shuffle_patches(x + 0.01, source, 8)
    found[:, :, 16:] = 0.5  # visible patches, which are another score's
    expected = torch.full((3,), 40.0, dtype=torch.float64)
    expected[2] = 10 * math.log10(1 / (x[2, :, 8:16, 24:] + 0.01 - x[2, :, 8:16, 24:]).square().mean().item())
    scores = score(x, x, found, hidden, 8)
    torch.testing.assert_close(scores["psnr_masked"], expected)
    errors = order_free_error(found, x, 8, hidden)
    assert [len(error) for error in errors] == [5, 5, 6]
    assert (scores["psnr_masked"] > scores["psnr"] + 5).all()


def test_the_score_of_patches_in_any_order_equals_the_best_rearrangement():
    x = pictures(2, side=16)
    found = (x + 0.2 * (pictures(2, side=16, seed=4) - 0.5)).clamp(0, 1)
    shuffled = shuffle_patches(found, torch.tensor([[2, 0, 3, 1], [3, 2, 1, 0]]), 8)
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    best = torch.stack(
        [score(x, x, shuffle_patches(found, torch.tensor([order]), 8), nothing, 8)["psnr"]
         for order in itertools.permutations(range(4))]
    ).max(0).values  # fmt: skip
    for images in (found, shuffled):
        scores = score(x, x, images, nothing, 8)
        torch.testing.assert_close(scores["psnr_patches"], best)
        assert (scores["psnr_patches"] > scores["psnr"] - 1e-9).all()


def test_recovered_patches_are_counted_in_any_order():
    x = pictures()
    found = torch.rand(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    offset = 10 ** (-RECOVERED / 20)
    found[:, :, :8] = x[:, :, :8] + 0.99 * offset  # the first four patches
    found[:, :, 8:16] = x[:, :, 8:16] + 1.01 * offset  # the next four just miss it
    order = torch.randperm(16, generator=torch.Generator().manual_seed(6))[None]
    for images in (found, shuffle_patches(found, order, 8)):
        assert score(x, x, images, NOTHING_HIDDEN, 8)["patches_recovered"].tolist() == [25, 25, 25]


def test_the_baseline_is_what_the_mean_colour_scores():
    x = pictures()
    deviation = (patchify(x, 32).view(3, 3, -1) - x.mean((2, 3))[..., None]).square().mean((1, 2)).sqrt()
    scores = score(x, x, torch.zeros_like(x), NOTHING_HIDDEN, 8)
    torch.testing.assert_close(scores["psnr_baseline"], -20 * deviation.log10())
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    torch.testing.assert_close(score(x, x, mean, NOTHING_HIDDEN, 8)["psnr"], scores["psnr_baseline"])
    flat = torch.full((1, 3, 32, 32), 0.25)
    assert score(flat, flat, flat, NOTHING_HIDDEN, 8)["psnr_baseline"].tolist() == [math.inf]


def test_more_scores_compare_the_clamped_reconstruction_with_the_original():
    x, seen = pictures(), []

    def largest(reconstruction: Tensor, original: Tensor) -> Tensor:
        seen.append((reconstruction, original))
        return (reconstruction - original).abs().flatten(1).max(1).values

    scores = score(x, x.flip(2), x + 3, NOTHING_HIDDEN, 8, extra={"largest": largest})
    assert list(scores) == [*KEYS, "largest"]
    assert seen[0][0].equal(torch.ones_like(x)) and seen[0][1].equal(x)
    assert scores["largest"].equal(1 - x.flatten(1).min(1).values)


def test_batches_are_judged_in_the_order_of_their_originals():
    x = pictures(5)
    found = (x + torch.linspace(0.01, 0.05, 5).view(5, 1, 1, 1)).double()
    order, labels = torch.tensor([3, 1, 4, 0, 2]), torch.arange(5)
    extra = {"twice": lambda a, b: 2 * mse(a, b)}
    views, rows = score_batch(x, x, found[order], NOTHING_HIDDEN, labels, None, 8, extra)
    assert list(views) == ["originals", "reconstructions"]
    assert views["originals"].equal(x) and views["reconstructions"].equal(found)
    assert [row["psnr"] for row in rows] == pytest.approx([-20 * math.log10(offset / 100) for offset in range(1, 6)])
    assert [row["twice"] for row in rows] == pytest.approx([2 * row["mse"] for row in rows])
    assert [row["label"] for row in rows] == [0, 1, 2, 3, 4]
    assert list(rows[0]) == ["label", *KEYS, "twice"]


def test_what_the_model_saw_is_shown_where_it_differs():
    x, hidden = pictures(2), (torch.arange(16) < 2)[None]
    for shown, differs in ((x.flip(2), True), (x.clone(), False)):
        views, _ = score_batch(x, shown, x, hidden, torch.zeros(2), None, 8)
        assert ("inputs" in views) == differs
        assert not differs or views["inputs"].equal(shown)


@pytest.mark.parametrize(
    ("labels", "found", "right"),
    [([3], [3], [100]), ([3], [4], [0]), ([1, 2, 2, 5], [2, 5, 1, 1], [100, 100, 0, 100]), ([7, 7], [7, 7], [100] * 2)],
)
def test_found_labels_count_in_any_order_but_once(labels, found, right):
    x = pictures(len(labels))
    _, rows = score_batch(x, x, x, NOTHING_HIDDEN, torch.tensor(labels), torch.tensor(found), 8)
    assert [row["label_found"] for row in rows] == right


def test_an_undefined_reconstruction_has_undefined_scores_and_spoils_no_other():
    x = pictures()
    found = x + 0.1
    found[1] = math.nan
    hidden = (torch.arange(16) < 4)[None]
    scores, alone = score(x, x, found, hidden, 8), score(x[::2], x[::2], found[::2], hidden, 8)
    for key in KEYS:
        assert scores[key][::2].equal(alone[key]), key
    for key in ("mse", "psnr", "ssim", "psnr_shown", "psnr_visible", "psnr_masked", "psnr_patches"):
        assert scores[key][1].isnan(), key
    assert scores["exact_pixels"][1] == scores["patches_recovered"][1] == 0


def test_one_mask_serves_every_image():
    x, hidden = pictures(), torch.arange(16)[None] < 5
    one, each = (score(x, x, x + 0.1, mask, 8) for mask in (hidden, hidden.expand(3, -1)))
    for key in KEYS:
        assert one[key].equal(each[key]), key


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
        ([math.nan, None], {"mean": None, "std": None, "n": 0}),
        ([math.inf], {"mean": None, "std": None, "n": 0, "infinite": 1}),
    ],
)
def test_summaries_of_few_values(values, expected):
    assert summarize([{"ssim": value} for value in values], ["ssim"]) == {"ssim": expected}


def test_metrics_no_row_has_are_left_out_of_the_summary():
    rows = [{"psnr": 10.0, "rank": 3}, {"psnr": 30.0, "lpips": 0.5}]
    assert list(summarize(rows, ["lpips", "psnr", "fft2d"])) == ["lpips", "psnr"]
    assert summarize(rows, ["lpips"])["lpips"] == {"mean": 0.5, "std": None, "n": 1}


def test_success_is_the_share_above_a_threshold_that_comes_with_it():
    rows = [{"psnr": value} for value in (24.9, 25.0, 25.1, math.inf, math.nan, None, -math.inf, 40.0)]
    found = success(rows)
    assert (found["mean"], found["n"], found["metric"], found["threshold"]) == (3 / 8, 8, "psnr", 25.0)
    assert found["std"] == pytest.approx(statistics.stdev([0, 0, 1, 1, 0, 0, 0, 1]))
    assert success(rows, 30.0)["mean"] == 2 / 8
    assert success([{"ssim": 0.9}], key="ssim", threshold=0.8)["mean"] == 1


def test_finite_replaces_what_json_cannot_hold():
    row = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.5, "e": 0, "f": True, "g": "inf", "h": None}
    assert finite(row) == {**row, "a": None, "b": None, "c": None}
    assert math.isinf(row["a"])
