"""The options of the four entry scripts: every default, its unit and its source, once.

`utils/commandline.py` reads them from YAML files and the command line. Only the entry scripts import this module; they
hand packages plain arguments. Names that select a part (Literal) equal the registries of the packages; a test holds it.
"""

from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from utils.commandline import plain
from utils.errors import UserError, did_you_mean

ModelName = Literal[
    "vit", "deit_tiny", "deit_small", "deit_base", "swin_tiny", "swin_small", "swin_base", "swin_large",
    "resnet50", "resnet18", "lenet", "convnet", "resnet20_4", "resnet32_10",
    "cnn2_c0", "cnn2_c1", "cnn2_c2", "cnn2_c4", "cnn2_c5", "cnn2_c6", "cnn2_c11", "cnn2_c21", "cnn2_c41", "cnn3_c1",
    "cnn3_c2", "cnn3_c3", "cnn3_c4", "cnn3_c5", "cnn3_c6", "cnn3_c7", "cnn3_c8", "cnn3_c9", "cnn3_c11", "cnn3_c12",
    "cnn3_c13", "cnn3_c14", "cnn3_c15", "cnn3_c21", "cnn3_c22", "cnn3_c31", "cnn3_c32", "cnn3_c41", "cnn3_c42",
    "cnn4_c1", "cnn4_c2", "cnn4_c3", "lenet_leaky", "lenet2", "cnn6", "cnn6d", "fcn3",
]  # fmt: skip

TextModelName = Literal["text_small", "bert"]

TEXT_ATTACKS = ("token_rows", "dager", "text_dlg", "tag")

DefenseName = Literal["none", "noise", "laplace", "dp_sgd", "prune", "quantize", "soteria", "withhold", "mixup", "ats"]


