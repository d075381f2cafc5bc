"""Defences: what a client does to its images before a step and to its gradient before sharing it.

A defence is a frozen dataclass on defenses/base.py's `Defense`: its fields are its options, and it overrides one of
two hooks, `images` or `gradients`. To add one: a file with the class, one line in DEFENSES and a config; the command
line takes names, options and their help from there, and tests/defenses/test_registry.py holds that zero strength
changes no bit.
What changes the model is an option of the model: MJP, the kinds of positions, the bottleneck of PRECODE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.commandline import options
from utils.errors import UserError, look_up
from utils.registry import Registry

if TYPE_CHECKING:
    from defenses.base import Defense

DEFENSES = Registry(
    none="defenses.base:Defense",
    noise="defenses.noise:Noise",
    laplace="defenses.noise:Laplace",
    dp_sgd="defenses.dp_sgd:DpSgd",
    prune="defenses.prune:Prune",
    quantize="defenses.quantize:Quantize",
    half_precision="defenses.half_precision:HalfPrecision",
    soteria="defenses.soteria:Soteria",
    withhold="defenses.withhold:Withhold",
    mixup="defenses.mixup:MixUp",
    ats="defenses.ats:AutomaticTransformations",
)


def build_defense(name: str, given: dict, kind: str = "image") -> Defense:
    """Return a defence by name with the options `given`, checked by name, type and range: raises UserError in one line.
    kind: of data, 'image' or 'text'; token ids can be neither mixed, nor turned, nor differentiated."""
    defense = look_up(DEFENSES, name, "defense")
    if kind == "text" and not defense.takes_text:
        fitting = [key for key, one in DEFENSES.items() if one.takes_text]
        raise UserError(f"defence '{name}' works on images: with --data.kind text choose from {', '.join(fitting)}")
    return defense(**options(given, defense, "defense_options"))


def no_defense(gradients: dict, step=None, *, generator=None) -> dict:
    """Return the gradients as they are, for those who call attacks.threat_model.client.share themselves."""
    return gradients
