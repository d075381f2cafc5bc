"""eval/calibration.py: stored values of the official tools, and answers that are known without them."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from eval.calibration import (
    aurra,
    calibration,
    calibration_error,
    detection,
    fit_temperature,
    predictions,
    soft_f1,
)
from utils.errors import UserError


def judged(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confidences in [0, 1] and answers that are right as often as the confidence says."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(number, generator=generator, dtype=torch.float64)
    return confidence, torch.rand(number, generator=generator, dtype=torch.float64) < confidence


@pytest.mark.parametrize("number", ["n1000", "n537"])
def test_stored_calibration(golden, number):
    arrays, stored = golden("calibration_mce"), golden("calibration_mce.json")["results"][number]
    confidence, correct = (torch.tensor(arrays[f"{number}/{name}"]) for name in ("confidence", "correct"))
    for norm, key in (("rms", "p2"), ("mean", "p1"), ("max", "pmax")):
        for bin_size in (100, 50):
            found = calibration_error(confidence, correct, bin_size=bin_size, norm=norm, legacy=True)
            assert found / 100 == pytest.approx(stored[f"calib_{key}_beta{bin_size}"], rel=1e-9)
    assert calibration_error(confidence, correct) / 100 == pytest.approx(
        stored["calib_p2_beta100_all_bins_for_info"], rel=1e-9
    )
    assert aurra(confidence, correct) / 100 == pytest.approx(stored["aurra"], rel=1e-9)
    assert soft_f1(confidence, correct) / 100 == pytest.approx(stored["soft_f1"], rel=1e-9)


@pytest.mark.parametrize("case", ["ood_a", "ood_b"])
def test_stored_detection(golden, case):
    arrays, stored = golden("calibration_mce"), golden("calibration_mce.json")["results"][case]
    foreign, known = (torch.tensor(arrays[f"{case}/{name}_score"]) for name in ("out", "in"))
    found = detection(foreign, known) | detection(foreign, known, recall=0.9)
    assert {key: value / 100 for key, value in found.items()} == pytest.approx(stored, rel=1e-9)


def test_stored_temperature_and_class_subset(golden):
    arrays, stored = golden("calibration_mce"), golden("calibration_mce.json")["results"]
    logits, labels = (torch.tensor(arrays[f"temp/{name}"]) for name in ("logits", "labels"))
    assert fit_temperature(logits, labels) == pytest.approx(stored["tune_temp"], rel=1e-3)
    logits, labels = (torch.tensor(arrays[f"msp/{name}"]) for name in ("logits", "labels"))
    logits = logits[:, torch.tensor(arrays["msp/class_mask"]).bool()]
    row = calibration(logits, labels, legacy=True)
    assert row["acc1"] / 100 == pytest.approx(stored["msp"]["accuracy"], rel=1e-9)
    assert row["aurra"] / 100 == pytest.approx(stored["msp"]["aurra"], rel=1e-9)
    assert row["rms_calibration_error"] / 100 == pytest.approx(stored["msp"]["rms_calib"], rel=1e-8)
    single = logits.softmax(1).max(1).values  # the official softmax is in float32, ours is not
    found = calibration_error(single, predictions(logits, labels)[1], legacy=True)
    assert found / 100 == pytest.approx(stored["msp"]["rms_calib"], rel=1e-7)  # its rounding is the processor's


def test_an_overconfident_constant_and_an_honest_one():
    half = torch.arange(1000) % 2 == 0
    for norm in ("rms", "mean", "max"):
        assert calibration_error(torch.full((1000,), 0.9), half, norm=norm) == pytest.approx(40)
        assert calibration_error(torch.full((1000,), 0.5), half, norm=norm) == pytest.approx(0, abs=1e-9)


def test_honest_answers_have_a_small_error():
    confidence, correct = judged(20_000)
    assert calibration_error(confidence, correct) < 5.5  # 4.1 is what bins of 100 fair coins give
    assert calibration_error(confidence, correct, bin_size=2000) < 1.5
    assert calibration_error(confidence.sqrt(), correct) > 15


def test_the_last_bin_counts_unless_legacy():
    """250 images in bins of 100 and 150; only the most confident 150 are wrong about themselves."""
    confidence = torch.cat([torch.zeros(100), torch.ones(150)])
    correct = torch.zeros(250)
    assert calibration_error(confidence, correct, norm="mean") == pytest.approx(60)
    assert calibration_error(confidence, correct) == pytest.approx(100 * 0.6**0.5)
    for norm in ("rms", "mean", "max"):
        assert calibration_error(confidence, correct, norm=norm, legacy=True) == 0
    few = torch.ones(7)
    assert calibration_error(few, few * 0) == pytest.approx(100)
    assert calibration_error(few, few * 0, legacy=True) == 0


def test_aurra_by_hand():
    confidence = torch.tensor([0.2, 0.9, 0.6])
    assert aurra(confidence, torch.tensor([True, True, False])) == pytest.approx(100 * (1 + 1 / 2 + 2 / 3) / 3)
    confidence, correct = judged(500)
    assert aurra(confidence, correct) > aurra(torch.rand(500, generator=torch.Generator().manual_seed(3)), correct)


def test_detection_agrees_with_the_definition():
    generator = torch.Generator().manual_seed(5)
    foreign, known = torch.randn(40, generator=generator) + 1, torch.randn(60, generator=generator)
    found = detection(foreign, known)
    assert found["auroc"] / 100 == pytest.approx((foreign[:, None] > known).double().mean().item())
    target = np.repeat([1, 0], [40, 60])
    assert found["aupr"] / 100 == pytest.approx(average_precision_score(target, torch.cat([foreign, known]).numpy()))
    # 38 of 40 are found from the third lowest foreign score on, and before the second lowest is reached
    second = foreign.sort().values[1]
    below = known[known > second]
    assert found["fpr95"] / 100 == pytest.approx(len(below) / 60)


def test_detection_extremes():
    high, low = torch.arange(5.0) + 10, torch.arange(7.0)
    assert detection(high, low) == {"auroc": 100, "aupr": 100, "fpr95": 0}
    assert detection(low, high)["auroc"] == 0
    assert detection(low, high)["fpr95"] == 100
    same = detection(torch.zeros(5), torch.zeros(5))
    assert (same["auroc"], same["aupr"]) == (50, 50)
    assert roc_auc_score([1, 0], [0, 0]) == 0.5
    with pytest.raises(UserError, match="got 0 and 7"):
        detection(high[:0], low)


def test_temperature_of_labels_drawn_from_the_softmax_itself():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-3)


def test_row_of_a_labelled_set():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    row = calibration(logits, torch.tensor([0, 1, 1]))
    assert row["acc1"] == pytest.approx(200 / 3)
    assert row["images"] == 3
    assert row["confidence"] / 100 == pytest.approx(logits.double().softmax(1).max(1).values.mean().item())
    assert row["rms_calibration_error"] == pytest.approx(abs(row["confidence"] - row["acc1"]))


def test_refusals():
    with pytest.raises(UserError, match=r"expected logits \(N, K\) and labels \(N,\)"):
        predictions(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(UserError, match="NaN or infinite"):
        predictions(torch.full((1, 2), float("nan")), torch.zeros(1))
