"""The layout of the official MJP code: what its weights are called there, and here."""

import torch
from torch import Tensor

OFFICIAL_NAMES = {"dlocr.layers.": "localization.layers."}
SWIN_TABLE = "absolute_pos_embed"  # what Swins call their table of positions there


def from_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official MJP layout: one table `pos_embed.weight` (of a Swin `absolute_pos_embed.weight`) whose last
    row is the unknown PE, head `dlocr`. A Swin without unknown PE has a parameter `absolute_pos_embed` (1, N, D)."""
    renamed = {}
    for key, value in weights.items():
        if key in ("pos_embed.weight", f"{SWIN_TABLE}.weight"):
            renamed["pos_embed"], renamed["unknown_pos_embed"] = value[None, :-1], value[None, -1:]
            continue
        key = "pos_embed" if key == SWIN_TABLE else key
        for old, new in OFFICIAL_NAMES.items():
            if key.startswith(old):
                key = new + key.removeprefix(old)
        renamed[key] = value
    return renamed


def to_official(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inverse of `from_official`, so that a model trained here loads in the official code: of a Swin the
    names of its positions alone, its blocks keep those of timm."""
    renamed, table = {}, SWIN_TABLE if any(key.startswith("layers.") for key in weights) else "pos_embed"
    for key, value in weights.items():
        for old, new in OFFICIAL_NAMES.items():
            if key.startswith(new):
                key = old + key.removeprefix(new)
        renamed[key] = value
    if "unknown_pos_embed" in renamed:
        rows = torch.cat([renamed.pop("pos_embed")[0], renamed.pop("unknown_pos_embed")[0]])
        renamed[f"{table}.weight"] = rows
    elif table == SWIN_TABLE and "pos_embed" in renamed:
        renamed[table] = renamed.pop("pos_embed")
    return renamed
