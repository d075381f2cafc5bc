"""What a server is: a function from the agreed model to the one it sends out. The honest one changes nothing."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.errors import UserError

POWERS = {
    "honest": "honest-but-curious server: it follows the protocol and looks at what it is sent",
    "malicious_parameters": "malicious server: it changes weights of the model it sends, and no layer",
    "malicious_model": "malicious server: it changes the layers of the model it sends",
}


@dataclass(frozen=True)
class Knowledge:
    """What a server knows of the images before it sees a leak. image_shape (C, H, W); mean, std: of the input's
    normalisation; public (M, C, H, W): normalised pictures of the same kind, none where it has none."""

    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    public: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Server:
    """An honest server, and the base of all. power: a key of POWERS; attack: who reads what it planted."""

    power: ClassVar[str] = "honest"
    attack: ClassVar[str] = ""

    def check(self, model: nn.Module) -> None:
        """Raise UserError in one line if this server cannot change this model as it means to."""

    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        """Return the model that clients receive; `model` stays as it is. Raises UserError by `check`."""
        self.check(model)
        return model

    def guarantee(self, images: int, public: int | None = None) -> float | None:
        """Return the expected share of `images` behind one leak that come back alone, 0 to 1; None where none is given.

        public: the server's pictures, which are taken to be drawn like the private ones; None: it knows their
        distribution.
        """
        return None

    def threat_text(self) -> str:
        """Return who this is, for the row of a threat model."""
        told = ", ".join(f"{item.name} {getattr(self, item.name)}" for item in fields(self))
        return POWERS[self.power] + (f" ({told})" if told else "")


def require(condition: bool, option: str, rule: str, value) -> None:
    """Raise UserError naming the option of a server, the rule and the value unless `condition` holds."""
    if not condition:
        raise UserError(f"--server_options.{option} must be {rule}, got {value}")
