"""Augmentation on the device: against timm on photographs, against the loader image by image, and in any batch."""

import random

import pytest
import torch
from PIL import Image
from scipy import stats
from skimage import data as photographs
from timm.data import auto_augment as timm_ops
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import pil_to_tensor

from data import device_augment
from data.augmentation_parameters import NAMES, Draw, erased_box, make_plan
from data.augmentation_parameters import OPERATIONS as TIMM
from data.device_augment import DeviceAugment, erase, normal, splitmix64
from data.loaders import Batch, collate
from data.options import AugmentOptions
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, Unfinished, train_transform
from utils.errors import UserError
from utils.seeds import seed_cpu

CPU, FILL = torch.device("cpu"), (124, 116, 104)
PHOTOGRAPHS = [
    Image.fromarray(picture()).convert("RGB").resize((90, 76), Image.Resampling.BICUBIC)
    for picture in (photographs.astronaut, photographs.chelsea, photographs.coffee, photographs.rocket)
]
FLAT = Image.new("RGB", (90, 76), (7, 7, 200))
RANGES = {  # of what timm's increasing operations are called with
    "posterize": (1, 8), "solarize": (0, 256), "solarize_add": (0, 110), "color": (0.1, 1.9), "contrast": (0.1, 1.9),
    "brightness": (0.1, 1.9), "sharpness": (0.1, 1.9), "rotate": (-30, 30), "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3), "translate_x": (-0.45, 0.45), "translate_y": (-0.45, 0.45),
}  # fmt: skip
WHOLE = ("posterize", "solarize", "solarize_add")
EXACT = ("autocontrast", "equalize", "invert", *WHOLE)


def finisher() -> DeviceAugment:
    return DeviceAugment(CPU, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def loaded(count: int = 40, **options) -> Batch:
    """Photographs in turn, image k augmented with seed k, as a loader would give them."""
    transform, items = train_transform(48, AugmentOptions(**options)), []
    for number in range(count):
        seed_cpu(number)
        image, rest = transform(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]), None
        if isinstance(transform, Unfinished):
            image, rest = image
        items.append(Batch(image, 0, number, 0, rest))
    return collate(items)


def finished(batch: Batch) -> torch.Tensor:
    return finisher()(batch.images, batch.plan)


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_timm(name):
    function = next(function for function, own in TIMM.items() if own == name)
    draws, images = random.Random(0), [*PHOTOGRAPHS, FLAT]
    for _ in range(4):
        values = [draws.uniform(*RANGES[name]) if name in RANGES else 0.0 for _ in images]
        if name in WHOLE:
            values = [float(round(value)) for value in values]
        options = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
        given = [([int(value)] if name in WHOLE else [value]) if name in RANGES else [] for value in values]
        theirs = [function(image, *argument, **options) for image, argument in zip(images, given, strict=True)]
        theirs = torch.stack([pil_to_tensor(image) for image in theirs])
        arguments = torch.tensor(values, dtype=torch.double).view(-1, 1, 1, 1)
        fill = torch.tensor(FILL, dtype=torch.uint8).view(-1, 1, 1)
        pixels = torch.stack([pil_to_tensor(image) for image in images])
        ours = device_augment.OPERATIONS[name](pixels, arguments, fill)
        difference = (ours.int() - theirs.int()).abs()
        assert ours.dtype == torch.uint8 and difference.max() <= (0 if name in EXACT else 1)
        assert (difference > 0).float().mean() < 2e-3
    assert not torch.equal(theirs, pixels)


def test_names_are_the_operations():
    assert tuple(device_augment.OPERATIONS) == NAMES
    increasing = timm_ops.rand_augment_ops(transforms=timm_ops._RAND_INCREASING_TRANSFORMS)
    assert {TIMM[operation.aug_fn] for operation in increasing} == set(NAMES)


@pytest.mark.parametrize("crop", ["resized", "padded"])
def test_split_gives_the_loaders_bits(crop):
    batch = loaded(where="split", erasing=0, crop=crop)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(finished(batch), loaded(erasing=0, crop=crop).images)


