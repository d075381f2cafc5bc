"""From a PIL image to a normalised tensor: the ImageNet training recipe (timm's transforms) and the evaluation crop."""

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment, posterize
from torch import Tensor
from torchvision import transforms as tv

from utils.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_IMAGE = 32  # up to here the official recipe pads and crops instead of resizing


def train_transform(
    image_size: int,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    crop: str = "auto",
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    rand_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    erasing: float = 0.25,
):
    """PIL -> (3, S, S) normalised. Defaults: the recipe of DeiT and MJP.

    crop: 'resized' random-resized crop, 'padded' random crop after padding by 4 (or S/8), 'auto' padded to 32 pixels.
    color_jitter acts only without rand_augment, as in timm. Draws from Python's, NumPy's and torch's global generators.
    """
    try:
        transform = create_transform(
            image_size,
            is_training=True,
            scale=scale,
            hflip=flip,
            color_jitter=color_jitter,
            auto_augment=rand_augment,
            interpolation="bicubic",
            mean=mean,
            std=std,
            re_prob=erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--augment.rand_augment '{rand_augment}' is not a policy timm knows: see --help") from error
    if crop == "padded" or (crop == "auto" and image_size <= SMALL_IMAGE):
        padding = max(4, image_size // 8)
        resize = tv.Resize((image_size, image_size), tv.InterpolationMode.BICUBIC)
        transform.transforms[0] = tv.Compose([resize, tv.RandomCrop(image_size, padding=padding)])
    for step in transform.transforms:
        if isinstance(step, RandAugment):
            # timm's PosterizeIncreasing can ask for 0 bits, which Pillow 13 refuses: keep at least one.
            for operation in step.ops:
                operation.aug_fn = _posterize if operation.aug_fn is posterize else operation.aug_fn
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **options)


def eval_transform(
    image_size: int,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    crop: bool = True,
    recipe: dict | None = None,
):
    """PIL -> (3, S, S) normalised: shorter side to S * 256/224 and centre crop, or resized straight to S x S.

    recipe: interpolation, crop_pct and crop_mode of timm's evaluation transform, which is then used.
    """
    if recipe is not None:
        straight = {} if crop else {"crop_pct": 1.0, "crop_mode": "squash"}
        return create_transform(image_size, is_training=False, mean=mean, std=std, **recipe | straight)
    if crop:
        shorter = int(256 / 224 * image_size)
        steps = [tv.Resize(shorter, tv.InterpolationMode.BICUBIC), tv.CenterCrop(image_size)]
    else:
        steps = [tv.Resize((image_size, image_size), tv.InterpolationMode.BICUBIC)]
    return tv.Compose([*steps, tv.ToTensor(), tv.Normalize(mean, std)])


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised (B, 3, H, W) -> pixel values where the image was in [0, 1]; not clamped."""
    shape = (1, -1, 1, 1)
    return images * images.new_tensor(std).view(shape) + images.new_tensor(mean).view(shape)
