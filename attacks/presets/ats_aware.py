"""The attacker who knows that ATS is in use, and which policies: reconstruct what the model saw, then undo the policy.

Every image went through one of few chains of operations in one of few combinations of directions. Each is undone in
turn, as far as it can be: shifts, shears and rotations by their opposites, factors of colour, contrast and brightness
by their inverses, inversion by itself; the rest is left as it is. The candidate is kept whose transformation by that
chain comes closest to the reconstruction. What a shift pushed out of the picture is filled with the mean of the rest.
No truth is looked at. Replications of ATS report that such an attacker weakens it.
"""

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from attacks.exactness import claim
from attacks.linear.closed_form import closed_form
from attacks.presets.inverting_gradients import inverting_gradients
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.uses import defaults, uses
from defenses.ats.policies import Policy, apply, parse
from defenses.ats.transforms import FUNCTIONS, LIBRARY
from utils.errors import look_up

BASES: dict[str, Callable] = {"inverting_gradients": inverting_gradients, "closed_form": closed_form}
GEOMETRIC = ("shearX", "shearY", "translateX", "translateY", "rotate")
FACTORS = ("color", "contrast", "brightness")


def check_ats_aware(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError where the base attack does not apply with its options."""
    base = look_up(BASES, options["base"], "base attack")
    base.check(leak, defaults(base) | (options["base_options"] or {}), loss, options["base"])


@checked(check_ats_aware, uses=lambda options: uses(options["base"], options["base_options"] or {}))
def ats_aware(
    leak: Leak,
    *,
    generator: torch.Generator,
    policies: str = "3-1-7+43-18-18",
    base: str = "inverting_gradients",
    base_options: dict | None = None,
) -> Reconstruction:
    """Attack with `base` (inverting_gradients or closed_form, with base_options), then undo `policies` image by image.

    diagnostics: those of the base attack, and for the first image `undone`, the chain taken, with its directions; exact
    and exact_up_to_order are False, as the equations of a base attack are about the image behind the policies.

    Args:
        policies: Chains of operations that are known to be in use, by their indices: 3-1-7+43-18-18.
        base: Attack whose reconstruction is undone: inverting_gradients or closed_form.
        base_options: Options of that attack.
    """
    chains = parse(policies)
    result = look_up(BASES, base, "base attack")(leak, generator=generator, **(base_options or {}))
    mean, std = (result.images.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    pixels = ((result.images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    undone = [undo(image, chains) for image in pixels]
    images = (torch.stack([image for image, _ in undone]).to(result.images) / 255 - mean) / std
    # What the policies round or push out of the picture is in no equation.
    about = result.diagnostics | {"undone": undone[0][1], **claim(patches=False, places=False)}
    return Reconstruction(images, about, result.labels)


def undo(pixels: Tensor, chains: list[Policy]) -> tuple[Tensor, str]:
    """Undo a policy: (C, H, W) uint8 as the model saw it -> (most consistent original, its chain and directions)."""
    seen = Image.fromarray(np.ascontiguousarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()))
    best, least = (pixels, ""), np.inf
    for chain in dict.fromkeys(chains):
        choices = [(1, -1) if LIBRARY[index].signed and LIBRARY[index].magnitude else (1,) for index in chain]
        for signs in product(*choices):
            original = _inverse(seen, chain, signs)
            again = np.asarray(apply(original, chain, list(signs))).astype(float)
            error = np.square(again - np.asarray(seen)).mean()
            if error < least:
                name = ", ".join(f"{sign * index:+d}" for index, sign in zip(chain, signs, strict=True))
                best, least = (pil_to_tensor(original if len(pixels) == 3 else original.convert("L")), name), error
    return best


def _inverse(image: Image.Image, chain: Policy, signs: tuple[int, ...]) -> Image.Image:
    known = Image.new("RGB", image.size, (255, 255, 255))
    for index, sign in zip(reversed(chain), reversed(signs), strict=True):
        operation = LIBRARY[index]
        value = operation.magnitude * (sign if operation.signed else 1)
        if operation.name in GEOMETRIC:
            turn = FUNCTIONS[operation.name]
            image = turn(image, -value)
            known = turn(known, -value)
        elif operation.name in FACTORS:
            image = FUNCTIONS[operation.name](image, 1 / (1 + value) - 1)
        elif operation.name == "invert":
            image = FUNCTIONS["invert"](image, 0)
    there = np.asarray(known).min(axis=2) > 200
    values = np.asarray(image).copy()
    if there.any() and not there.all():
        values[~there] = values[there].mean(axis=0)
    return Image.fromarray(values)