def test_split_erases_the_box_that_timm_erases():
    batch, plain = loaded(where="split"), finished(loaded(where="split", erasing=0))
    boxes = {row: box for row, *box, _ in batch.plan.boxes.tolist()}
    theirs, ours, count = loaded().images, finished(batch), 0
    for number, images in enumerate(zip(plain, theirs, ours, strict=True)):
        before, loader, split = images
        assert torch.equal(loader != before, split != before)
        changed = (split != before).any(dim=0).nonzero()
        assert bool(len(changed)) == (number in boxes)
        if number in boxes:
            (top, left), count = changed.amin(dim=0).tolist(), count + 1
            height, width = (changed.amax(dim=0) + 1 - changed.amin(dim=0)).tolist()
            assert [top, left, height, width] == boxes[number]
    assert count > 4


def test_device_does_what_the_loader_does():
    """Up to rounding, which a threshold may enlarge in a few pixels."""
    batch = loaded(where="device", erasing=0)
    assert (batch.plan.counts[:, 1:].sum(dim=0) > 0).sum() > 10
    levels = (finished(batch) - loaded(erasing=0).images).abs() * 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert levels.mean() < 0.1 and (levels > 3.5).float().mean() < 2e-3


@pytest.mark.parametrize("where", ["split", "device"])
def test_the_batch_changes_nothing(where):
    batch, transform = loaded(where=where), train_transform(48, AugmentOptions(where=where))
    whole = finished(batch)
    for number in (0, 5, 39):
        seed_cpu(number)
        image, rest = transform(PHOTOGRAPHS[number % 4])
        alone = finished(collate([Batch(image, 0, number, 0, rest)]))
        assert torch.equal(alone[0], whole[number])


def test_the_device_is_asked_nothing():
    """The meta device has shapes and no values: what needs one, fails there."""
    batch = loaded(where="device")
    augment = DeviceAugment(torch.device("meta"), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert augment(batch.images.to("meta"), batch.plan).shape == batch.images.shape
    assert (batch.plan.counts[:, 1:].sum(dim=0) > 0).sum() > 10 and len(batch.plan.boxes) > 4


def test_noise_is_splitmix64_made_normal():
    seed = torch.tensor(1234567)
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    assert [value % 2**64 for value in splitmix64(seed, torch.arange(4)).tolist()] == list(known)
    noise = torch.stack([normal(torch.tensor(seed), torch.arange(20000)) for seed in (0, 1, 2**62)])
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.03
    assert (noise[:, 1:] * noise[:, :-1]).mean(dim=1).abs().max() < 0.03


def test_erased_boxes_have_timms_distribution():
    """The same draws from the same seed: timm erases exactly this box, or nothing."""
    erasing = RandomErasing(0.6, mode="const", device="cpu")
    for seed in range(200):
        random.seed(seed)
        box = erased_box(erasing, 37)
        random.seed(seed)
        left_alone = erasing(torch.ones(3, 37, 37))
        expected = torch.ones(3, 37, 37)
        erase(ours := torch.ones(1, 3, 37, 37), make_plan([Draw([], box, seed)]).boxes)
        if box:
            top, left, height, width = box
            expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(left_alone, expected)
        assert torch.equal(ours[0] == 1, expected == 1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rand_augment": "augmix-m3"}, "knows only policies named rand-"),
        ({"rand_augment": "original-mstd0.5"}, "knows only policies named rand-"),
        ({"rand_augment": "rand-m9-t3a"}, "has no operation"),
        ({"rand_augment": None}, "set --augment.color_jitter 0"),
    ],
)
def test_what_the_device_cannot_do_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        train_transform(32, AugmentOptions(where="device", **options))
    train_transform(32, AugmentOptions(where="split", **options))


def test_other_policies_of_timm_run_on_the_device():
    for policy in ("rand-m5-n3-p0.8", "rand-m9-mstd101-inc1", "rand-tweights-inc1", None):
        batch = loaded(4, where="device", rand_augment=policy, color_jitter=0, erasing=0)
        assert finished(batch).isfinite().all() and len(batch.plan.counts) <= 3
