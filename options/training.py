"""Options of train.py."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args

from attacks.threat_model.options import DefenseName
from data.options import AugmentOptions, DataOptions
from defenses import DEFENSES
from models import LANGUAGE_MODELS
from models.options import ModelOptions, TextModelName
from training.options import JigsawOptions, LogOptions, OptimOptions
from utils.checks import check
from utils.run_options import RunOptions
from utils.schema import refuse_changed

Rows = tuple[tuple[object, tuple[str, ...] | None, str], ...]  # (idle, keys or None for all, what they are for)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunOptions):
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
    data: DataOptions = field(default_factory=DataOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    jigsaw: JigsawOptions = field(default_factory=JigsawOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    log: LogOptions = field(default_factory=LogOptions)
    defense: DefenseName = "none"
    """Defence the model is trained under: what it does to every batch, or to every gradient before the update."""
    defense_options: dict = field(default_factory=dict)
    """Options of the defence, e.g. --defense_options.policies 3-1-7+43-18-18."""
    init: str | None = None
    """Checkpoint (ours, official MJP, timm, DeiT) that training starts from; a classifier of another size and
    the parts of MJP the file lacks are newly initialised, which the log says."""
    resume: Literal["never", "auto", "same"] = "never"
    """auto continues from last.pt in the run folder, exactly; a fresh folder starts from scratch. same: so too, and
    refuses a run with other options (device, workers and log may differ), which auto goes on with, or leaves as it is,
    and says."""

    def __post_init__(self):
        super().__post_init__()
        mixing = self.optim.mixing
        text = self.data.kind == "text"
        fits = text == (self.model.name in get_args(TextModelName))
        check(fits, "model.name", f"a model of --data.kind {self.data.kind}", self.model.name)
        if text:
            classifies = self.model.name not in LANGUAGE_MODELS
            check(classifies, "model.name", "a classifier, text_small or bert", f"{self.model.name}, of attack.py")
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
        for section, rows in self._idle().items():
            for idle, keys, rule in rows:
                if idle:
                    refuse_changed(getattr(self, section), rule, keys, f"{section}.")
        weight, epochs, first = self.optim.localization_weight, self.optim.epochs, self.jigsaw.start_epoch
        lost = self.model.localization not in (None, "none") and weight == 0
        check(not lost, "optim.localization_weight", "above 0 with --model.localization", weight)
        rule = f"below --optim.epochs {epochs} with --jigsaw.mask_ratio or --jigsaw.shuffle pps"
        check(not self.jigsaw.on or first < epochs, "jigsaw.start_epoch", rule, first)

    def _idle(self) -> dict[str, Rows]:
        """Return, for each section, rows of (whether these options change nothing, which ones, what they are for).

        Asking for none of what there is none of is no mistake. What recipes hold ready may stay: decay_epochs, and of a
        mask without a ratio how large its blocks are and when it starts.
        """
        text = self.data.kind == "text"
        return {
            "augment": self._idle_augment(),
            "model": self._idle_model(),
            "jigsaw": self._idle_jigsaw(),
            "optim": self._idle_optim(),
            "log": ((text and self.log.images_every, ("images_every",), "used with --data.kind image"),),
        }

    def _idle_augment(self) -> Rows:
        augment, padded = self.augment, self.augment.pads(self.data.image_size or 224)
        drawn = augment.rand_augment and augment.color_jitter
        return (
            (self.data.kind == "text", None, "used with --data.kind image"),
            (padded, ("scale",), "used with --augment.crop resized"),
            (drawn, ("color_jitter",), "used with --augment.rand_augment null"),
            (not augment.erasing, ("erasing_mode", "erasing_count"), "used with --augment.erasing above 0"),
        )

    def _idle_model(self) -> Rows:
        model, unlocalized = self.model, self.model.localization in (None, "none")
        fixed = model.positions in ("none", "rotary", "sinusoidal") and not model.unknown
        return (
            (unlocalized and model.unit_targets, ("unit_targets",), "used with --model.localization"),
            (model.positions != "tied", ("tie",), "used with --model.positions tied"),
            (fixed, ("pos_embed_std",), f"left out with --model.positions {model.positions}"),
        )

    def _idle_jigsaw(self) -> Rows:
        jigsaw, kind = self.jigsaw, self.data.kind
        drawn, words = ("mask_sampler", "per_sample"), ("ngram", "shrinking_window")
        return (
            (kind == "text", ("mask_sampler", "min_block", "max_block"), "used with --data.kind image"),
            (kind == "image", ("window", *words), "used with --data.kind text"),
            (jigsaw.shuffle == "pps", drawn, "left out with --jigsaw.shuffle pps, which masks nothing"),
            (not jigsaw.on, ("probability", "move", *drawn, *words), "used with --jigsaw.mask_ratio above 0"),
        )

    def _idle_optim(self) -> Rows:
        optim, unlocalized = self.optim, self.model.localization in (None, "none")
        mixup, cutmix = optim.mixup > 0, optim.cutmix > 0 or optim.cutmix_minmax is not None
        mixed, either = ("mixup_probability", "mixup_mode"), "used with --optim.mixup or --optim.cutmix above 0"
        chosen = f"left out with --optim.recipe {optim.recipe}, which chooses it"
        return (
            (unlocalized and optim.localization_weight, ("localization_weight",), "used with --model.localization"),
            (optim.optimizer == "sgd", ("betas", "eps"), "used with --optim.optimizer adamw"),
            (optim.optimizer == "adamw", ("momentum",), "used with --optim.optimizer sgd"),
            (optim.schedule != "cosine", ("min_lr",), "used with --optim.schedule cosine"),
            (optim.schedule != "step", ("decay_rate",), "used with --optim.schedule step"),
            (optim.warmup_epochs == 0, ("warmup_lr",), "used with --optim.warmup_epochs above 0"),
            (not optim.mixing, mixed, either),
            (not (mixup and cutmix), ("mixup_switch",), "used with --optim.mixup and --optim.cutmix above 0"),
            (optim.cutmix_minmax and optim.cutmix, ("cutmix",), "left out with --optim.cutmix_minmax"),
            (optim.recipe != "given", ("amp", "matmul", "attention"), chosen),
        )

    def inputs(self) -> tuple[str | None, ...]:
        """Return files and folders the run reads."""
        return None if self.data.download else self.data.path, self.data.classes, self.init

    def folder(self) -> dict:
        """Return how the run folder is opened: options of utils.runs.Run."""
        logged = (f"log.{each.name}" for each in fields(LogOptions))
        return {
            "overwrite": self.overwrite,
            "resume": self.resume != "never",
            "may_change": ("device", "data.workers", *logged) if self.resume == "same" else None,
            "inputs": self.inputs(),
        }

    def network(self) -> dict:
        """Return the options of `build_model` that the data do not decide."""
        return self.model.options() | ({"window": self.jigsaw.window} if self.data.kind == "text" else {})

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
