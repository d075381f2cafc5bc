"""Verdicts of Inverting Gradients come from intervals over pictures."""

import json

import pytest
from PIL import Image

from scripts.inverting_gradients_table import collect, draw, hides, interval, reconstructs, with_kept
from utils.errors import UserError


def rows(*psnr: float, shown: float = 0.0, baseline: float = 13.0) -> list[dict]:
    return [{"image": f"cat/{k}.png", "psnr": value, "psnr_shown": value + shown, "psnr_baseline": baseline + k / 10,
             "psnr_input_baseline": baseline - k / 10, "ssim": 0.5} for k, value in enumerate(psnr)]  # fmt: skip


def reader(**victims):
    return lambda name: {"victims": victims}


def test_interval_is_students():
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5) and high == pytest.approx(4 - low)
    assert interval([5.0]) == (5.0, -float("inf"), float("inf"))


@pytest.mark.parametrize(
    ("psnr", "verdict"),
    [((27, 28, 26), "holds at"), ((20, 21, 19), "holds in part at"), ((11, 10, 11), "does not hold at"),
     ((20, 9, 14), "not decided at")],
)  # fmt: skip
def test_reconstruction_is_judged_against_the_mean_colour(psnr, verdict):
    text, found, number, n = reconstructs(reader(ConvNet=rows(*psnr), sweep=rows(10)))
    assert found.startswith(verdict) and "n = 3" in text and "sweep" not in text


def test_victims_that_differ_are_named_where_they_are_few():
    victims = {"wide": rows(27, 28, 26), "narrow": rows(20, 21, 19)}
    assert reconstructs(reader(**victims))[1] == "holds on wide; holds in part on narrow"
    found = reconstructs(reader(**victims, third=rows(28, 27, 26), fourth=rows(30, 29, 31)))[1]
    assert found == "holds on 3 of 4 victims, holds in part on 1 of 4 victims"


@pytest.mark.parametrize(
    ("shown", "verdict"),
    [(-9.0, "holds"), (-5.0, "holds in part"), (5.0, "does not hold"), (0.0, "not decided at n = 3")],
)
def test_policy_is_judged_on_the_same_pictures(shown, verdict):
    victims = {"ConvNet": rows(20, 22, 21, 40), "ATS 1-2-3, ConvNet": rows(20.1, 21.9, 21.0, shown=shown)}
    text, found, number, n = hides(reader(**victims))
    assert found == verdict and "21.0 dB without it" in text  # the fourth picture has no partner


def test_policy_that_hides_on_one_victim_alone_is_said_to():
    victims = {"wide": rows(20, 22, 21), "ATS 1-2-3, wide": rows(20, 22, 21, shown=-5.0)}
    victims |= {"narrow": rows(20, 22, 21), "ATS 1-2-3, narrow": rows(20, 22, 21, shown=-9.0)}
    assert hides(reader(**victims))[1] == "holds in part on wide; holds on narrow"


def test_pictures_under_a_policy_have_the_mean_colour_of_what_was_shown(tmp_path):
    folder = tmp_path / "ATS 1-2-3, ConvNet" / "0"
    (folder / "inputs").mkdir(parents=True)
    picture = Image.new("RGB", (4, 4), "black")
    picture.paste("white", (0, 0, 4, 2))
    picture.save(folder / "inputs" / "0003_cat.png")
    (folder / "results.json").write_text(json.dumps({"per_image": [{"index": 3, "image": "cat/3.png"}]}))
    (row,) = collect(tmp_path)["ATS 1-2-3, ConvNet"]
    assert row["psnr_input_baseline"] == pytest.approx(6.0206, abs=1e-4)  # all pixels off by a half
    (folder / "inputs" / "0003_cat.png").unlink()
    with pytest.raises(UserError, match="has no picture of what the model was shown"):
        collect(tmp_path)


def test_nothing_to_compare_is_not_decided():
    assert hides(reader(ConvNet=rows(20)))[1] == reconstructs(reader(ConvNet=rows(20)))[1] == "not decided"


def test_collect_reads_runs_and_says_where_there_are_none(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        collect(tmp_path)
    folder = tmp_path / "ConvNet, 3 iterations" / "0"
    folder.mkdir(parents=True)
    row = {"image": "data/cat/0.png", "psnr": 20.0, "psnr_masked": None, "seconds": 3.0}
    (folder / "results.json").write_text(json.dumps({"per_image": [row]}))
    assert collect(tmp_path) == {"ConvNet, 3 iterations": [{"image": "cat/0.png", "psnr": 20.0}]}


def test_figure_leaves_gaps_where_a_victim_has_no_picture(tmp_path):
    plain, policy = "ConvNet", "ATS 1-2-3, ConvNet"
    for name, places in ((plain, "01"), (policy, "0")):
        for place in places:
            for kind in ("originals", "inputs", "reconstructions"):
                folder = tmp_path / name / place / kind
                folder.mkdir(parents=True)
                Image.new("RGB", (4, 4), "red").save(folder / "0000_cat.png")
            (tmp_path / name / place / "results.json").write_text("{}")
    shown = [axes.images[0].get_array() for axes in draw(tmp_path, [plain, policy]).axes]
    assert len(shown) == 2 * 4  # original, reconstruction, the policy's input and reconstruction
    assert [int(picture.min()) for picture in shown] == [0, 0, 0, 0, 0, 0, 255, 255]


def test_kept_victims_are_those_the_runs_lack(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"victims": {"old": rows(20), "both": rows(21, 22)}}))
    victims, kept = with_kept({"both": rows(30), "new": rows(25)}, file)
    assert kept == ["old"] and victims == {"both": rows(30), "new": rows(25), "old": rows(20)}
    file.write_text("[]")
    with pytest.raises(UserError, match="is no table that --output"):
        with_kept({}, file)


@pytest.mark.parametrize("beside", ["trained", "batches of 4", "FedAvg of 2 images"])
def test_claim_is_about_single_pictures_and_untrained_networks(beside):
    assert reconstructs(reader(ConvNet=rows(27, 28), **{f"ConvNet, {beside}": rows(9, 8)}))[1] == "holds at this length"
