"""The class features of a batch as an attack: for clients that train a classifier alone, and beside others.

What comes back are features, not pixels: what the network sees in each image, from which faces, objects and labels are
recognised. Equations and proof: attacks/class_features.py.
"""

import torch
from torch import nn

from attacks.class_features import check_count
from attacks.label_recovery import classifier_of, recover_class_features
from attacks.threat_model.checks import CROSS_ENTROPY, check_dropout, checked
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError


def check_class_features(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the gradient is one of the cross-entropy by a linear classifier with a bias, both of whose
    gradients are there, of no more images than its equations tell apart."""
    if loss != CROSS_ENTROPY:
        raise RefusalError(
            f"attack '{attack}' rests on the softmax of the cross-entropy, and this client's loss is {loss}"
        )
    if leak.local is not None and leak.local.steps > 1:
        raise RefusalError(f"attack '{attack}' needs one gradient, and this leak is of {leak.local.steps} local steps")
    check_dropout(leak, attack, seed_helps=False)
    name = classifier_of(leak.model, leak.image_shape)
    layer: nn.Linear = leak.model.get_submodule(name)
    for part in ("weight", "bias"):
        leak.gradient(f"{name}.{part}" if name else part, attack)
    check_count(leak.batch_size, layer.out_features, layer.in_features)


@checked(check_class_features, uses=())
def class_features(leak: Leak, *, generator: torch.Generator) -> Reconstruction:
    """Read the features, logits and labels of every image of a batch from the gradient of the classifier alone.

    Features come back by ascending label, equal images as often as they are there; no picture does. `generator` draws
    starts.

    diagnostics: number (images behind the gradient, as the attack takes it), found (images whose feature is proved),
    check (relative misfit of the gradient that the found ones predict), noise (largest predicted relative error of a
    feature), complete (all images are found and the check holds).
    Raises UserError where the equations do not apply, and for a gradient of zero.
    """
    found = recover_class_features(leak, generator)
    told = {
        "number": found.number,
        "found": found.found,
        "check": found.check,
        "noise": float(found.error.max()) if len(found.error) else torch.nan,
        "complete": found.complete,
    }
    features, labels = (value.repeat_interleave(found.counts, dim=0) for value in (found.features, found.labels))
    return Reconstruction(torch.zeros(0, *leak.image_shape), told, labels, features=features)
