"""Averages over mask seeds and the intervals around them."""

import math

import pytest
from scipy.stats import binomtest, norm

from eval.ratios import average, wilson


def test_average_reports_the_spread_over_mask_draws():
    rows = [{"mask_ratio": 0.5, "loss": value, "images": 7} for value in (10.0, 20.0, 30.0)]
    assert average(rows, ["loss"]) == {"mask_ratio": 0.5, "loss": 20.0, "images": 7, "seeds": 3, "loss_std": 10.0}
    assert average(rows[:1], ["loss"])["loss_std"] == 0


@pytest.mark.parametrize(("right", "number"), [(0, 5), (1, 1), (3, 5), (50, 50), (37, 500), (49999, 50000)])
def test_wilson_equals_scipy(right, number):
    expected = binomtest(right, number).proportion_ci(0.95, method="wilson")
    assert wilson(100 * right / number, number) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_shares_of_images_get_wilson_intervals():
    rows = [{"mask_ratio": 0.5, "consistency": value, "images": 200} for value in (80.0, 90.0)]
    merged = average(rows, ["consistency"])
    expected = binomtest(170, 200).proportion_ci(0.95, method="wilson")
    assert (merged["consistency_low"], merged["consistency_high"]) == pytest.approx(
        (100 * expected.low, 100 * expected.high)
    )
    assert merged["consistency_std"] == pytest.approx(math.sqrt(50))


def test_means_over_images_get_normal_intervals():
    rows = [{"mask_ratio": 0.5, "diff_norm": 2.0, "diff_norm_image_std": std, "images": 25} for std in (3.0, 4.0)]
    merged = average(rows, ["diff_norm"])
    assert merged["diff_norm_image_std"] == pytest.approx(math.sqrt(12.5))
    assert merged["diff_norm_high"] - 2 == 2 - merged["diff_norm_low"]
    assert merged["diff_norm_high"] == pytest.approx(2 + norm.ppf(0.975) * math.sqrt(12.5) / 5)
