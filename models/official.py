"""The layout of the official MJP code: what its weights are called there, and here."""

import torch
from torch import Tensor

OFFICIAL_NAMES = {"dlocr.layers.": "localization.layers."}


def from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official MJP layout: one table `pos_embed.weight` whose last row is the unknown PE, head `dlocr`."""
    renamed = {}
    for key, value in weights.items():
        if key == "pos_embed.weight":
            renamed["pos_embed"], renamed["unknown_pos_embed"] = value[None, :-1], value[None, -1:]
            continue
        for old, new in OFFICIAL_NAMES.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        renamed[key] = value
    return renamed


def to_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `from_official`, so that a model trained here loads in the official code."""
    renamed = {}
    for key, value in weights.items():
        for old, new in OFFICIAL_NAMES.items():
            if key.startswith(new):
                key = old + key.removeprefix(new)
        renamed[key] = value
    if "unknown_pos_embed" in renamed:
        table = torch.cat([renamed.pop("pos_embed")[0], renamed.pop("unknown_pos_embed")[0]])
        renamed["pos_embed.weight"] = table
    return renamed
