"""Options that several scripts share, and the names of what they choose from."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from attacks import ATTACKS
from attacks.malicious import SERVERS
from attacks.threat_model.sharing import SHARES
from defenses import DEFENSES
from utils.errors import UserError

ModelName = Literal[
    "vit", "deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small", "swin_base", "swin_large",
    "resnet50", "resnet18", "lenet", "convnet",
    "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet20_nostride", "resnet20_4",
    "resnet20_4_unpooled", "resnet20_10", "resnet28_10", "resnet32_10", "mlp", "mlp2", "densenet40", "densenet40_4",
    "cnn2_c0", "cnn2_c1", "cnn2_c2", "cnn2_c4", "cnn2_c5", "cnn2_c6", "cnn2_c11", "cnn2_c21", "cnn2_c41", "cnn3_c1",
    "cnn3_c2", "cnn3_c3", "cnn3_c4", "cnn3_c5", "cnn3_c6", "cnn3_c7", "cnn3_c8", "cnn3_c9", "cnn3_c11", "cnn3_c12",
    "cnn3_c13", "cnn3_c14", "cnn3_c15", "cnn3_c21", "cnn3_c22", "cnn3_c31", "cnn3_c32", "cnn3_c41", "cnn3_c42",
    "cnn4_c1", "cnn4_c2", "cnn4_c3", "lenet_leaky", "lenet2", "cnn6", "cnn6d", "fcn3",
]  # fmt: skip

TextModelName = Literal["text_small", "bert"]

AttackName = Literal[tuple(ATTACKS)]

DefenseName = Literal[tuple(DEFENSES)]

ServerName = Literal[tuple(SERVERS)]

ShareName = Literal[tuple(SHARES)]


def check(condition: bool, key: str, rule: str, value) -> None:
    """Raise UserError naming the option, the rule and the value unless `condition` holds."""
    if not condition:
        raise UserError(f"--{key} must be {rule}, got {value}")


def check_scale(mean: Sequence[float] | None, std: Sequence[float] | None, prefix: str = "") -> None:
    """Raise UserError unless mean and std can be those of pixels in [0, 1]; others are often meant for 0 to 255."""
    unit = "of pixels in [0, 1]"
    check(not mean or all(0 <= value <= 1 for value in mean), f"{prefix}mean", f"from 0 to 1, {unit}", mean)
    check(not std or all(0 < value <= 1 for value in std), f"{prefix}std", f"above 0 and at most 1, {unit}", std)
    for key, value in (("mean", mean), ("std", std)):
        check(not value or len(value) in (1, 3), f"{prefix}{key}", "one number, or one for each of 3 channels", value)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run goes, and what fixes it."""

    parts: ClassVar[dict] = {}
    output: str
    """Run folder to create."""
    seed: int = 0
    """Fixes everything that is drawn: weights, order, augmentation, masks, noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:i."""
    overwrite: bool = False
    """Discard the run that is in the output folder."""

    def __post_init__(self):
        check(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", self.seed)
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        check(known is not None, "device", "auto, cpu, cuda or cuda:i", f"'{self.device}'")
        getattr(super(), "__post_init__", lambda: None)()


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How masks are drawn."""

    mask_sampler: Literal["block", "block_exact", "uniform"] = "block"
    """Mask sampler: rectangles (official, can fall short of the ratio), rectangles filled up to it, single patches."""
    min_block: int = 8
    """Smallest block, in patches."""
    max_block: int = 75
    """Largest block, in patches (official: 75 whatever the ratio)."""
    window: int = 16
    """Text: tokens are permuted within consecutive windows of so many."""
    ngram: int = 1
    """Text: length of the pieces of a window that are permuted, in tokens (official: 1)."""

    def __post_init__(self):
        check(1 <= self.min_block <= self.max_block, "min_block", "from 1 to max_block", self.min_block)
        for key in ("window", "ngram"):
            check(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))

    def sampler(self, kind: str) -> dict:
        """Options of the sampler of masks: of `Jigsaw` for images, of `TokenJigsaw` for text."""
        keys = ("window", "ngram") if kind == "text" else ("mask_sampler", "min_block", "max_block")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class TextConfig:
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
        """Where labels and sentences stand."""
        return {key: getattr(self, key) for key in ("label_column", "text_column", "title_column")}

    def encoding(self) -> dict:
        """Return how sentences become tokens."""
        return {key: getattr(self, key) for key in ("max_length", "vocab_size", "tokenizer")}


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how it is read."""

    kind: Literal["image", "text"] = "image"
    """Images, or sentences in train.csv and val.csv; each kind has its own options, models and attacks."""
    text: TextConfig = field(default_factory=TextConfig)
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

    @property
    def grey(self) -> bool:
        """Return whether a model is to be trained on one channel."""
        return self.channels == 1 or self.channels is None and self.dataset in ("mnist", "fashion_mnist")

    def options(self) -> dict:
        """The options that concern data of this kind, for `open_eval` or `open_text_eval` (less its encoder)."""
        if self.kind == "image":
            return {key: value for key, value in asdict(self).items() if key not in ("kind", "text", "channels")}
        keys = ("path", "train_images", "batch_size", "workers", "on_corrupt")
        return {key: getattr(self, key) for key in keys} | self.text.columns()
