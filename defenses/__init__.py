"""Defences on shared gradients: functions (gradients by name, *, generator, **options) -> gradients by name.

To add one: a file with one function whose keyword arguments are its options, one line in DEFENSES, its name in
config.AttackConfig and a test that zero strength is bit-identical to no defence. MJP is not here but in the model.
"""

import torch
from torch import Tensor

from defenses.noise import noise


def no_defense(gradients: dict[str, Tensor], *, generator: torch.Generator) -> dict[str, Tensor]:
    """Share the gradients as they are."""
    return gradients


DEFENSES = {"none": no_defense, "noise": noise}
