"""Options of eval.py and consistency.py."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from data.options import DataOptions
from eval.options import SubjectOptions
from models.options import MaskOptions
from utils.checks import check
from utils.run_options import RunOptions
from utils.schema import refuse_changed

USED_BY = {  # options of eval.py that only these suites have a use for
    "mask_ratios": ("accuracy", "attention"), "mask_per": ("accuracy", "attention"), "seeds": ("accuracy",),
    "known": ("imagenet-o",), "clean_error": ("imagenet-c",), "legacy": ("imagenet-a", "calibration"),
    "repeats": ("position",), "ridge": ("position",), "block": ("attention",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ShuffledConfig(SubjectOptions, RunOptions, MaskOptions):
    """A model, and the mask ratios it is scored at."""

    common: ClassVar[tuple[str, ...]] = (
        "checkpoint", "timm", "pretrained", "mask_ratios", "seeds", "limit", "data.path", "data.dataset",
        "data.image_size", "data.batch_size", "data.crop", "output", "overwrite", "device", "seed",
    )  # fmt: skip
    data: DataOptions = field(default_factory=DataOptions)
    mask_ratios: list[float] = field(default_factory=lambda: [0.0])
    """Shares of patches to shuffle; models with an unknown position embedding also hide their positions."""
    mask_per: Literal["image", "batch"] = "image"
    """Own mask and permutation for each image, or one for each batch, as the official code: numbers then depend on
    data.batch_size and the number of processes."""
    seeds: int = 1
    """Mask draws to average over, from `seed` on; the spread over them is reported."""
    limit: int | None = None
    """Use only so many images, spread evenly over the set."""

    def __post_init__(self):
        super().__post_init__()
        text = self.data.kind == "text"
        check(self.data.channels is None, "data.channels", "left out: the model says it", self.data.channels)
        check(not (text and self.timm), "timm", "left out with --data.kind text", self.timm)
        check(len(self.mask_ratios) > 0, "mask_ratios", "one ratio or more", self.mask_ratios)
        for ratio in self.mask_ratios:
            check(0 <= ratio <= 1, "mask_ratios", "between 0 and 1", ratio)
        check(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        check(not text or self.mask_per == "image", "mask_per", "image with --data.kind text", self.mask_per)
        check(self.limit is None or self.limit >= 1, "limit", "at least 1", self.limit)

    def inputs(self) -> tuple[str | None, ...]:
        """Return files and folders the run reads."""
        hub = (self.checkpoint or "").startswith("hf:")  # a name, or a folder that is read as one
        return None if hub else self.checkpoint, self.data.path, self.data.classes

    def folder(self) -> dict:
        """Return how the run folder is opened: options of utils.runs.Run."""
        return {"overwrite": self.overwrite, "inputs": self.inputs(), "state": None, "outputs": ()}

    def puzzle(self) -> dict:
        """Return how masks are drawn, less ratio and seed: options of `Jigsaw`, or of `TokenJigsaw` for text."""
        return self.sampler(self.data.kind) | ({"per_batch": True} if self.mask_per == "batch" else {})

    def arguments(self) -> dict:
        """Return the keyword options of eval.ratios.score_over_ratios."""
        return {
            "model": self.part(SubjectOptions),
            "data": self.data,
            "mask_ratios": self.mask_ratios,
            "seeds": range(self.seed, self.seed + self.seeds),
            "puzzle": self.puzzle(),
            "limit": self.limit,
        }


@dataclass(frozen=True, kw_only=True)
class EvalConfig(ShuffledConfig):
    """Accuracy of a checkpoint on clean and on shuffled images, or another suite."""

    script: ClassVar[str] = "eval.py"
    usage: ClassVar[str] = "python eval.py --checkpoint FILE --data.path DIR --output DIR"
    common: ClassVar[tuple[str, ...]] = ("suite", *ShuffledConfig.common)
    suite: Literal[
        "accuracy", "imagenet-c", "imagenet-a", "imagenet-o", "calibration", "position", "attention"
    ] = "accuracy"  # fmt: skip
    """What to measure. The ImageNet suites read class folders in data.path (imagenet-c: corruption/severity/class)."""
    throughput: bool = False
    """Measure images per second instead: 30 passes of the first batch after 50 to warm up."""
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
        text = self.data.kind == "text"
        check(not text or self.suite == "accuracy", "suite", "accuracy for text", self.suite)
        check(not self.throughput or self.suite == "accuracy", "throughput", "used without --suite", self.suite)
        check(not (self.throughput and text), "throughput", "left out with --data.kind text", self.throughput)
        for key, suites in USED_BY.items():
            if self.measured not in suites:
                refuse_changed(self, f"used with --suite {' or '.join(suites)}", (key,))
        check(self.repeats >= 1, "repeats", "at least 1", self.repeats)
        check(self.ridge >= 0, "ridge", "0 or more", self.ridge)

    def inputs(self) -> tuple[str | None, ...]:
        """Return files and folders the run reads."""
        return *super().inputs(), self.known

    @property
    def measured(self) -> str:
        """Return the name of what is measured: the suite, or throughput."""
        return "throughput" if self.throughput else self.suite

    def suite_arguments(self) -> dict:
        """Return the keyword options of the suite's function."""
        own = {
            "throughput": [],
            "imagenet-c": ["limit", "clean_error"],
            "imagenet-o": ["limit", "known"],
            "position": ["repeats", "ridge"],
            "attention": ["limit", "mask_ratios", "block"],
        }.get(self.measured, ["limit", "legacy"])
        shared = {"model": self.part(SubjectOptions), "data": self.data, "seed": self.seed}
        puzzle = {"puzzle": self.puzzle()} if self.suite == "attention" else {}
        return shared | puzzle | {key: getattr(self, key) for key in own}


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(ShuffledConfig):
    """Does a model see the same thing in an image and in its shuffled version? Same options as eval.py.

    The official protocol resizes straight to the input size (--data.crop false) and uses a ratio of 0.5.
    """

    script: ClassVar[str] = "consistency.py"
    usage: ClassVar[str] = "python consistency.py --checkpoint FILE --data.path DIR --output DIR"
    mask_ratios: list[float] = field(default_factory=lambda: [0.5])
    """Shares of patches to shuffle in the second view of every image."""
