"""Policies: which operations of the library an image goes through, and in which direction each.

Notation of the paper: "3-1-7" applies operations 3, 1 and 7 in turn; "3-1-7+43-18-18" is a hybrid, of which every image
draws one policy; the empty policy changes nothing.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from defenses.ats.transforms import LIBRARY
from utils.errors import UserError

Policy = tuple[int, ...]


def parse(text: str) -> list[Policy]:
    """Parse '3-1-7+43-18-18' to [(3, 1, 7), (43, 18, 18)], '' to [()]. Raises UserError for what is not a policy."""
    text = str(text).strip()
    if not text:
        return [()]
    policies = []
    for part in text.split("+"):
        indices = part.split("-")
        if not all(index.strip().isdigit() for index in indices):
            raise UserError(f"'{part}' in policy '{text}' is not a chain of operations like 3-1-7: write a-b-c+d-e-f")
        policy = tuple(int(index) for index in indices)
        unknown = [index for index in policy if index >= len(LIBRARY)]
        if unknown:
            raise UserError(
                f"policy '{text}' names operation {unknown[0]}, and the library has 0 to {len(LIBRARY) - 1}: choose one"
            )
        policies.append(policy)
    return policies


def write(policies: list[Policy]) -> str:
    """Return the inverse of `parse`."""
    return "+".join("-".join(map(str, policy)) for policy in policies)


def apply(image: Image.Image, policy: Policy, signs: list[int], skip: list[bool] | None = None) -> Image.Image:
    """Return the picture after every operation of the policy, each in its direction (1 or -1); `skip` leaves some out.

    Raises UserError if an operation returns a picture of another size, which no gradient could be computed of.
    """
    for place, (index, sign) in enumerate(zip(policy, signs, strict=True)):
        if skip and skip[place]:
            continue
        changed = LIBRARY[index](image, sign)
        if changed.size != image.size:
            sizes = " to ".join(f"{width} x {height}" for width, height in (image.size, changed.size))
            raise UserError(
                f"operation {index} ({LIBRARY[index].name}) of policy '{write([policy])}' changes the image size from "
                f"{sizes}: a policy must keep it"
            )
        image = changed
    return image


def transform(
    pixels: Tensor, policies: list[Policy], generator: torch.Generator, listed_probability: bool = False
) -> Tensor:
    """Draw a policy and its random signs: (C, H, W) uint8 -> (C, H, W) uint8. Grey pictures, C = 1, go through in
    three equal colours, as in the paper's code for Fashion-MNIST."""
    policy = policies[_below(len(policies), generator)]
    signs = [1 - 2 * _below(2, generator) for _ in policy]
    skip = None
    if listed_probability:
        chances = torch.rand(len(policy), generator=generator, dtype=torch.float64).tolist()
        skip = [chance >= LIBRARY[index].probability for chance, index in zip(chances, policy, strict=True)]
    image = Image.fromarray(np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()))
    changed = apply(image, policy, signs, skip)
    return pil_to_tensor(changed if len(pixels) == 3 else changed.convert("L"))


def candidates(number: int, generator: torch.Generator, length: int = 3) -> list[Policy]:
    """Return `number` different random policies of up to `length` operations, never the empty one.

    Each place is one of the 50 operations or, as likely as any of them, none. The official generator also draws an
    operation 50 that does not exist, and repeats itself.
    """
    found: dict[Policy, None] = {}
    total = sum(len(LIBRARY) ** size for size in range(1, length + 1))
    if number > total:
        raise UserError(f"{number} policies are asked for, and there are only {total} of up to {length} operations")
    while len(found) < number:
        drawn = [_below(len(LIBRARY) + 1, generator) - 1 for _ in range(length)]
        policy = tuple(index for index in drawn if index >= 0)
        if policy:
            found[policy] = None
    return list(found)


def _below(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))
