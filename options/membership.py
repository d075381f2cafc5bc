"""Options of membership.py."""

from dataclasses import dataclass
from typing import ClassVar

from options.attacks import AttackConfig
from utils.checks import check
from utils.schema import refuse_changed


@dataclass(frozen=True, kw_only=True)
class MembershipConfig(AttackConfig):
    """Say which pictures took part in what clients shared, by the span of one layer's gradient (docs/servers.md)."""

    script: ClassVar[str] = "membership.py"
    usage: ClassVar[str] = "python membership.py --model NAME|--checkpoint FILE --images|--leak PATH --others DIR"
    common: ClassVar[tuple[str, ...]] = (
        "others", "candidates", "layer", "false_positives", "model", "checkpoint", "images", "num_images", "leak",
        "batch_size", "mask_ratio", "share", "share_options", "defense", "defense_options", "output", "overwrite",
        "device", "seed",
    )  # fmt: skip
    parts: ClassVar[dict] = {name: part for name, part in AttackConfig.parts.items() if name != "attack"}
    idle: ClassVar[tuple[str, ...]] = (
        "attack", "attack_options", "victims_at_once", "metric_only", "audit", "minutes", "resume", "lpips",
        "lpips_trunk", "success_psnr", "success_tokens", "watch_every", "window", "ngram", "data",
    )  # fmt: skip
    others: str
    """Folder of pictures that took no part: they set the distance below which a picture counts as a member."""
    candidates: str | None = None
    """Folder of pictures to ask about; default, of simulated clients, their own. Needed with --leak."""
    layer: str | None = None
    """Linear layer, by name; default the classifier, or the first matrix of LoRA or of an adapter."""
    false_positives: float = 0.01
    """Share of `others` that may count as members; as many pictures as its inverse are needed."""

    def __post_init__(self):
        check(self.data.kind == "image", "data.kind", "image", self.data.kind)
        refuse_changed(self, "left out: it is of attack.py", self.idle)
        super().__post_init__()
        check(0 < self.false_positives < 1, "false_positives", "between 0 and 1", self.false_positives)
        check(not self.leak or bool(self.candidates), "candidates", "given with --leak", self.candidates)
        check(not (self.leak and self.images), "images", "left out with --leak: give --candidates", self.images)

    def inputs(self) -> tuple[str | None, ...]:
        """Return the files and folders the run reads."""
        return *super().inputs(), self.others, self.candidates

    def outputs(self) -> tuple[str, ...]:
        """Return what the run writes beside results.json: nothing."""
        return ()

    def asked(self) -> dict:
        """Return what is asked: keyword options of campaigns.membership.ask_membership."""
        return {key: getattr(self, key) for key in ("others", "candidates", "layer", "false_positives")}
