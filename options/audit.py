"""Options of audit.py."""

from dataclasses import dataclass
from typing import ClassVar

from attacks.threat_model.options import VictimOptions
from models.options import MaskOptions
from utils.checks import check
from utils.run_options import RunOptions, typed


@dataclass(frozen=True, kw_only=True)
class AuditConfig(VictimOptions, RunOptions, MaskOptions):
    """What one shared gradient of a model gives away, or whether a model that was received was tampered with."""

    script: ClassVar[str] = "audit.py"
    usage: ClassVar[str] = "python audit.py --model NAME|--checkpoint FILE|--check FILE --output DIR"
    common: ClassVar[tuple[str, ...]] = (
        "model", "checkpoint", "images", "num_images", "batch_size", "mask_ratio", "minutes", "check", "reference",
        "output", "overwrite", "device", "seed",
    )  # fmt: skip
    images: str | list[str] | None = None
    """Photographs that stand in for private ones: files or folders; default the few embedded in the project."""
    num_images: int | None = None
    """Use so many images, spread evenly over the folder; default all."""
    batch_size: int = 1
    """Images per gradient."""
    mask_ratio: float = 0.0
    """Share of the patches the client masks and permutes (MJP); 0 is a plain step."""
    minutes: float = 5.0
    """Minutes that all of it may take: slower attacks get fewer iterations or are stopped, and the page says which."""
    success_psnr: float = 25.0
    """PSNR in dB above which a reconstruction counts as a success."""
    check: str | None = None
    """Say whether this checkpoint, which a server sent, was tampered with (docs/servers.md), instead of an audit."""
    reference: str | None = None
    """For --check: an earlier checkpoint of the same training."""

    def __post_init__(self):
        super().__post_init__()
        check((self.check is None) == (self.reference is None), "check, --reference", "given together", "one of them")
        if self.check is None:
            self.check_victim(text=False)
        else:
            given = self.model or self.checkpoint
            check(given is None, "model, --checkpoint", "left out with --check", given)
        check(0 <= self.mask_ratio <= 1, "mask_ratio", "between 0 and 1", self.mask_ratio)
        check(self.minutes > 0, "minutes", "above 0", self.minutes)
        check(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        check(self.num_images is None or self.num_images >= 1, "num_images", "at least 1", self.num_images)

    def folder(self) -> dict:
        """Return how the run folder is opened: options of utils.runs.Run."""
        outputs = () if self.check else ("audit.html",)
        return {"overwrite": self.overwrite, "state": None, "inputs": self.inputs(), "outputs": outputs}

    def inputs(self) -> tuple[str | None, ...]:
        """Return the files and folders the run reads."""
        images = [self.images] if isinstance(self.images, str) else self.images or []
        return self.checkpoint, self.check, self.reference, *images

    def terms(self) -> dict:
        """Return what is audited, beside the model: keyword options of campaigns.audit.audit."""
        keys = ("mask_ratio", "batch_size", "seed", "success_psnr", "minutes")
        name = {"name": self.model or self.checkpoint, "puzzle": self.sampler("image"), "root": self.images}
        return {key: getattr(self, key) for key in keys} | name | {"victim": self.as_typed()}

    def as_typed(self) -> dict[str, str]:
        """Return the options that name the victim as attack.py takes them, of a step like the one of this audit and of
        leak files, which say what their step was."""
        keys = ("model", "checkpoint", "image_size", "mean", "std", "dtype", "seed")
        model = typed(self, keys) + [f"--model_options.{key} {value}" for key, value in self.model_options.items()]
        hides = ["--model_options.unknown true"] if "unknown" in self.victim().keys() - self.model_options else []
        step = typed(self, ("batch_size", "mask_ratio", *self.sampler("image")))
        return {"options": " ".join(model + step), "of_leaks": " ".join(model + hides)}
