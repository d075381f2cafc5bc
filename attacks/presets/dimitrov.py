"""Data Leakage in Federated Averaging: a client's epochs of local steps, in orders that the attacker does not know.

A client goes through its images again in every epoch, each time in another order, so nobody knows which images a step
has seen. The attack gives every epoch images of its own, repeats all local steps on them, and draws the epochs together
by a prior that no order changes: their mean images are equal. In the end the images of all epochs are paired with those
of the first, within a label, and averaged.

Labels are told or counted by the rule `dimitrov` and stand in one order in all epochs, which is not the client's.
Settings are those of LeakPro: Adam with rate 1.0 falling to 0 over 8000 iterations. Source: Dimitrov, Balunovic,
Konstantinov and Vechev, "Data Leakage in Federated Averaging", TMLR 2022.
"""

from collections.abc import Sequence
from dataclasses import replace

import scipy
import torch
from torch import Tensor

from attacks.label_recovery import recover_labels
from attacks.matching import MatchingOptions, attack_with, match
from attacks.matching.options import Watch
from attacks.matching.requirements import check_matching, matching_uses
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError


def epochs_of(leak: Leak) -> int:
    """Return how often a client goes through its images; 0 where it does not do so a whole number of times."""
    seen = leak.local.steps * leak.local.batch_size if leak.local else 0
    return seen // leak.batch_size if seen % leak.batch_size == 0 else 0


def check_dimitrov(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the leak is an update of two whole epochs or more, and gradient matching applies."""
    if epochs_of(leak) < 2:
        raise RefusalError(
            f"attack '{attack}' needs the update of a client that goes through its images (here {leak.batch_size}) "
            f"twice or more: set --local_steps so that --local_steps times --local_batch_size is 2, 3, ... times "
            f"--batch_size"
        )
    if leak.aggregate is not None or leak.attacker_knowledge == "permutation":
        raise RefusalError(
            f"attack '{attack}' takes the update of one client, and shows pictures as the model saw them"
        )
    check_matching(leak, options, loss, attack)


def match_epochs(
    leaks: Sequence[Leak],
    options: MatchingOptions,
    *,
    generator: Sequence[torch.Generator],
    watch: Watch | None = None,
) -> list[Reconstruction]:
    """Reconstruct the batch behind each leak with images of their own for every epoch; leaks of another number of
    epochs in turn. diagnostics: those of `match`, epochs, and spread: the root mean square distance of an epoch's
    images from their average, in normalised pixels."""
    epochs = {epochs_of(leak) for leak in leaks}
    if len(epochs) > 1:
        pairs = zip(leaks, generator, strict=True)
        return [match_epochs([leak], options, generator=[own])[0] for leak, own in pairs]
    number = epochs.pop()
    apart = [_apart(leak, number, options.labels, own) for leak, own in zip(leaks, generator, strict=True)]
    found = match(apart, replace(options, epochs=number), generator=generator, watch=watch)
    return [_together(one, number) for one in found]


def _apart(leak: Leak, epochs: int, rule: str, generator: torch.Generator) -> Leak:
    """Return the leak as one of epochs * B images, each of which is seen once."""
    labels = leak.labels
    if labels is None and rule != "joint":
        labels = recover_labels(leak, rule, generator)
    if labels is not None:
        labels = labels.repeat(epochs, *[1] * (labels.dim() - 1))
    return replace(leak, batch_size=epochs * leak.batch_size, labels=labels)


def _together(found: Reconstruction, epochs: int) -> Reconstruction:
    """Return the mean over epochs of the images that belong together: least distance, labels first."""
    images, labels = found.images.unflatten(0, (epochs, -1)), found.labels.unflatten(0, (epochs, -1))
    pairs = [images[0]]
    for own, classes in zip(images[1:], labels[1:], strict=True):
        pairs.append(own[_partners(images[0], own, labels[0], classes)])
    together = torch.stack(pairs)  # (E, B, C, H, W)
    mean = together.mean(dim=0)
    spread = float((together - mean).square().mean().sqrt())
    return Reconstruction(mean, found.diagnostics | {"epochs": epochs, "spread": spread}, labels[0])


def _partners(first: Tensor, other: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Return for each image of the first epoch its place in another, (B,)."""
    cost = torch.cdist(first.flatten(1), other.flatten(1)).nan_to_num(torch.inf, torch.inf)  # (B, B)
    cost = cost.clamp_max(1e6) + 1e7 * (labels[:, None] != classes)
    return torch.from_numpy(scipy.optimize.linear_sum_assignment(cost.double().cpu().numpy())[1]).to(first.device)


dimitrov = attack_with(
    MatchingOptions(
        objective="cosine",
        tv=1e-4,
        epoch_order=1e-6,
        epochs=2,
        labels="dimitrov",
        schedule="cosine",
        lr=1.0,
        iterations=8000,
    ),
    run=match_epochs,
    check=check_dimitrov,
    uses=matching_uses,
    name="dimitrov",
)
