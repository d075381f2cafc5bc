"""The victims of scripts/joint_cases.py: a model, the pictures of a batch, and what their clients share."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attacks.threat_model.client import Client, prepare, share
from attacks.threat_model.leak import LocalSteps
from attacks.threat_model.victim import build_victim
from data.images import list_images, read_images
from defenses import build_defense
from models.jigsaw import Jigsaw, patchify, unpatchify
from scripts.joint_cases import PATCHES, Case

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def victims(case: Case, number: int, images: Path | None, weights: Path | None = None) -> tuple:
    """Return (leak, private) of batch `number` of a case: photographs, or random pictures where `images` is None;
    weights: the file of trained ones."""
    dtype, own = getattr(torch, case.dtype), torch.Generator().manual_seed(number)
    if images is None:
        shown, seed = random_pictures(case, own), number
    else:
        paths, seed = list_images(images), 0
        start, step = number * case.batch_size, max(1, len(paths) // (case.batch_size * case.batches))
        chosen = [paths[index * step] for index in range(start, start + case.batch_size)]
        shown = read_images(chosen, case.side, MEAN, STD)
    if case.border:
        shown = bordered(shown, case)
    if case.shown in PATCHES:
        shown = of_patches(shown, case, own)
    elif case.shown:
        shown = of_kind(shown, case.shown, own)
    unknown = {"unknown": True} if case.mask_ratio else {}
    name, file = (None, str(weights)) if case.trained else ("vit", None)
    model = build_victim(file, name, seed=seed, image_size=case.side, **case.options | unknown).to(dtype)
    model.pos_embed.data *= case.positions
    labels = torch.randint(model.arguments["num_classes"], (case.batch_size,), generator=own)
    jigsaw = Jigsaw(model.grid, case.mask_ratio, seed=seed)
    if case.apart:
        names = [str(place) for place in range(case.batch_size)]
        terms = {"reveal_labels": False, "mean": MEAN, "std": STD}
        classes = dict(zip(names, labels.tolist(), strict=True))
        sent = build_defense("half_precision", {"format": case.sent})
        client = Client(model, jigsaw, sent, seed, terms, classes, together=(case.batch_size, 1, None))
        private, leak, _ = client.round(number * case.batch_size, shown.to(dtype), names)
        return leak, private
    private = prepare(model, shown.to(dtype), labels, jigsaw, number)
    sent = partial(build_defense("half_precision", {"format": case.sent}).gradients, generator=torch.Generator())
    local = LocalSteps(*case.local, case.batch_size) if case.local else None
    return share(model, private, sent, False, mean=MEAN, std=STD, local=local), private


def random_pictures(case: Case, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, S, S) of smooth colours with texture, normalised."""
    coarse = torch.rand(case.batch_size, 3, 4, 4, generator=generator)
    fine = torch.rand(case.batch_size, 3, case.side, case.side, generator=generator)
    pixels = 0.7 * torch.nn.functional.interpolate(coarse, size=case.side, mode="bilinear") + 0.3 * fine
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def bordered(images: Tensor, case: Case) -> Tensor:
    """Return the pictures (B, 3, S, S) with one patch at each side in one colour."""
    value = torch.full((1, 3, 1, 1), float(case.border == "white"))
    framed = ((value - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).expand_as(images).clone()
    inner = slice(case.options["patch_size"], -case.options["patch_size"])
    framed[..., inner, inner] = images[..., inner, inner]
    return framed


def of_kind(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Return normalised pictures (B, 3, S, S) as Case.shown says."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    if kind == "twice":
        return torch.cat([images[:-1], images[:1]])
    if kind == "grey":
        return ((images * std + mean).mean(dim=1, keepdim=True) - mean) / std
    side = images.shape[-1]
    inner, pasted = 5 * side // 7, ((1 - mean) / std).expand_as(images).clone()
    for image, (down, right) in enumerate(
        torch.randint(side - inner + 1, (len(images), 2), generator=generator).tolist()
    ):
        small = torch.nn.functional.interpolate(images[image][None], size=inner, mode="area")[0]
        pasted[image, :, down : down + inner, right : right + inner] = small
    return pasted


def of_patches(images: Tensor, case: Case, generator: torch.Generator) -> Tensor:
    """Return random pictures (B, 3, S, S) of which each patch is of one grey or colour, of one of two greys, or one of
    five patches; or which are a ramp from corner to corner; or of which each patch is its mean and little (faint)."""
    size = case.options["patch_size"]
    patches = patchify(images, size)  # (B, N, 3 p^2)
    number, channels = patches.shape[:2], (3, size * size)
    mean, std = (torch.tensor(value).view(3, 1) for value in (MEAN, STD))
    if case.shown in ("greys", "colours", "two greys"):
        value = torch.rand(*number, 3 if case.shown == "colours" else 1, 1, generator=generator)
        value = value.round() if case.shown == "two greys" else value
        patches = ((value - mean) / std).expand(*number, *channels).flatten(2)
    elif case.shown == "ramp":
        slopes, way = torch.rand(len(images), 2, 3, 1, 1, generator=generator), torch.linspace(0, 0.5, case.side)
        pixels = slopes[:, 0] * way[:, None] + slopes[:, 1] * way  # (B, 3, S, S)
        patches = patchify((pixels - mean[..., None]) / std[..., None], size)
    elif case.shown == "few":
        patches = patches[0, :5][torch.randint(5, number, generator=generator)]
    elif case.shown == "faint":
        average = patches.mean(dim=2, keepdim=True)
        patches = average + 0.02 * (patches - average)
    return unpatchify(patches, size, (case.side // size, case.side // size))
