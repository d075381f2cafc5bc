"""Options of train.py."""

from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal, get_args

from defenses import DEFENSES
from options.shared import DataConfig, DefenseName, MaskConfig, ModelName, RunConfig, TextModelName, check


@dataclass(frozen=True)
class AugmentConfig:
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


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: Literal[ModelName, TextModelName] = "deit_small"
    """Architecture; embed_dim, depth and num_heads shape vit and text models."""
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
    init_values: float | None = None
    """First value of LayerScale, which a ViT multiplies its branches by (DINOv2: 1e-5); default no LayerScale."""
    dropout: float | None = None
    """Dropout rate of a text model; default 0.1."""
    width: int | None = None
    """Channels of the first stage, for convnet (default 64) and the CIFAR ResNets, or of the layers of mlp."""
    unknown: bool | None = None
    """Shared unknown position embedding: masked patches hide their position (MJP). Off: a naive shuffle."""
    index_embed: bool | None = None
    """Second position embedding that masked patches keep (+idx ablation; gives the position away)."""
    absolute_pos_embed: bool | None = None
    """Swin: an absolute position embedding; `unknown` and `localization` bring it too (official: --ape)."""
    relative_position_bias: bool | None = None
    """Swin: the relative-position bias of window attention; default true (official: rpe)."""
    localization: Literal["none", "linear", "nonlinear", "pca", "pca_official", "relative"] | None = None
    """Localization head: dense absolute, or relative (the follow-up on text); default none."""
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
    drop_path: float | None = None
    """Stochastic depth rate of the last block; default 0.1 for networks that have it: transformers and the ResNets for
    ImageNet (official MJP ViT: 0, it never reached the model)."""

    def __post_init__(self):
        for key in ("patch_size", "embed_dim", "depth", "num_heads", "width", "tie"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"model.{key}", "at least 1", value)
        check(not self.bottleneck or self.bottleneck >= 1, "model.bottleneck", "0 or more", self.bottleneck)
        check(0 <= (self.drop_path or 0) < 1, "model.drop_path", "in [0, 1)", self.drop_path)
        check(not self.dropout or 0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)

    def options(self) -> dict:
        """Return the options of `build_model`."""
        deep = self.name.startswith(("vit", "deit", "swin")) or self.name in (
            "resnet50",
            "resnet18",
            "text_small",
            "bert",
        )
        return asdict(self) | ({"drop_path": 0.1} if deep and self.drop_path is None else {})


