"""What is proved of a round: bits of every image that an attack shows to have leaked, and bits that no attack reaches.

The lower end is the attack's own certificate, which sees the leak alone. The upper end is the auditor's: the symmetries
of the model, the mask and equal patches of the private images, and what the client's defence lets pass.
"""

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attacks.certified import DEPTH, Certificate, hidden_order_bits
from attacks.linear.token_span import token_positions
from attacks.threat_model.client import Round
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.local_step import active_dropout, client_model
from eval.assignment import assign
from models.jigsaw import patchify, shuffle_patches
from models.position import given_mask

SAME, ROUNDING = 1e-8, 1e-14  # differences of a gradient that rounding makes: of its largest entry, of that of all


def interval(one: Round, result: Reconstruction) -> dict[str, float | None]:
    """Return {"bits": of the 8-bit values of an image, "bits_leaked": that the attack certifies, "bits_hidden": that no
    attack can reach beyond the labels, "psnr_proved": the least PSNR (dB) that the certificate leaves, patches in any
    order, None unless it is of all patches}, means over the images of the round.

    Of a leak file, whose client may have done anything, nothing is known to be hidden but an order, where the originals
    are at hand.
    """
    private, leak, _ = one
    bits = DEPTH * float(torch.tensor(leak.image_shape).prod())
    leaked = result.certificate.bits / leak.batch_size if result.certificate else 0.0
    hidden = 0.0
    if private is not None:
        images = private.model_input
        masks = [tuple(mask) for mask in private.mask.expand(len(images), -1).tolist()]
        groups = {mask: unordered(leak, torch.tensor(mask)) for mask in set(masks)}
        order = sum(_order(leak, image, groups[mask]) for image, mask in zip(images, masks, strict=True))
        hidden = max(0.0, order / leak.batch_size, bits - private.carried / leak.batch_size)
    floor = result.certificate.psnr if result.certificate else None
    return {"bits": bits, "bits_leaked": leaked, "bits_hidden": hidden, "psnr_proved": floor}


def _order(leak: Leak, image: Tensor, group: Tensor) -> float:
    """Return the bits of the order of an image's patches that its gradient does not hold; group as of `unordered`."""
    if len(group.unique()) == len(group):
        return 0.0
    return hidden_order_bits(patchify(image[None], leak.model.patch_size)[0].cpu(), group)


def unordered(leak: Leak, mask: Tensor) -> Tensor:
    """Return groups (N,) of places whose patches no gradient tells apart: the same is added to them, and no gradient
    for noise changes when they change places, in float64. mask (N,) bool: those that MJP hides."""
    model, number = leak.model, len(mask)
    apart = torch.arange(number)
    table = getattr(model, "pos_embed", apart)
    tied = getattr(model, "pos_embed_rows", None) is not None
    known = table is None or (isinstance(table, Tensor) and table.dim() == 3 and (tied or table.shape[1] >= number))
    if not hasattr(getattr(model, "patch_embed", None), "proj") or not known:
        return apart
    if leak.training and active_dropout(model):  # what it drops tells places apart
        return apart
    told = replace(leak, attacker_knowledge="mask", mask=mask, source=None, aggregate=None)
    group = torch.unique(token_positions(told, number).cpu(), dim=0, return_inverse=True)[1]
    if len(group.unique()) == number:
        return apart
    turned, swapped = apart.clone(), apart.clone()  # which together make every order
    for own in (group == kind for kind in group.unique()):
        turned[own] = apart[own].roll(1)
        swapped[own] = torch.cat([apart[own][:2].flip(0), apart[own][2:]])
    client = client_model(model, training=False, dtype=torch.float64)
    like = next(client.parameters())
    image = torch.rand(1, *leak.image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    hidden = given_mask(model, mask[None].to(like.device))
    moved = [shuffle_patches(image, source[None], model.patch_size) for source in (turned, swapped)]
    found = list(zip(*(_gradients(client, each, hidden) for each in (image, *moved)), strict=True))
    largest = max(float(one.abs().max()) for one, *_ in found)

    def same(one: Tensor, other: Tensor) -> bool:  # a server may have planted what only a tiny gradient shows
        return bool((one - other).abs().max() <= max(SAME * float(one.abs().max()), ROUNDING * largest))

    return group if all(same(one, other) for one, *others in found for other in others) else apart


def _gradients(model: nn.Module, image: Tensor, hidden: Tensor | None) -> list[Tensor]:
    """Return the gradients of a sum of the model's outputs, each with a weight of its own, that exist."""
    parameters = [value.requires_grad_() for value in model.parameters()]
    with torch.enable_grad():
        outputs = model(image) if hidden is None else model(image, hidden)
        loss = (outputs * torch.linspace(1, 2, outputs.numel()).to(outputs).view_as(outputs)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [value for value in found if value is not None]


def excess(certificate: Certificate, truth: Tensor, scale: Tensor) -> Tensor:
    """Return the errors (M, P) of all claimed patches in units of their radius: above 1 the certificate is wrong.

    Patches that may change places are paired with the true ones at the least largest error, and images of a batch at
    the least squared error. For checks of certificates, where the truth is known.

    Args:
        truth: the patches (B, N, P) that the model was shown, normalised.
        scale: standard deviation of a value (P,), by which normalised values become pixels.
    """
    truth = truth.to(certificate.patches)
    truth = truth[assign(truth.flatten(1), certificate.patches.flatten(1))]
    found = []
    for number in certificate.group.unique():
        own = certificate.group == number
        claimed = own & certificate.claimed
        patches, radius = certificate.patches[claimed], certificate.radius[claimed]
        error = (patches[:, None] - truth[own][None]).abs() * scale / radius[:, None, None]  # (M, K, P)
        rows, columns = linear_sum_assignment(error.amax(dim=2).clamp_max(1e12).numpy())
        found.append(error[rows, columns])
    return torch.cat(found)
