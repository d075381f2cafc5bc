"""Half precision: 16 bits an entry, as mixed-precision training shares its gradients.

An entry becomes the nearest number of the format: float16 keeps 11 significant bits, bfloat16 8. float16 ends at 65504
(larger entries are shared as that) and steps by 6e-8 around zero: clients here do not scale their loss.
"""

from dataclasses import dataclass

import torch

from defenses.base import Defense, Gradients, Step, require

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Defense):
    strength = "format"
    off = "float32"
    format: str = "float16"
    """float16 or bfloat16; float32 is off."""

    def __post_init__(self):
        require(self.format in FORMATS, "format", f"one of {', '.join(FORMATS)}", self.format)

    def gradients(self, gradients: Gradients, step: Step | None = None, *, generator: torch.Generator) -> Gradients:
        if not self.active:
            return gradients
        form = FORMATS[self.format]
        largest = torch.finfo(form).max
        return {name: value.clamp(-largest, largest).to(form).to(value.dtype) for name, value in gradients.items()}
