"""Tables of gradient matching: a gain is that of the same picture from the same start."""

from scripts.results_page import gradvit_mjp, polish


def test_the_gain_of_a_start_is_picture_by_picture(monkeypatch):
    def row(early: float, late: float, **more) -> dict:
        scores = {"mean_colour": 15.0, "closed_form": early, "polished_closed_form": late}
        scores |= {"defense_aware": 30.0, "polished_defense_aware": 20.0}
        return {"weights": "random", "defence": "prune", "options": {"ratio": 0.1}, **scores, **more}

    rows = [row(20.0, 21.0), row(30.0, 32.0), row(10.0, 120.0, most_steps=20)]
    monkeypatch.setitem(polish.__globals__, "read", lambda name: {"images": rows})
    lines = [line.split(" | ") for line in polish().splitlines()[2:]]
    assert lines[0][0] == "| prune, ratio 0.1, random weights, `closed_form`, 8 steps"
    # gains 1 and 2: mean 1.5, standard deviation 0.7071, t(0.975, 1) = 12.706, half 12.706 * 0.7071 / sqrt(2) = 6.353
    assert lines[0][1:] == ["2", "15.0 ± 0.0", "25.0 ± 7.1", "26.5 ± 7.8", "1.5 [-4.9, 7.9]", "2 of 2", "0 of 2 |"]
    assert lines[1][-3:] == ["-10.0 [-10.0, -10.0]", "0 of 2", "0 of 2 |"]
    assert lines[2][0].endswith("20 steps") and lines[2][-1] == "1 of 1 |"


def test_matching_with_and_without_mjp_stand_beside_each_other(monkeypatch):
    def summary(psnr: float) -> dict:
        measures = {"psnr": psnr, "psnr_baseline": 13.0, "ssim": 0.05, "lpips_alex_unverified": 0.9, "seconds": 300.0}
        return {key: {"mean": value, "std": 1.0, "n": 4} for key, value in measures.items()} | {"images": 4}

    found = {"data": "DeiT-S", "attacks": {"DeiT-S: gradvit": {"0": summary(11.5), "0.27": summary(11.6)}}}
    monkeypatch.setitem(polish.__globals__, "read", lambda name: found)
    _, _, plain, masked, _, data = gradvit_mjp().splitlines()
    assert plain.startswith("| no mask | 4 | 11.50 ± 1.00 | 13.00 ± 1.00 |")
    assert masked.startswith("| MJP at 0.27 | 4 | 11.60 ± 1.00 |") and data == "DeiT-S."
