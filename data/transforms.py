"""From a PIL image to a normalised tensor: the ImageNet training recipe (timm's transforms) and the evaluation crop."""

from functools import partial

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms as tv
from torchvision.transforms.functional import pil_to_tensor

from data.augmentation_parameters import Draw, draw_rest, recorder
from data.options import AugmentOptions
from utils.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # of ImageNet's photographs in grey


MNIST_SCALE = {"mean": (0.1307,), "std": (0.3081,)}  # which the field uses for Fashion-MNIST too


def training_scale(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, dataset: str, grey: bool
) -> dict[str, tuple[float, ...]]:
    """Return the mean and std by channel of the images of a training: as given, else those of the data set or ImageNet.

    Raises UserError for three numbers of a grey image; one for an image in colours is meant for each channel.
    """
    usual = {"mean": GREY_MEAN, "std": GREY_STD} if grey else {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    usual = MNIST_SCALE if grey and "mnist" in dataset else usual
    scale = usual | {key: tuple(value) for key, value in (("mean", mean), ("std", std)) if value}
    for key, value in scale.items():
        if grey and len(value) != 1:
            raise UserError(f"--data.{key} {value}: grey images have one channel, give one number")
        scale[key] = value * 3 if not grey and len(value) == 1 else value
    return scale


INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "random")


def pillow_filter(interpolation: str | None) -> tv.InterpolationMode:
    """Return the filter of a name of INTERPOLATIONS, bicubic for None; random, where nothing is drawn, is bilinear."""
    return tv.InterpolationMode("bilinear" if interpolation == "random" else interpolation or "bicubic")


