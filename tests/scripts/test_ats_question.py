"""scripts/ats_question.py: what it prints of the policies that the search likes best."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "ats_question.py"


def test_a_quarter_of_one_policy_has_no_spread(capsys):
    rows = [{"psnr_input": 10.0 + place, "above": 2.0, "psnr": 5.0, "aware": 7.0} for place in range(4)]
    runpy.run_path(str(SCRIPT), run_name="script_under_test")["print_quarters"](rows)
    best, rest = capsys.readouterr().out.splitlines()
    assert best == "best quarter by S_pri (n = 1): psnr_input 10.00, above 2.00, psnr 5.00, aware 7.00"
    assert rest == "the rest (n = 3): psnr_input 12.00 ± 1.00, above 2.00 ± 0.00, psnr 5.00 ± 0.00, aware 7.00 ± 0.00"


def test_what_comes_back_is_compared_with_the_mean_colour_of_what_was_shown(tmp_path):
    (tmp_path / "inputs").mkdir()
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = 255  # mean 0.5, off by 0.5 everywhere: 6.02 dB
    Image.fromarray(pixels).save(tmp_path / "inputs" / "0003_cat.png")
    above = runpy.run_path(str(SCRIPT), run_name="script_under_test")["above_mean_colour"]
    assert above(tmp_path, [{"index": 3, "psnr_shown": 20.0}]) == pytest.approx(20 - 10 * np.log10(4), abs=0.05)


def test_equal_pictures_behind_an_undone_policy_count_as_100_db(tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for kind, picture in (("originals", pixels), ("reconstructions", pixels + 51)):
        (tmp_path / kind).mkdir()
        Image.fromarray(picture).save(tmp_path / kind / "0000_cat.png")
        Image.fromarray(pixels).save(tmp_path / kind / "0001_dog.png")
    aware = runpy.run_path(str(SCRIPT), run_name="script_under_test")["aware"]
    off_by_a_fifth = -20 * np.log10(0.2)
    assert aware(tmp_path, "49") == pytest.approx((100 + off_by_a_fifth) / 2, abs=1e-4)


@pytest.mark.parametrize("option", ["--images", "--iterations", "--epochs", "--accuracy"])
def test_counts_that_cannot_be_are_refused_before_the_training(option, tmp_path, monkeypatch):
    command = [str(SCRIPT), "--data", str(tmp_path), "--output", str(tmp_path / "out"), option, "-1"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match=f"{option} must be .* or more|{option} must be at least 1, got -1"):
        runpy.run_path(str(SCRIPT), run_name="script_under_test")["arguments"]()
