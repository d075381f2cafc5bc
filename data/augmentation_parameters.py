"""What chance decides for one training image, drawn where the image is loaded and used on the device.

Everything comes from the image's own seed, in the order in which timm draws it, so an image is cropped, transformed and
erased alike wherever that happens, in any batch and on any number of processes. `make_plan` sorts the draws of a batch
by operation, on the host, so that the device works on groups and is never asked for a number.
"""

import math
import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter

from utils.errors import UserError

# In the order of data.device_augment.OPERATIONS.
OPERATIONS = {
    timm_ops.auto_contrast: "autocontrast",
    timm_ops.equalize: "equalize",
    timm_ops.invert: "invert",
    timm_ops.posterize: "posterize",
    timm_ops.solarize: "solarize",
    timm_ops.solarize_add: "solarize_add",
    timm_ops.color: "color",
    timm_ops.contrast: "contrast",
    timm_ops.brightness: "brightness",
    timm_ops.sharpness: "sharpness",
    timm_ops.rotate: "rotate",
    timm_ops.shear_x: "shear_x",
    timm_ops.shear_y: "shear_y",
    timm_ops.translate_x_rel: "translate_x",
    timm_ops.translate_y_rel: "translate_y",
}
NAMES = tuple(OPERATIONS.values())


class Draw(NamedTuple):
    """operations: (place in NAMES, argument of timm's function, 0 where it takes none), first to last; box: (top, left,
    height, width) to erase, or None; seed: of the noise in it."""

    operations: list[tuple[int, float]]
    box: tuple[int, int, int, int] | None
    seed: int


class Plan(NamedTuple):
    """The draws of a batch. One line per round of operations: rows (L, B) images sorted by operation, arguments (L, B)
    float64 in that order, counts (L, 1 + operations) images without one and with each. boxes (K, 6): row in the batch,
    top, left, height, width, seed of the noise, of the images to erase."""

    rows: Tensor
    arguments: Tensor
    counts: Tensor
    boxes: Tensor


def make_plan(draws: Sequence[Draw]) -> Plan:
    """Sort the draws of a batch, one per image, for the device. Few operations are done in the first rounds."""
    rounds = max(len(draw.operations) for draw in draws)
    shape = (len(draws), rounds)
    padded = [draw.operations + [(-1, 0.0)] * (rounds - len(draw.operations)) for draw in draws]
    chosen = torch.tensor([[place for place, _ in row] for row in padded], dtype=torch.long).view(shape).T
    arguments = torch.tensor([[value for _, value in row] for row in padded], dtype=torch.double).view(shape).T
    rows = chosen.argsort(dim=1, stable=True)
    counts = torch.stack([(chosen == place).sum(dim=1) for place in range(-1, len(NAMES))], dim=1)
    boxes = [(row, *draw.box, draw.seed) for row, draw in enumerate(draws) if draw.box]
    return Plan(rows, arguments.gather(1, rows), counts, torch.tensor(boxes, dtype=torch.long).view(-1, 6))


def recorder(policy) -> RandAugment:
    """Return timm's policy, changed so that policy([]) is the list of (place, argument) that it would have done to an
    image.

    Raises UserError for policies with operations that the device does not have.
    """
    if isinstance(policy, ColorJitter):
        raise UserError("--augment.where device has no colour jitter: set --augment.color_jitter 0, or use split")
    if not isinstance(policy, RandAugment):
        raise UserError("--augment.where device knows only policies named rand-... (--augment.rand_augment): use split")
    for operation in policy.ops:
        name = OPERATIONS.get(operation.aug_fn)
        if name is None:
            problem = f"--augment.where device has no operation {operation.name}"
            raise UserError(f"{problem}: choose another --augment.rand_augment, or use split")
        operation.aug_fn = partial(_note, NAMES.index(name))
    return policy


def _note(place: int, found: list, *arguments: float, **_) -> list:
    return [*found, (place, float(arguments[0]) if arguments else 0.0)]


def erased_box(erasing: RandomErasing | None, side: int) -> tuple[int, int, int, int] | None:
    """Return (top, left, height, width) of the box timm erases in an image of `side` pixels, or None; the same
    draws."""
    if erasing is None or random.random() > erasing.probability:
        return None
    for _ in range(10):
        area = random.uniform(erasing.min_area, erasing.max_area) * side * side
        aspect = math.exp(random.uniform(*erasing.log_aspect_ratio))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width < side and height < side:
            top = random.randint(0, side - height)
            return top, random.randint(0, side - width), height, width
    return None


def draw_rest(policy: RandAugment | None, erasing: RandomErasing | None, side: int) -> Draw:
    """Return what a `recorder` of timm's policy and timm's erasing decide next for an image of `side` pixels."""
    return Draw(policy([]) if policy else [], erased_box(erasing, side), random.getrandbits(63))
