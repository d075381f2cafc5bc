"""scripts/ats_accuracy.py: the cost of a policy is compared seed by seed, and wrong options end before a training."""

import sys

import pytest

from scripts.ats_accuracy import PLAIN, arguments, as_table
from utils.errors import UserError


def test_the_difference_is_that_of_the_same_seeds():
    found = {PLAIN: [50.0, 60.0, 70.0], "7-4-15": [49.0, 58.0, 67.0]}
    plain, policy = as_table(found).rows
    assert [str(value) for value in plain] == ["`none`", "3", "60.0 ± 10.0", ""]
    # -1, -2, -3: mean -2, standard deviation 1, t(0.975, 2) = 4.3027, half of the interval 4.3027 / sqrt(3) = 2.484
    assert [str(value) for value in policy] == ["`7-4-15`", "3", "58.0 ± 9.0", "-2.0 [-4.5, 0.5]"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policies", "7-4-99"], "99"),
        (["--policies", "7-4-15", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--policies", "7-4-15", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused_before_the_first_training(monkeypatch, tmp_path, options, said):
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", ["ats_accuracy.py", "--data", "none", *options, "--output", str(output)])
    with pytest.raises(UserError, match=said):
        arguments()
    assert not output.exists()
