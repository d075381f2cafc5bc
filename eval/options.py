"""Options of the model under evaluation."""

from dataclasses import dataclass

from utils.checks import check
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SubjectOptions:
    """The model under evaluation."""

    checkpoint: str | None = None
    """Checkpoint of train.py, the official MJP code, timm, DeiT, HuggingFace (a folder, too, or
    hf:NAME of its hub) or torchvision."""
    timm: str | None = None
    """Any classifier of timm by name, with the inputs timm gives it; its weights are those of --checkpoint, of
    --pretrained, or random."""
    pretrained: bool = False
    """Let timm download the weights it has for its model."""
    patch_size: int | None = None
    """Patches in pixels in which images are shuffled for a timm model; default the model's, or 16 if it has none."""
    ema: bool = False
    """Use the averaged weights in the checkpoint, of train.py or others (model_ema, state_dict_ema, teacher, ...)."""
    num_heads: int | None = None
    """Attention heads of a ViT or BERT checkpoint of others that does not say how many it has."""

    def __post_init__(self):
        getattr(super(), "__post_init__", lambda: None)()
        if self.checkpoint is None and self.timm is None:
            raise UserError("give the model as --checkpoint FILE, or as --timm NAME with or without a checkpoint")
        for key in ("pretrained", "patch_size"):
            check(self.timm or not getattr(self, key), key, "used with --timm", getattr(self, key))
        check(not (self.timm and self.num_heads), "num_heads", "left out with --timm", self.num_heads)
        check(not self.ema or self.checkpoint, "ema", "left out with --timm unless there is a --checkpoint", self.ema)
        check(not (self.checkpoint and self.pretrained), "pretrained", "left out with --checkpoint", self.pretrained)
        check(self.patch_size is None or self.patch_size >= 1, "patch_size", "at least 1", self.patch_size)