def check(condition: bool, key: str, rule: str, value) -> None:
    """Raise UserError naming the option, the rule and the value unless `condition` holds."""
    if not condition:
        raise UserError(f"--{key} must be {rule}, got {value}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
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
        getattr(super(), "__post_init__", lambda: None)()


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
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
        """How sentences become tokens."""
        return {key: getattr(self, key) for key in ("max_length", "vocab_size", "tokenizer")}


@dataclass(frozen=True)
class DataConfig:
    kind: Literal["image", "text"] = "image"
    """Images, or sentences in train.csv and val.csv; each kind has its own options, models and attacks."""
    text: TextConfig = field(default_factory=TextConfig)
    dataset: Literal["folder", "cifar10", "cifar100", "svhn", "flowers102", "domainnet"] = "folder"
    """Kind of data set; folder means train/<class>/<image> and val/<class>/<image>."""
    path: str | None = None
    """Folder that holds the data set."""
    classes: str | None = None
    """File with one class-folder name a line: use only these, in this order (ImageNet-100)."""
    train_images: int | None = None
    """Train on so many images only, spread evenly over the set; default all."""
    download: bool = False
    """Let torchvision download cifar10, cifar100, svhn or flowers102 into the folder."""
    image_size: int | None = None
    """Side of the square input in pixels; default 224, or what the checkpoint was trained with."""
    batch_size: int = 128
    """Images per process and step."""
    workers: int | None = None
    """Loader processes per process, 0 loads in the main one; default this process's share of the cores, at most 8."""
    on_corrupt: Literal["error", "skip"] = "error"
    """What an unreadable image does: stop the run, or be skipped, counted and reported."""
    crop: bool = True
    """Evaluation: resize to 256/224 of the input and crop its centre; false resizes straight to the input size."""
    mean: tuple[float, float, float] | None = None
    """Channel means of pixels in [0, 1]; default ImageNet's, or the checkpoint's."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations of pixels in [0, 1]; default ImageNet's, or the checkpoint's."""

    def __post_init__(self):
        check(self.image_size is None or self.image_size >= 1, "data.image_size", "at least 1", self.image_size)
        check(self.batch_size >= 1, "data.batch_size", "at least 1", self.batch_size)
        check(self.train_images is None or self.train_images >= 1, "data.train_images", "at least 1", self.train_images)
        check(not self.std or all(value > 0 for value in self.std), "data.std", "above 0", self.std)
        check(self.workers is None or self.workers >= 0, "data.workers", "0 or more", self.workers)

    def options(self) -> dict:
        """The options that concern data of this kind, for `open_eval` or `open_text_eval` (less its encoder)."""
        if self.kind == "image":
            return {key: value for key, value in asdict(self).items() if key not in ("kind", "text")}
        keys = ("path", "train_images", "batch_size", "workers", "on_corrupt")
        return {key: getattr(self, key) for key in keys} | self.text.columns()


@dataclass(frozen=True)
class AugmentConfig:
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
    repeats: int = 3
    """Repeated augmentation: copies of an image per epoch; 1 is off."""

    def __post_init__(self):
        for key in ("flip", "erasing"):
            check(0 <= getattr(self, key) <= 1, f"augment.{key}", "between 0 and 1", getattr(self, key))
        check(self.repeats >= 1, "augment.repeats", "at least 1", self.repeats)
        low, high = self.scale
        check(0 < low <= high <= 1, "augment.scale", "two shares in (0, 1], the smaller first", self.scale)


@dataclass(frozen=True)
class ModelConfig:
    name: Literal[ModelName, TextModelName] = "deit_small"
    """Architecture; vit takes its shape from embed_dim, depth and num_heads, which text models may change too."""
    patch_size: int | None = None
    """Patch side in pixels; default 16 (4 for Swin)."""
    embed_dim: int | None = None
    """Token width, for vit and text models."""
    depth: int | None = None
    """Number of blocks, for vit and text models."""
    num_heads: int | None = None
    """Attention heads, for vit and text models."""
    mlp_ratio: float | None = None
    """Width of the feed-forward layers over that of tokens, for vit and text models; default 4."""
    dropout: float | None = None
    """Dropout rate of a text model; default 0.1."""
    width: int | None = None
    """Channels of the first stage, for convnet and the CIFAR ResNets; default 64."""
    unknown: bool | None = None
    """Shared unknown position embedding: masked patches hide their position (MJP). Off: a naive shuffle."""
    index_embed: bool | None = None
    """Second position embedding that masked patches keep (+idx ablation; gives the position away)."""
    localization: Literal["none", "linear", "nonlinear", "pca", "pca_official", "relative"] | None = None
    """Dense absolute localization head, or the relative one of the follow-up on text; default none."""
    positions: Literal["learned", "sinusoidal", "tied", "none", "rotary"] | None = None
    """Where a ViT gets positions from: a learned row per patch (default), a fixed table, rows tied over squares of
    cells, nowhere, or rotations of queries and keys, which leave no trace in the tokens."""
    tie: int | None = None
    """Side, in cells, of the squares whose patches share a row with positions tied; default 2."""
    bottleneck: int | None = None
    """Width of PRECODE's variational bottleneck in front of the classifier (the paper: 256); default none."""
    unit_targets: bool | None = None
    """Localization targets in [0, 1] instead of integers (official: integers)."""
    pos_embed_std: float | None = None
    """Standard deviation of the initial position embeddings; default 0.02 (official MJP: 1.0, by accident)."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block (official MJP ViT: 0, it never reached the model)."""

    def __post_init__(self):
        for key in ("patch_size", "embed_dim", "depth", "num_heads", "width", "tie"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"model.{key}", "at least 1", value)
        check(not self.bottleneck or self.bottleneck >= 1, "model.bottleneck", "0 or more", self.bottleneck)
        check(0 <= self.drop_path < 1, "model.drop_path", "in [0, 1)", self.drop_path)
        check(not self.dropout or 0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class JigsawConfig(MaskConfig):
    mask_ratio: float = 0.0
    """Share of the patches to mask and permute; 0 turns the jigsaw off."""
    probability: float = 0.5
    """Chance that a training step is masked."""
    start_epoch: int = 20
    """First epoch with the jigsaw (official: after the warm-up)."""
    shuffle: Literal["mjp", "pps"] = "mjp"
    """mjp permutes the masked patches; pps permutes all pixels in patches and all patches, whatever mask_ratio says."""
    per_sample: bool = False
    """Own mask for every image instead of one for the global batch (official: one); sentences always have their own."""
    shrinking_window: bool = False
    """Text: as the published code, keep the length of a sentence's last window for the rest of the batch."""

    def policy(self, kind: str) -> dict:
        """Options of `MaskPolicy` for images, of `TokenPolicy` for text."""
        keys = ["mask_ratio", "probability", "start_epoch"]
        keys += ["shrinking_window"] if kind == "text" else ["shuffle", "per_sample"]
        return {key: getattr(self, key) for key in keys} | self.sampler(kind)

    def __post_init__(self):
        check(0 <= self.mask_ratio <= 1, "jigsaw.mask_ratio", "between 0 and 1", self.mask_ratio)
        check(0 <= self.probability <= 1, "jigsaw.probability", "between 0 and 1", self.probability)
        super().__post_init__()


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = 300
    """Passes over the training set."""
    lr: float = 5e-4
    """Peak learning rate per 512 images of global batch; the rates below scale with it."""
    warmup_lr: float = 5e-7
    """Learning rate of the first step, per 512 images."""
    min_lr: float = 5e-6
    """Final learning rate, per 512 images."""
    warmup_epochs: int = 20
    """Epochs of linear warm-up (of the learning rate and of the localization weight)."""
    schedule: Literal["cosine", "linear", "step"] = "cosine"
    """Decay after the warm-up, as in the official code: cosine counts from step 0; linear falls from the end of the
    warm-up to a hundredth; step divides by 10 at each third of the run (official: every 30 epochs), from step 0."""
    weight_decay: float = 0.05
    """AdamW weight decay; not on biases, norms and position embeddings."""
    decay_pos_embed: bool = False
    """Decay position embeddings too (official MJP: true, by accident)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    fused: bool = True
    """Fused AdamW kernel."""
    clip: float = 5.0
    """Largest global gradient norm; 0 is off. Applied once per update."""
    accumulation: int = 1
    """Steps whose gradients are summed into one update."""
    mixup: float = 0.8
    """Mixup alpha; 0 is off."""
    cutmix: float = 1.0
    """CutMix alpha; 0 is off."""
    label_smoothing: float = 0.1
    """Label smoothing."""
    localization_weight: float = 0.01
    """Weight of the localization loss after its warm-up; it then falls to half along a cosine."""
    ema: float = 0.0
    """Decay of the averaged weights per update, e.g. 0.99996; 0 is off."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision of the forward pass (official: none)."""
    compile: bool = False
    """torch.compile the training step."""
    grad_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self):
        check(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        for key in ("lr", "warmup_lr", "min_lr", "warmup_epochs", "weight_decay", "eps", "clip", "localization_weight"):
            check(getattr(self, key) >= 0, f"optim.{key}", "0 or more", getattr(self, key))
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "in [0, 1)", self.betas)
        check(self.accumulation >= 1, "optim.accumulation", "at least 1", self.accumulation)
        check(0 <= self.ema < 1, "optim.ema", "in [0, 1)", self.ema)
        check(0 <= self.label_smoothing < 1, "optim.label_smoothing", "in [0, 1)", self.label_smoothing)
        check(self.mixup >= 0, "optim.mixup", "0 or more", self.mixup)
        check(self.cutmix >= 0, "optim.cutmix", "0 or more", self.cutmix)


@dataclass(frozen=True)
class LogConfig:
    every: int = 50
    """Steps between progress lines in log.txt; on a GPU also between checks for a stop signal or a bad loss."""
    checkpoint_every: int = 1
    """Epochs between writes of last.pt (official: 5)."""
    images_every: int = 20
    """Epochs between TensorBoard images of shuffled inputs and the position-embedding similarity map; 0 is off."""

    def __post_init__(self):
        check(self.every >= 1, "log.every", "at least 1", self.every)
        check(self.checkpoint_every >= 1, "log.checkpoint_every", "at least 1", self.checkpoint_every)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Train a ViT/DeiT, Swin or ResNet-50, plain or with Masked Jigsaw Puzzle position embeddings.

    The defaults are the official 300-epoch ImageNet recipe on plain DeiT-S; configs/train/*.yaml are diffs against it.
    """

    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    jigsaw: JigsawConfig = field(default_factory=JigsawConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    defense: DefenseName = "none"
    """Defence the model is trained under: what it does to every batch, or to every gradient before the update."""
    defense_options: dict = field(default_factory=dict)
    """Options of the defence, e.g. --defense_options.policies 3-1-7+43-18-18."""
    init: str | None = None
    """Checkpoint (ours, official MJP, timm, DeiT) whose weights training starts from; a classifier of another size and
    the parts of MJP the file lacks are newly initialised, which the log says."""
    resume: Literal["never", "auto"] = "never"
    """auto continues from last.pt in the run folder, exactly; a fresh folder starts from scratch."""

    def __post_init__(self):
        super().__post_init__()
        mixing = self.optim.mixup > 0 or self.optim.cutmix > 0
        text = self.data.kind == "text"
        fits = text == (self.model.name in get_args(TextModelName))
        check(fits, "model.name", f"a model of --data.kind {self.data.kind}", self.model.name)
        if text:
            check(not mixing, "optim.mixup and --optim.cutmix", "0 with --data.kind text", "mixtures of images")
            check(self.jigsaw.shuffle == "mjp", "jigsaw.shuffle", "mjp with --data.kind text", self.jigsaw.shuffle)
        check(not mixing or self.data.batch_size % 2 == 0, "data.batch_size", "even with mixup", self.data.batch_size)


@dataclass(frozen=True, kw_only=True)
class ShuffledConfig(RunConfig, MaskConfig):
    checkpoint: str | None = None
    """Checkpoint of train.py, the official MJP code, timm or DeiT (.pt, .pth, .safetensors)."""
    timm: str | None = None
    """Any classifier of timm by name, with the inputs timm gives it; its weights are those of --checkpoint, of
    --pretrained, or random."""
    pretrained: bool = False
    """Let timm download the weights it has for its model."""
    patch_size: int | None = None
    """Patches in pixels in which images are shuffled for a timm model; default the model's, or 16 if it has none."""
    data: DataConfig = field(default_factory=DataConfig)
    mask_ratios: list[float] = field(default_factory=lambda: [0.0])
    """Shares of patches to shuffle; models with an unknown position embedding also hide their positions."""
    seeds: int = 1
    """Mask draws to average over, from `seed` on; the spread over them is reported."""
    ema: bool = False
    """Use the averaged weights."""
    num_heads: int | None = None
    """Attention heads, for foreign ViT checkpoints whose heads are not 64 wide."""
    limit: int | None = None
    """Use only so many images, spread evenly over the set."""

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is None and self.timm is None:
            raise UserError("give the model as --checkpoint FILE, or as --timm NAME with or without a checkpoint")
        text = self.data.kind == "text"
        check(not (text and self.timm), "timm", "left out with --data.kind text", self.timm)
        for key in ("pretrained", "patch_size"):
            check(self.timm or not getattr(self, key), key, "used with --timm", getattr(self, key))
        for key in ("ema", "num_heads"):
            check(not (self.timm and getattr(self, key)), key, "left out with --timm", getattr(self, key))
        check(not (self.checkpoint and self.pretrained), "pretrained", "left out with --checkpoint", self.pretrained)
        check(self.patch_size is None or self.patch_size >= 1, "patch_size", "at least 1", self.patch_size)
        check(len(self.mask_ratios) > 0, "mask_ratios", "one ratio or more", self.mask_ratios)
        for ratio in self.mask_ratios:
            check(0 <= ratio <= 1, "mask_ratios", "between 0 and 1", ratio)
        check(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        check(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)

    def arguments(self) -> dict:
        """The options as plain arguments of eval.ratios.score_over_ratios."""
        return {
            "mask_ratios": self.mask_ratios,
            "seeds": range(self.seed, self.seed + self.seeds),
            "blocks": self.sampler(self.data.kind),
            "kind": self.data.kind,
            "data": self.data.options(),
            "model": self.model_arguments(),
            "limit": self.limit,
        }

    def model_arguments(self) -> dict:
        """The options as plain arguments of eval.subject.open_model."""
        keys = ("checkpoint", "timm", "pretrained", "patch_size", "ema", "num_heads")
        return {key: getattr(self, key) for key in keys} | {"seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ShuffledConfig):
    """Accuracy of a checkpoint on clean and on shuffled images, or another suite."""

    suite: Literal[
        "accuracy", "imagenet-c", "imagenet-a", "imagenet-o", "calibration", "position", "attention"
    ] = "accuracy"  # fmt: skip
    """What to measure. The ImageNet suites read class folders in data.path (imagenet-c: corruption/severity/class)."""
    known: str | None = None
    """imagenet-o: class folders of ordinary images, such as ImageNet's val folder."""
    clean_error: float | None = None
    """imagenet-c: the model's top-1 error on clean images in percent, for the relative mCE."""
    legacy: bool = False
    """imagenet-a, calibration: leave out the last calibration bin, as the official code does."""
    repeats: int = 20
    """position: random splits to average over."""
    ridge: float = 0.0
    """position: penalty on the probes' squared weights, inputs scaled to unit variance."""
    block: int = -1
    """attention: block whose heads are shown, from 0, or from the last with -1."""

    def __post_init__(self):
        super().__post_init__()
        uses = {"known": ("imagenet-o",), "clean_error": ("imagenet-c",), "legacy": ("imagenet-a", "calibration")}
        for key, suites in uses.items():
            check(not getattr(self, key) or self.suite in suites, key, f"used with --suite {suites[0]}", self.suite)
        check(self.data.kind == "image" or self.suite == "accuracy", "suite", "accuracy for text", self.suite)
        check(self.repeats >= 1, "repeats", "at least 1", self.repeats)
        check(self.ridge >= 0, "ridge", "0 or more", self.ridge)

    def suite_arguments(self) -> dict:
        """The options as plain arguments of the suite's function."""
        own = {
            "imagenet-c": ["limit", "clean_error"],
            "imagenet-o": ["limit", "known"],
            "position": ["repeats", "ridge", "seed"],
            "attention": ["limit", "mask_ratios", "seed", "block"],
        }.get(self.suite, ["limit", "legacy"])
        shared = {key: self.arguments()[key] for key in ("data", "model")}
        blocks = {"blocks": self.arguments()["blocks"]} if self.suite == "attention" else {}
        return shared | blocks | {key: getattr(self, key) for key in own}


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(ShuffledConfig):
    """Does a model see the same thing in an image and in its shuffled version? Same options as eval.py.

    The official protocol resizes straight to the input size (--data.crop false) and uses a ratio of 0.5.
    """

    mask_ratios: list[float] = field(default_factory=lambda: [0.5])
    """Shares of patches to shuffle in the second view of every image."""


@dataclass(frozen=True)
class PrivateTextConfig:
    kind: Literal["image", "text"] = "image"
    """Attack images (--images), or the sentences of val.csv in data.path."""
    path: str | None = None
    """Text: folder with train.csv, on which the tokenizer of a named victim is trained, and val.csv."""
    min_tokens: int = 3
    """Text: attack only sentences of at least so many tokens, [CLS] and [SEP] included."""
    max_tokens: int = 512
    """Text: and of at most so many."""
    public: str | None = None
    """Text: CSV file of sentences of the same kind that the server has, to order tokens that no gradient orders."""
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self):
        check(3 <= self.min_tokens <= self.max_tokens, "data.min_tokens", "from 3 to max_tokens", self.min_tokens)


@dataclass(frozen=True, kw_only=True)
class AttackConfig(RunConfig, MaskConfig):
    """Reconstruct private images from the gradients a victim shares, and score what came out."""

    attack: Literal[
        "closed_form", "adaptive", "token_span", "ats_aware", "april", "dlg", "idlg", "inverting_gradients", "modern",
        "gradinversion", "gradvit", "april_matching", "rgap", "hybrid", "token_rows", "dager", "text_dlg", "tag",
    ] = "closed_form"  # fmt: skip
    """Attack to run; each is a file of attacks/ with its paper's settings as defaults."""
    attack_options: dict = field(default_factory=dict)
    """Options of the attack, e.g. --attack_options.NAME VALUE."""
    model: str | None = None
    """Victim by name, randomly initialised (or give --checkpoint): one of ours, timm:NAME, torchvision:NAME, or
    FILE.py:FUNCTION, which runs the file."""
    model_options: dict = field(default_factory=dict)
    """Options of the model, e.g. --model_options.patch_size 8; `unknown` defaults to true when mask_ratio > 0."""
    checkpoint: str | None = None
    """Victim's weights: a checkpoint of train.py, the official MJP code, timm or DeiT; with --model timm:NAME and the
    like, a state dict of that model."""
    leak: str | None = None
    """Attack this leak file of a real training, or all in this folder (leak_file.py, docs/leak_files.md)."""
    images: str | None = None
    """Folder of private images, searched recursively. With --leak: the originals, in order, only to score by."""
    data: PrivateTextConfig = field(default_factory=PrivateTextConfig)
    num_images: int | None = None
    """Attack so many images, or sentences, spread evenly over the folder, or file; default all."""
    batch_size: int = 1
    """Images per gradient."""
    image_size: int | None = None
    """Side of the victim's input in pixels; default 224, or the checkpoint's."""
    mean: tuple[float, float, float] | None = None
    """Channel means of pixels in [0, 1]; default the checkpoint's, or ImageNet's."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations of pixels in [0, 1]; default the checkpoint's, or ImageNet's."""
    mask_ratio: float = 0.0
    """Share of the patches the victim masks and permutes (MJP); 0 is a plain step."""
    defense: DefenseName = "none"
    """What the victim does to its images before the step, or to the gradient before sharing it (defenses/)."""
    defense_options: dict = field(default_factory=dict)
    """Options of the defence, e.g. --defense_options.std 1e-3."""
    labels: Literal["known", "hidden"] = "known"
    """Whether the attacker is told the labels (places of the class folders, else arg-max of the victim)."""
    tier: Literal["T0", "T1", "T2", "T3"] = "T1"
    """What the attacker knows of MJP: nothing, the code, also the mask, also the permutation."""
    withhold: list[str] = field(default_factory=list)
    """Gradients the client keeps to itself: parameter names or patterns, e.g. pos_embed or 'head.*'."""
    local_steps: int = 1
    """FedAvg: SGD steps of the client before it shares its weight update; 1 shares a plain gradient (FedSGD)."""
    local_lr: float = 1e-3
    """FedAvg: learning rate of the client's steps."""
    local_batch_size: int | None = None
    """FedAvg: images per step of the client, in order and around the end; default all of batch_size."""
    train_mode: bool = False
    """The client's model is in training mode: BatchNorm uses its batch, dropout is on (needs dropout_seed)."""
    dropout_seed: int | None = None
    """Seed of the client's dropout, which the attacker is then told."""
    share_statistics: bool = False
    """The client shares the BatchNorm statistics of its batch."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the victim's gradient."""
    victims_at_once: int | None = None
    """Independent victims attacked as one vectorised problem; default 16 below a million parameters, else 1."""
    watch_every: int = 0
    """Iterations between TensorBoard pictures of a running optimisation; 0 takes none."""
    lpips: Literal["alex", "vgg", "squeeze"] | None = None
    """Also score LPIPS, with this network; its ImageNet weights are downloaded, or read from lpips_trunk."""
    lpips_trunk: str | None = None
    """torchvision's file with the weights of the LPIPS network."""
    success_psnr: float = 25.0
    """PSNR in dB above which a reconstruction counts as a success in the summary."""
    success_tokens: float = 85.0
    """Text: percentage of tokens in place above which a reconstruction counts as a success in the summary."""
    metric_only: bool = False
    """Attack nothing: say from shapes and ranks what linear equations leave open of an image (chains, ViTs)."""
    audit: bool = False
    """Write audit.html: what shapes and ranks give away, what the attacks that apply recover of sample photographs (or
    of --images) within a small budget, and what defences change."""
    resume: Literal["never", "auto"] = "never"
    """auto: continue the unfinished campaign in the output folder, if there is one."""

    def __post_init__(self):
        super().__post_init__()
        if self.model is None and self.checkpoint is None:
            raise UserError("give the victim as --model NAME or as --checkpoint FILE, one of the two")
        text = self.data.kind == "text"
        if self.model is not None and ":" not in self.model:
            if self.checkpoint is not None:
                raise UserError("give the victim as --model NAME or as --checkpoint FILE, one of the two")
            known = (*get_args(ModelName), *get_args(TextModelName))
            if self.model not in known:
                raise UserError(f"--model: unknown value '{self.model}': {did_you_mean(self.model, known)}")
        if self.images is None and not (self.metric_only or self.leak or self.audit or text):
            raise UserError("--images is missing: the folder of private images")
        if sum(map(bool, (self.metric_only, self.leak, self.audit))) > 1:
            raise UserError("--metric_only, --leak and --audit are different questions: ask one at a time")
        if self.leak:
            self._check_leak()
        check(text == (self.attack in TEXT_ATTACKS), "attack", f"one for --data.kind {self.data.kind}", self.attack)
        if self.model is not None:
            fits = text == (self.model in get_args(TextModelName))
            check(fits, "model", f"a model of --data.kind {self.data.kind}", self.model)
        if text:
            check(self.data.path is not None, "data.path", "the folder of train.csv and val.csv", "nothing")
            check(self.batch_size == 1 and self.local_steps == 1, "batch_size, --local_steps", "1 for text", "more")
            for key in ("images", "image_size", "lpips", "metric_only", "leak", "audit", "share_statistics"):
                check(not getattr(self, key), key, "left out with --data.kind text", getattr(self, key))
        check(0 <= self.mask_ratio <= 1, "mask_ratio", "between 0 and 1", self.mask_ratio)
        check(not self.std or all(value > 0 for value in self.std), "std", "above 0", self.std)
        for key in ("image_size", "seed", "name", "checkpoint"):
            check(key not in self.model_options, f"model_options.{key}", "given as an option of its own", "it here")
        for key in ("num_images", "local_batch_size", "victims_at_once"):
            value = getattr(self, key)
            check(value is None or value >= 1, key, "at least 1", value)
        for key in ("batch_size", "local_steps"):
            check(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))
        check(self.local_lr > 0, "local_lr", "above 0", self.local_lr)
        check(self.lpips or not self.lpips_trunk, "lpips_trunk", "used with --lpips", self.lpips_trunk)
        check(self.watch_every >= 0, "watch_every", "0 or more", self.watch_every)
        check(self.dropout_seed is None or self.train_mode, "dropout_seed", "used with --train_mode", self.dropout_seed)

    def _check_leak(self) -> None:
        """What the leak file says cannot be said here."""
        told = {"tier": ("T0", "T1"), "labels": ("known",), "mask_ratio": (0.0,), "batch_size": (1,), "withhold": ([],)}
        told |= {"local_steps": (1,), "train_mode": (False,), "share_statistics": (False,), "defense": ("none",)}
        told |= {"num_images": (None,)}
        for key, values in told.items():
            check(getattr(self, key) in values, key, "left out with --leak, whose file says it", getattr(self, key))

    def folder(self) -> dict:
        """How the run folder is opened: options of utils.runs.Run. Some options change no reconstruction."""
        return {
            "overwrite": self.overwrite,
            "resume": self.resume == "auto",
            "state": "partial",
            "may_change": ("device", "victims_at_once", "watch_every", "success_psnr"),
            "inputs": (self.checkpoint, self.images, self.leak, self.data.path, self.data.public),
        }

    def victim(self) -> dict:
        """The model whose gradients are shared: options of attacks.victim.build_victim."""
        hides = {"unknown": True} if self.model and ":" not in self.model and self.mask_ratio > 0 else {}
        own = {"checkpoint": self.checkpoint, "name": self.model, "image_size": self.image_size, "seed": self.seed}
        return own | hides | plain(self.model_options)

    def sentences(self, defense: str) -> dict:
        """The options of a campaign on text: of text_campaign.attack_sentences."""
        data, model = self.data, self.victim()
        given = {"checkpoint": model.pop("checkpoint"), "name": model.pop("name"), "encoding": data.text.encoding()}
        model = {key: value for key, value in model.items() if key not in ("image_size", "seed")}
        chosen = {"num_images": self.num_images, "min_tokens": data.min_tokens, "max_tokens": data.max_tokens}
        return {
            "victim": given | {"options": model},
            "data": {"path": data.path, "columns": data.text.columns()} | chosen,
            "public": data.public,
            "jigsaw": {"mask_ratio": self.mask_ratio} | self.sampler("text"),
            "seed": self.seed,
            "terms": self.terms(),
            "threat_model": self.threat_model(defense),
            "threshold": self.success_tokens,
            "watch_every": self.watch_every,
            "together": self.victims_at_once or 1,
        }

    def terms(self) -> dict:
        """What a client's round is like and what its server sees: keyword options of attacks.victim.share."""
        local = (self.local_steps, self.local_lr, self.local_batch_size or self.batch_size)
        return {
            "reveal_labels": self.labels == "known",
            "local": local if self.local_steps > 1 else None,
            "training": self.train_mode,
            "dropout_seed": self.dropout_seed,
            "statistics": self.share_statistics,
            "withhold": self.withhold,
            "tier": self.tier,
        }

    def leak_terms(self) -> dict:
        """Who attacks leak files of which model: keyword options of victims.recorded."""
        return {"tier": self.tier, "seed": self.seed, "name": self.model or self.checkpoint}

    def audit_terms(self) -> dict:
        """What is audited, beside the model: keyword options of audit.audit."""
        keys = ("mask_ratio", "batch_size", "seed", "success_psnr")
        name = {"name": self.model or self.checkpoint, "puzzle": self.sampler("image")}
        return {key: getattr(self, key) for key in keys} | name

    def shapes(self) -> dict:
        """What the security metric depends on: keyword options of attacks.security.security."""
        return {"mask_ratio": self.mask_ratio, "batch_size": self.batch_size, "withhold": self.withhold}

    def threat_model(self, defense: str) -> dict[str, str]:
        """The same for people: who knows what. defense: the options of the defence."""
        text = self.data.kind == "text"
        images = "1 sentence" if text else f"{self.batch_size} image{'s' * (self.batch_size > 1)}"
        update = f"update of {self.local_steps} SGD steps (rate {self.local_lr:g}) on {images}"
        tiers = {
            "T0": "unaware of it (T0)",
            "T1": "knows the code and infers the mask (T1)",
            "T2": "is also told the mask (T2)",
            "T3": "is told the mask and the permutation (T3)",
        }
        mode = f"training, dropout seed {self.dropout_seed}" if self.train_mode else "evaluation"
        return {
            "attacker": "honest-but-curious server: it follows the protocol and looks at what it is sent",
            "shared": f"{update if self.local_steps > 1 else 'gradient of ' + images}, {self.dtype}",
            "withheld": ", ".join(self.withhold) or "nothing",
            "labels": "told" if self.labels == "known" else "hidden",
            "victim": f"{self.model or self.checkpoint}, {'random' if self.model else 'trained'} weights, {mode} mode",
            **(self._text_terms() if text else self._image_terms()),
            "MJP": f"mask ratio {self.mask_ratio:g}; the attacker {tiers[self.tier]}" if self.mask_ratio else "off",
            "defence": f"{self.defense} ({defense})" if defense else self.defense,
        }

    def _image_terms(self) -> dict[str, str]:
        return {"BatchNorm statistics": "of the batch, shared" if self.share_statistics else "not shared"}

    def _text_terms(self) -> dict[str, str]:
        public = f"has those of {self.data.public}" if self.data.public else "has none"
        return {"tokenizer and length": "known", "public sentences": f"the server {public}"}
