"""Defences: what a client does to its images before a step and to its gradient before sharing it.

A defence is a frozen dataclass on defenses/base.py's `Defense`: its fields are its options, and it overrides one of
two hooks, `images` or `gradients`. To add one: a file with the class, one line in DEFENSES, its name in
config.DefenseName and a config; tests/defenses/test_registry.py then holds that zero strength changes no bit.
What changes the model is an option of the model: MJP, the kinds of positions, the bottleneck of PRECODE.
"""

from defenses.ats import AutomaticTransformations
from defenses.base import Defense
from defenses.dp_sgd import DpSgd
from defenses.mixup import MixUp
from defenses.noise import Laplace, Noise
from defenses.prune import Prune
from defenses.quantize import Quantize
from defenses.soteria import Soteria
from defenses.withhold import Withhold
from utils.commandline import options
from utils.errors import UserError, look_up

DEFENSES: dict[str, type[Defense]] = {
    "none": Defense,
    "noise": Noise,
    "laplace": Laplace,
    "dp_sgd": DpSgd,
    "prune": Prune,
    "quantize": Quantize,
    "soteria": Soteria,
    "withhold": Withhold,
    "mixup": MixUp,
    "ats": AutomaticTransformations,
}


def build_defense(name: str, given: dict, kind: str = "image") -> Defense:
    """A defence by name with the options `given`, checked by name, type and range: raises UserError in one line. kind:
    of data, 'image' or 'text'; token ids can be neither mixed, nor turned, nor differentiated."""
    defense = look_up(DEFENSES, name, "defense")
    if kind == "text" and (defense.images is not Defense.images or defense is Soteria):
        fitting = [key for key, one in DEFENSES.items() if one.images is Defense.images and one is not Soteria]
        raise UserError(f"defence '{name}' works on images: with --data.kind text choose from {', '.join(fitting)}")
    return defense(**options(given, defense, "defense_options"))


def no_defense(gradients: dict, step=None, *, generator=None) -> dict:
    """The gradients as they are, for those who call attacks.victim.share themselves."""
    return gradients