def train_transform(
    image_size: int,
    options: AugmentOptions = AugmentOptions(),  # frozen  # noqa: B008
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    interpolation: str | None = None,
):
    """Map PIL pictures to (3, S, S) normalised, or an `Unfinished` transform. Defaults: the recipe of DeiT and MJP.

    With one number as mean and std, images become grey behind all that is done to their colours, (1, S, S). Padding is
    by 4 pixels or S/8. Draws from Python's, NumPy's and torch's global generators. interpolation: a name of
    INTERPOLATIONS, default bicubic.
    """
    where, jitter = options.where, options.color_jitter
    grey = len(mean) == 1
    if where != "loader" and grey:
        raise UserError(f"--augment.where {where} works on colours: set --augment.where loader for grey images")
    if where != "loader" and options.erasing and (options.erasing_mode != "pixel" or options.erasing_count > 1):
        raise UserError(f"--augment.where {where} erases one box of pixel noise: set --augment.where loader")
    if where == "device" and interpolation not in (None, "bicubic"):
        raise UserError("--augment.where device is bicubic: leave out --data.interpolation, or choose loader or split")
    try:
        transform = create_transform(
            image_size,
            is_training=True,
            scale=options.scale,
            hflip=options.flip,
            color_jitter=None if where == "device" and not jitter else jitter,
            auto_augment=options.rand_augment,
            interpolation=interpolation or "bicubic",
            mean=mean * 3 if grey else mean,
            std=std * 3 if grey else std,
            re_prob=options.erasing,
            re_mode=options.erasing_mode,
            re_count=options.erasing_count,
        )
    except (AssertionError, ValueError) as error:
        policy = options.rand_augment
        raise UserError(f"--augment.rand_augment '{policy}' is not a policy timm knows: see --help") from error
    if grey:
        _make_grey(transform, mean, std)
    if options.pads(image_size):
        padding = max(4, image_size // 8)
        resize = tv.Resize((image_size, image_size), pillow_filter(interpolation))
        transform.transforms[0] = tv.Compose([resize, tv.RandomCrop(image_size, padding=padding)])
    for step in transform.transforms:
        if isinstance(step, RandAugment):
            # timm's PosterizeIncreasing can ask for 0 bits, which Pillow 13 refuses: keep at least one.
            for operation in step.ops:
                if operation.aug_fn is posterize and where != "device":
                    operation.aug_fn = _posterize
    return transform if where == "loader" else Unfinished(transform, image_size, where)


def _make_grey(transform: tv.Compose, mean: tuple[float], std: tuple[float]) -> None:
    """Let a transform of timm end in one channel: grey before pixels become numbers, then normalised as one."""
    steps = transform.transforms
    place = next(place for place, step in enumerate(steps) if isinstance(step, (tv.ToTensor, MaybeToTensor)))
    steps.insert(place, tv.Grayscale())
    for place, step in enumerate(steps):
        if isinstance(step, tv.Normalize):
            steps[place] = tv.Normalize(mean, std)


class Unfinished:
    """The first part of a training transform: PIL -> (uint8 (3, S, S), what is drawn for the rest of it).

    where 'split': all that timm does to the PIL image, so the pixels are the same. 'device': only crop and flip,
    and the crop is resized by torch's cubic for bytes, which rounds differently: by a few grey levels at most. What is
    left is done by data.device_augment.
    """

    def __init__(self, transform: tv.Compose, image_size: int, where: str):
        late = (tv.ToTensor, tv.Normalize, RandomErasing)
        self.steps = [step for step in transform.transforms if not isinstance(step, late)]
        self.erasing = next((step for step in transform.transforms if isinstance(step, RandomErasing)), None)
        self.image_size, self.policy = image_size, None
        if where == "device":
            shape = (tv.Compose, RandomResizedCropAndInterpolation, tv.RandomHorizontalFlip)
            for step in self.steps:
                if not isinstance(step, shape):
                    self.policy = recorder(step)
            self.steps = [step for step in self.steps if isinstance(step, shape)]
            if isinstance(self.steps[0], RandomResizedCropAndInterpolation):
                self.steps[0] = partial(_resized_crop, self.steps[0])

    def __call__(self, image: Image.Image) -> tuple[Tensor, Draw]:
        for step in self.steps:
            image = step(image)
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        return pixels, draw_rest(self.policy, self.erasing, self.image_size)


def _resized_crop(crop: RandomResizedCropAndInterpolation, image: Image.Image) -> Tensor:
    """Return the box timm would draw, uint8 (3, S, S)."""
    top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
    pixels = pil_to_tensor(image.crop((left, top, left + width, top + height)))
    return interpolate(pixels[None], crop.size, mode="bicubic", antialias=True)[0]


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **options)


def eval_transform(
    image_size: int,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    crop: bool = True,
    recipe: dict | None = None,
    interpolation: str | None = None,
):
    """Map PIL pictures to (3, S, S) normalised: shorter side to S * 256/224 and centre crop, or resized straight to S x
    S. With one number as mean and std the image is made grey, (1, S, S).

    interpolation: a name of INTERPOLATIONS, default bicubic or what the recipe says. recipe: interpolation, crop_pct
    and crop_mode of timm's evaluation transform, which is then used.
    """
    if recipe is not None:
        straight = {} if crop else {"crop_pct": 1.0, "crop_mode": "squash"}
        chosen = {"interpolation": pillow_filter(interpolation).value} if interpolation else {}
        times = 3 if len(mean) == 1 else 1
        scale = {"mean": mean * times, "std": std * times}
        transform = create_transform(image_size, is_training=False, **scale, **recipe | straight | chosen)
        if times == 3:
            _make_grey(transform, mean, std)
        return transform
    resample = pillow_filter(interpolation)
    if crop:
        shorter = int(256 / 224 * image_size)
        steps = [tv.Resize(shorter, resample), tv.CenterCrop(image_size)]
    else:
        steps = [tv.Resize((image_size, image_size), resample)]
    grey = [tv.Grayscale()] if len(mean) == 1 else []
    return tv.Compose([*steps, *grey, tv.ToTensor(), tv.Normalize(mean, std)])


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Map normalised (B, C, H, W) to pixel values, in [0, 1] where the image was; not clamped."""
    shape = (1, -1, 1, 1)
    return images * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
