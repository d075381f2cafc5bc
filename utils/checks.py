"""Checks of options that name the option, the rule and the value."""

from collections.abc import Sequence

from utils.errors import UserError


def check(condition: bool, key: str, rule: str, value) -> None:
    """Raise UserError naming the option, the rule and the value unless `condition` holds."""
    if not condition:
        raise UserError(f"--{key} must be {rule}, got {value}")


def check_scale(mean: Sequence[float] | None, std: Sequence[float] | None, prefix: str = "") -> None:
    """Raise UserError unless mean and std can be those of pixels in [0, 1]; others are often meant for 0 to 255."""
    unit = "of pixels in [0, 1]"
    check(not mean or all(0 <= value <= 1 for value in mean), f"{prefix}mean", f"from 0 to 1, {unit}", mean)
    check(not std or all(0 < value <= 1 for value in std), f"{prefix}std", f"above 0 and at most 1, {unit}", std)
    for key, value in (("mean", mean), ("std", std)):
        check(not value or len(value) in (1, 3), f"{prefix}{key}", "one number, or one for each of 3 channels", value)
