"""Options of data: which, how it is read, and what happens to training images."""

from dataclasses import dataclass, field
from typing import Literal

from utils.checks import check, check_scale
from utils.schema import refuse_changed

SMALL_IMAGE = 32  # up to here the official recipe pads and crops instead of resizing
OF_IMAGES = (
    "dataset", "classes", "download", "image_size", "crop", "interpolation", "channels", "mean", "std",
)  # fmt: skip
DOWNLOADED = ("cifar10", "cifar100", "svhn", "flowers102", "mnist", "fashion_mnist")


@dataclass(frozen=True)
class TextOptions:
    """How sentences are read and cut into tokens."""

    label_column: str = "label"
    """Column of the labels in the CSV files' header."""
    text_column: str = "text"
    """Column of the sentences."""
    title_column: str | None = None
    """Column of titles to put in front of them."""
    max_length: int = 64
    """Longest sentence in tokens, [CLS] and [SEP] included; the rest is cut. Also the number of position rows."""
    vocab_size: int = 2000
    """Most entries of the tokenizer that is trained on the training sentences."""
    tokenizer: str | None = None
    """Read a tokenizer.json or BERT's vocab.txt instead of training one."""

    def __post_init__(self):
        check(self.max_length >= 3, "data.text.max_length", "at least 3", self.max_length)
        check(self.vocab_size >= 8, "data.text.vocab_size", "at least 8", self.vocab_size)

    def columns(self) -> dict:
        """Return where labels and sentences stand."""
        return {key: getattr(self, key) for key in ("label_column", "text_column", "title_column")}

    def encoding(self) -> dict:
        """Return how sentences become tokens."""
        return {key: getattr(self, key) for key in ("max_length", "vocab_size", "tokenizer")}


@dataclass(frozen=True)
class DataOptions:
    """Which data, and how it is read."""

    kind: Literal["image", "text"] = "image"
    """Images, or sentences in train.csv and val.csv; each kind has its own options, models and attacks."""
    text: TextOptions = field(default_factory=TextOptions)
    dataset: Literal[
        "folder", "shards", "cache", "cifar10", "cifar100", "svhn", "flowers102", "domainnet", "mnist", "fashion_mnist",
        "attributes",
    ] = "folder"  # fmt: skip
    """Kind of data set; folder means train/<class>/<image> and val/<class>/<image>, shards and cache the same packed by
    scripts/prepare_shards.py (tar files in WebDataset's layout, or decoded pixels), attributes train.csv and val.csv of
    images and 0 or 1 for each attribute."""
    path: str | None = None
    """Folder that holds the data set."""
    classes: str | None = None
    """File with one class-folder name a line: use only these, in this order (ImageNet-100)."""
    train_images: int | None = None
    """Train on so many images only, spread evenly over the set; default all."""
    download: bool = False
    """Let torchvision download cifar10, cifar100, svhn, flowers102, mnist or fashion_mnist into the folder."""
    image_size: int | None = None
    """Side of the square input in pixels; default 224, or what the checkpoint was trained with."""
    batch_size: int = 128
    """Images per process and step."""
    workers: int | None = None
    """Loader processes per process, 0 loads in the main one; default this process's share of the cores, at most 16."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop the run, or be skipped, counted and reported."""
    crop: bool = True
    """Evaluation: resize to 256/224 of the input and crop its centre; false resizes straight to the input size."""
    interpolation: Literal["bicubic", "bilinear", "lanczos", "random"] | None = None
    """How images are resized, and in training sheared and turned; default bicubic, or what timm says of its model.
    random: bilinear or bicubic for each training image, bilinear in evaluation (as the official code)."""
    channels: Literal[1, 3] | None = None
    """3 in colour, 1 in grey; default 1 for mnist and fashion_mnist, else 3, or what the checkpoint was trained on."""
    mean: tuple[float, ...] | None = None
    """Channel means of pixels in [0, 1], or one for all; default ImageNet's, or the checkpoint's."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations of pixels in [0, 1], or one for all; default ImageNet's, or the checkpoint's."""

    def __post_init__(self):
        check(self.image_size is None or self.image_size >= 1, "data.image_size", "at least 1", self.image_size)
        check(self.batch_size >= 1, "data.batch_size", "at least 1", self.batch_size)
        check(self.train_images is None or self.train_images >= 1, "data.train_images", "at least 1", self.train_images)
        check_scale(self.mean, self.std, "data.")
        check(self.workers is None or self.workers >= 0, "data.workers", "0 or more", self.workers)
        other, unused = ("image", OF_IMAGES) if self.kind == "text" else ("text", ("text",))
        refuse_changed(self, f"used with --data.kind {other}", unused, "data.")
        fetched = self.dataset in DOWNLOADED
        check(fetched or not self.download, "data.download", f"left out with --data.dataset {self.dataset}", "true")

    @property
    def grey(self) -> bool:
        """Return whether a model is to be trained on one channel."""
        return self.channels == 1 or self.channels is None and self.dataset in ("mnist", "fashion_mnist")


@dataclass(frozen=True)
class AugmentOptions:
    """What happens to training images."""

    crop: Literal["auto", "resized", "padded"] = "auto"
    """Training crop: random resized, random after padding, or auto (padded up to 32 pixels)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop, as shares of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation; null turns it off."""
    color_jitter: float = 0.4
    """Colour jitter strength; acts only when rand_augment is null."""
    erasing: float = 0.25
    """Probability of random erasing."""
    erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """What erased boxes are filled with: a normal number per pixel and channel, one per channel, or 0."""
    erasing_count: int = 1
    """Largest number of boxes in an erased image, which share the area."""
    where: Literal["loader", "split", "device"] = "loader"
    """Where this happens. loader: all of it in the loader processes. split: they send bytes, a quarter of the traffic,
    and the device normalises and erases (same pixels, other erasing noise). device: it does RandAugment too (other
    rounding), for a loader that cannot keep up."""
    repeats: int = 3
    """Repeated augmentation: copies of an image per epoch; 1 is off."""

    def __post_init__(self):
        for key in ("flip", "erasing"):
            check(0 <= getattr(self, key) <= 1, f"augment.{key}", "between 0 and 1", getattr(self, key))
        check(self.repeats >= 1, "augment.repeats", "at least 1", self.repeats)
        check(self.erasing_count >= 1, "augment.erasing_count", "at least 1", self.erasing_count)
        low, high = self.scale
        check(0 < low <= high <= 1, "augment.scale", "two shares in (0, 1], the smaller first", self.scale)

    def pads(self, image_size: int) -> bool:
        """Return whether images of this size are cropped after padding, and not at a random scale."""
        return self.crop == "padded" or (self.crop == "auto" and image_size <= SMALL_IMAGE)