@dataclass(frozen=True, kw_only=True)
class JigsawConfig(MaskConfig):
    """The masked jigsaw puzzle: how much is shuffled, how often, from when on."""

    mask_ratio: float = 0.0
    """Share of the patches to mask and permute; 0 turns the jigsaw off."""
    probability: float = 0.5
    """Chance that a training step is masked."""
    start_epoch: int = 20
    """First epoch with the jigsaw (official: after the warm-up)."""
    shuffle: Literal["mjp", "pps"] = "mjp"
    """mjp permutes the masked patches; pps permutes all pixels in patches and all patches, whatever mask_ratio says."""
    move: Literal["auto", "pixels"] = "auto"
    """What a masked step permutes: pixels of the images (official), or auto, which trains the same for less: position
    embeddings of a ViT the other way, and nothing where the shared unknown row makes the order invisible."""
    per_sample: bool = False
    """Own mask for every image instead of one for the global batch (official: one); sentences always have their own."""
    shrinking_window: bool = False
    """Text: as the published code, keep the length of a sentence's last window for the rest of the batch."""

    def policy(self, kind: str) -> dict:
        """Options of `MaskPolicy` for images, of `TokenPolicy` for text."""
        keys = ["mask_ratio", "probability", "start_epoch"]
        keys += ["shrinking_window"] if kind == "text" else ["shuffle", "move", "per_sample"]
        return {key: getattr(self, key) for key in keys} | self.sampler(kind)

    def __post_init__(self):
        check(0 <= self.mask_ratio <= 1, "jigsaw.mask_ratio", "between 0 and 1", self.mask_ratio)
        check(0 <= self.probability <= 1, "jigsaw.probability", "between 0 and 1", self.probability)
        super().__post_init__()


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule, losses, precision."""

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
    warm-up to a hundredth; step multiplies by decay_rate every decay_epochs, from step 0."""
    decay_epochs: int | None = None
    """Schedule step: epochs between decays, the warm-up counted (official: 30); default a third of the run."""
    decay_rate: float = 0.1
    """Schedule step: factor of each decay."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum, as in the official code."""
    momentum: float = 0.9
    """SGD: momentum."""
    weight_decay: float = 0.05
    """Weight decay; not on biases, norms and position embeddings."""
    decay_pos_embed: bool = False
    """Decay position embeddings too (official MJP: true, by accident)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    eps: float = 1e-8
    """AdamW epsilon."""
    fused: bool = True
    """Fused kernel of the optimizer."""
    clip: float = 5.0
    """Largest global gradient norm; 0 is off. Applied once per update."""
    accumulation: int = 1
    """Steps whose gradients are summed into one update."""
    mixup: float = 0.8
    """Mixup alpha; 0 is off."""
    cutmix: float = 1.0
    """CutMix alpha; 0 is off."""
    cutmix_minmax: tuple[float, float] | None = None
    """CutMix: smallest and largest side of the box, as shares of the image, in place of alpha."""
    mixup_probability: float = 1.0
    """Chance that a step mixes images."""
    mixup_switch: float = 0.5
    """Chance of CutMix in place of mixup where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One mixture for the batch, one for each pair of images, or one for each image."""
    label_smoothing: float = 0.1
    """Label smoothing."""
    localization_weight: float = 0.01
    """Weight of the localization loss after its warm-up; it then falls to half along a cosine."""
    ema: float = 0.0
    """Decay of the averaged weights per update, e.g. 0.99996; 0 is off."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision of the forward pass (official: none)."""
    matmul: Literal["highest", "high", "medium"] = "highest"
    """How float32 matrices are multiplied: on a GPU high is TF32; on a CPU medium may take a faster library at full
    precision, or round to bf16 (the log states the error; benchmarks/training.py finds what is fastest)."""
    attention: Literal["fused", "plain"] = "fused"
    """Attention as one kernel, or as plain matrix products: faster on some CPUs in bf16."""
    channels_last: bool = False
    """Store images and convolutions with channels innermost: faster for ResNets, on a GPU with amp above all."""
    compile: bool = False
    """torch.compile the training step."""
    grad_checkpointing: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""

    @property
    def mixing(self) -> bool:
        """Return whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def __post_init__(self):
        check(self.epochs >= 1, "optim.epochs", "at least 1", self.epochs)
        check(self.decay_epochs is None or self.decay_epochs >= 1, "optim.decay_epochs", "1 or more", self.decay_epochs)
        check(self.decay_rate > 0, "optim.decay_rate", "above 0", self.decay_rate)
        check(0 <= self.momentum < 1, "optim.momentum", "in [0, 1)", self.momentum)
        for key in ("mixup_probability", "mixup_switch"):
            check(0 <= getattr(self, key) <= 1, f"optim.{key}", "between 0 and 1", getattr(self, key))
        low, high = self.cutmix_minmax or (0.5, 0.5)
        check(0 < low <= high < 1, "optim.cutmix_minmax", "two shares in (0, 1), the smaller first", self.cutmix_minmax)
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
    """What is written, and how often."""

    every: int = 50
    """Steps between progress lines in log.txt; on a GPU also between checks for a stop signal or a bad loss."""
    checkpoint_every: int = 1
    """Epochs between writes of last.pt (official: 5)."""
    checkpoint_minutes: float = 30.0
    """Minutes after which last.pt is written inside an epoch too; 0 is never."""
    images_every: int = 20
    """Epochs between TensorBoard images of shuffled inputs and the position-embedding similarity map; 0 is off."""

    def __post_init__(self):
        check(self.every >= 1, "log.every", "at least 1", self.every)
        check(self.checkpoint_every >= 1, "log.checkpoint_every", "at least 1", self.checkpoint_every)
        check(self.checkpoint_minutes >= 0, "log.checkpoint_minutes", "0 or more", self.checkpoint_minutes)

    def between_steps(self) -> dict:
        """Return what the training loop looks at between steps: keyword options of engine.Trainer."""
        return {"check_every": self.every, "checkpoint_minutes": self.checkpoint_minutes}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Train a ViT/DeiT, Swin or ResNet-50, plain or with Masked Jigsaw Puzzle position embeddings.

    The defaults are the official 300-epoch ImageNet recipe on plain DeiT-S; configs/train/*.yaml are diffs against it.
    """

    script: ClassVar[str] = "train.py"
    usage: ClassVar[str] = "python train.py --config FILE --data.path DIR --output DIR"
    common: ClassVar[tuple[str, ...]] = (
        "data.path", "data.dataset", "data.image_size", "data.batch_size", "model.name", "model.unknown",
        "model.localization", "jigsaw.mask_ratio", "jigsaw.start_epoch", "optim.epochs", "optim.lr", "optim.amp",
        "defense", "defense_options", "init", "output", "overwrite", "resume", "device", "seed",
    )  # fmt: skip
    parts: ClassVar[dict] = {"defense": ("defense_options", DEFENSES)}
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
    """Checkpoint (ours, official MJP, timm, DeiT) that training starts from; a classifier of another size and
    the parts of MJP the file lacks are newly initialised, which the log says."""
    resume: Literal["never", "auto"] = "never"
    """auto continues from last.pt in the run folder, exactly; a fresh folder starts from scratch."""

    def __post_init__(self):
        super().__post_init__()
        mixing = self.optim.mixing
        text = self.data.kind == "text"
        fits = text == (self.model.name in get_args(TextModelName))
        check(fits, "model.name", f"a model of --data.kind {self.data.kind}", self.model.name)
        if text:
            check(not mixing, "optim.mixup and --optim.cutmix", "0 with --data.kind text", "mixtures of images")
            check(not self.optim.channels_last, "optim.channels_last", "false with --data.kind text", "true")
            check(self.jigsaw.shuffle == "mjp", "jigsaw.shuffle", "mjp with --data.kind text", self.jigsaw.shuffle)
        if self.data.dataset == "attributes":
            check(
                not mixing, "optim.mixup and --optim.cutmix", "0 with --data.dataset attributes", "mixtures of classes"
            )
            smooth = self.optim.label_smoothing
            check(not smooth, "optim.label_smoothing", "0 with --data.dataset attributes", smooth)
        check(not mixing or self.data.batch_size % 2 == 0, "data.batch_size", "even with mixup", self.data.batch_size)

    def inputs(self) -> tuple[str | None, ...]:
        """Files and folders the run reads."""
        return None if self.data.download else self.data.path, self.data.classes, self.init

    def recipe(self) -> dict:
        """Return what decides whether a defence can train under these options: fields of defenses.base.Recipe."""
        options = {key: getattr(self.optim, key) for key in ("amp", "accumulation", "compile", "grad_checkpointing")}
        return options | {
            "mixing": self.optim.mixing,
            "repeats": self.augment.repeats if self.data.kind == "image" else 1,
            "on_corrupt": self.data.on_corrupt,
            "kind": self.data.kind,
            "localization": self.model.localization or "none",
            "shrinking_window": self.jigsaw.shrinking_window,
            "tokenizer": self.data.text.tokenizer,
        }
