"""No metric makes a number out of nothing: NaN at best, and a perfect score at worst."""

import pytest
import torch

from defenses.ats.scores import accuracy_score
from eval.calibration import aurra, calibration, calibration_error, detection, fit_temperature, predictions, soft_f1
from eval.fft2d import fft2d
from eval.mce import mce, mce_unnormalised, relative_mce
from eval.mse import mse
from eval.psnr_ssim import psnr, psnr_any_order, ssim, ssim_official
from eval.ratios import average, wilson
from eval.reconstruction import score
from utils.errors import UserError
from utils.statistics import success

IMAGES, VALUES, LABELS = torch.zeros(0, 3, 16, 16), torch.zeros(0), torch.zeros(0, dtype=torch.long)
LOGITS, WRONG, MASK = torch.zeros(0, 3), torch.zeros(0, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
METRICS = {
    "mse": lambda: mse(IMAGES, IMAGES),
    "psnr": lambda: psnr(IMAGES, IMAGES),
    "psnr_any_order": lambda: psnr_any_order(IMAGES, IMAGES, 8),
    "ssim": lambda: ssim(IMAGES, IMAGES),
    "ssim_official": lambda: ssim_official(IMAGES, IMAGES),
    "fft2d": lambda: fft2d(IMAGES, IMAGES),
    "score": lambda: score(IMAGES, IMAGES, IMAGES, MASK, 8),
    "success": lambda: success([]),
    "predictions": lambda: predictions(LOGITS, LABELS),
    "calibration": lambda: calibration(LOGITS, LABELS),
    "calibration_error": lambda: calibration_error(VALUES, WRONG),
    "aurra": lambda: aurra(VALUES, WRONG),
    "soft_f1": lambda: soft_f1(VALUES, WRONG),
    "temperature": lambda: fit_temperature(LOGITS, LABELS),
    "detection": lambda: detection(VALUES, VALUES),
    "average": lambda: average([], ["acc1"]),
    "wilson": lambda: wilson(50.0, 0),
    "mce": lambda: mce({}),
    "mce_unnormalised": lambda: mce_unnormalised({}),
    "relative_mce": lambda: relative_mce({}, 20.0),
    "ATS accuracy score": lambda: accuracy_score(torch.zeros(0, 4)),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_refuse_empty_input(name):
    with pytest.raises(UserError) as error:
        METRICS[name]()
    assert str(error.value).isprintable()
