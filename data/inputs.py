"""How the images a model reads are normalised: as options or the model's files say, or by a guess that is noted."""

from collections.abc import Sequence

from torch import nn

from data.transforms import GREY_MEAN, GREY_STD, IMAGENET_MEAN, IMAGENET_STD
from utils.channels import channels_of
from utils.errors import UserError
from utils.notes import Notes

OPTIONS, CHECKPOINT, GUESS = "the options", "the checkpoint", "ImageNet's, assumed"


def repeat_assumptions(model: nn.Module, notes: Notes) -> None:
    """Note what was assumed when the model was opened."""
    for topic, sentence in (getattr(model, "assumed", None) or {}).items():
        notes.assume(topic, sentence)


def input_scale(
    model: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    notes: Notes,
    source: str = OPTIONS,
) -> dict[str, Sequence[float]]:
    """Return the mean and std of the model's inputs: as given, else the model's own, else ImageNet's, which is a guess.

    One number for all channels is repeated; a model of grey images has one. Raises UserError for other numbers of them.

    The notes say which, and what else was assumed when the model was opened. source: who gave mean and std.
    """
    repeat_assumptions(model, notes)
    given = {key: tuple(value) for key, value in (("mean", mean), ("std", std)) if value}
    own = {key: tuple(value) for key, value in (model.normalize or {}).items()}
    channels = channels_of(model)
    usual = (GREY_MEAN, GREY_STD) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
    scale = dict(zip(("mean", "std"), usual, strict=True)) | own | given
    scale = {key: value * channels if len(value) == 1 else value for key, value in scale.items()}
    for key, value in scale.items():
        if len(value) != channels:
            raise UserError(f"{key} has {len(value)} numbers and the model's images {channels} channels: give as many")
    others = (getattr(model, "normalize_from", None) or CHECKPOINT) if own else GUESS
    if len(given) == 2:
        others = source
    elif given:
        others = f"{source}, the rest from {others}"
    if len(given) < 2 and not own:
        missing = " and ".join(key for key in scale if key not in given)
        notes.assume("normalize", f"{missing} of ImageNet: neither options nor files say how images were normalised")
    text = ", ".join(f"{key} {' '.join(f'{value:g}' for value in scale[key])}" for key in ("mean", "std"))
    inputs = {"image_size": model.arguments.get("image_size"), "mean": scale["mean"], "std": scale["std"]}
    notes.state("inputs", inputs | {"normalize_from": others}, f"inputs: {text} (from {others})")
    return scale
