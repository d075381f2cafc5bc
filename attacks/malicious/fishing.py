"""Attack the one image that a fishing server lets through, with any attack of an honest server.

The gradient of the target class's bias says how many images passed. Where it is one, everything in front of the
classifier holds the gradient of this image alone, divided by the batch size: a leak of a batch of one.
"""

from dataclasses import replace

import torch

from attacks import ATTACKS, FEATURES
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError
from attacks.threat_model.uses import defaults, uses
from utils.errors import UserError

COUNTED = 1e-2  # distance from a whole number up to which the sum of p_c - y_c is a count of images


def check_fishing(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless a server fished, the count can be read, and the base attack applies to one image."""
    bait, base = getattr(leak.model, "bait", None), options["base"]
    if bait is None:
        raise RefusalError(
            f"attack '{attack}' reads what a malicious server has fished for, and this model's classifier is honest: "
            f"use --server class_fishing or feature_fishing"
        )
    if leak.local is not None and leak.local.steps > 1:
        raise RefusalError(f"attack '{attack}' needs one local step: after it the classifier lets others in")
    leak.gradient(f"{bait.layer}.bias", attack)
    if base in ("fishing", *FEATURES) or base not in ATTACKS:
        raise UserError(f"attack '{attack}': --attack_options.base '{base}' is no other attack")
    check, given = getattr(ATTACKS[base], "check", None), options["base_options"] or {}
    if check is not None:
        check(_alone(leak, 1), defaults(ATTACKS[base]) | given, loss, base)


@checked(check_fishing, uses=lambda options: uses(options["base"], options["base_options"] or {}))
def fishing(
    leak: Leak, *, generator: torch.Generator, base: str = "closed_form", base_options: dict | None = None
) -> Reconstruction:
    """Return the isolated image first and the mean of the input's normalisation for all others.

    diagnostics: passed (images that reach the network, as the leak says), those of the base attack, isolated_exact (its
    equations determine the image that passed), exact (which is all there is). Where several passed, or none, nothing is
    reconstructed.

    Args:
        base: Attack on the isolated image, by name.
        base_options: Its options.
    """
    bait = leak.model.bait
    passed = bait.sign * leak.batch_size * float(leak.gradient(f"{bait.layer}.bias", "fishing")[bait.target])
    images = next(iter(leak.gradients.values())).new_zeros(leak.batch_size, *leak.image_shape).double().cpu()
    if abs(passed - 1) > COUNTED:
        return Reconstruction(images, {"passed": passed, "exact": False})
    found = ATTACKS[base](_alone(leak, leak.batch_size), generator=generator, **(base_options or {}))
    images[:1] = found.images.double().cpu()
    told = {f"base_{key}": value for key, value in found.diagnostics.items() if key != "exact"}
    isolated = bool(found.diagnostics.get("exact", False))
    return Reconstruction(
        images, {"passed": passed, **told, "isolated_exact": isolated, "exact": isolated and leak.batch_size == 1}
    )


def _alone(leak: Leak, times: int) -> Leak:
    """Return the leak of the one image that passed: all but the classifier's gradients, times the batch size."""
    bait = leak.model.bait
    gradients = {name: value * times for name, value in leak.gradients.items() if not name.startswith(f"{bait.layer}.")}
    device = next(leak.model.parameters()).device
    labels = torch.tensor([bait.target], device=device) if bait.sign < 0 else None  # of a feature: unknown
    return replace(leak, gradients=gradients, batch_size=1, labels=labels)
