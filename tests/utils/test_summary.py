"""utils/summary.py: infinite scores are measured ones."""

import json
import math

from utils.summary import decibels, level, spread, summarise


def of(*values: float) -> dict:
    return summarise([{"psnr": value} for value in values], "psnr")


def test_perfect_copies_are_counted_and_leave_mean_and_spread_alone():
    some, all_of_them = of(30.0, 34.0, math.inf), of(math.inf, math.inf)
    assert (some["mean"], some["n"], some["perfect"], some["best"]) == (32.0, 3, 1, None)
    assert spread(some) == "32.0 ± 2.8 and 1 perfect" and level(some) == 32.0
    assert (all_of_them["mean"], all_of_them["n"], all_of_them["perfect"]) == (None, 2, 2)
    assert level(all_of_them) == math.inf > level(of(299.0)) and decibels(all_of_them) == "perfect, infinite"
    json.dumps([some, all_of_them], allow_nan=False)


def test_undefined_and_absent_scores_are_not_measured():
    for nothing in (of(math.nan), of(), summarise([{"psnr": None}, {}], "psnr")):
        assert nothing["n"] == 0 and level(nothing) == -math.inf and decibels(nothing) == "undefined"
    assert of(math.nan, 20.0)["n"] == 1
