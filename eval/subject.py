"""The model under evaluation, opened from what the command line says of it, and which of its outputs mean what."""

from collections.abc import Sequence
from contextlib import nullcontext

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from torch.utils.data import DataLoader

from data.text import Encoder
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.checkpoints import load_model
from models.timm_models import open_timm
from utils.distributed import Processes
from utils.errors import UserError


def open_model(
    peers: Processes,
    *,
    data: dict,
    kind: str = "image",
    checkpoint: str | None = None,
    timm: str | None = None,
    pretrained: bool = False,
    patch_size: int | None = None,
    seed: int = 0,
    ema: bool = False,
    num_heads: int | None = None,
) -> tuple[nn.Module, dict]:
    """The model on its device, and the data options with what it expects of its inputs filled in where they are None.

    checkpoint: a file that `load_model` reads, with ema and num_heads. timm: a name `open_timm` knows, with checkpoint,
    pretrained, patch_size, and seed for random weights; the data options then get timm's `recipe`. kind: 'image' or
    'text', whose data options get the model's `encoder`.
    """
    if kind == "text":
        model, encoder = open_text_model(checkpoint, ema=ema)
        return model.to(peers.device), data | {"encoder": encoder}
    if timm:
        options = {"checkpoint": checkpoint, "pretrained": pretrained, "patch_size": patch_size, "seed": seed}
        with peers.main_first() if pretrained else nullcontext():
            model = open_timm(timm, image_size=data["image_size"], **options)
        data = data | {"recipe": model.recipe}
    else:
        model = load_model(checkpoint, ema=ema, image_size=data["image_size"], num_heads=num_heads)
        if hasattr(model, "vocab_size"):
            raise UserError(f"checkpoint '{checkpoint}' is a model of sentences: pass --data.kind text")
    known = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | (model.normalize or {})
    data = data | {"image_size": model.arguments.get("image_size", 224)}
    return model.to(peers.device), data | {key: data[key] or known[key] for key in ("mean", "std")}


def open_text_model(checkpoint: str, **options) -> tuple[nn.Module, Encoder]:
    """A text model of train.py and its tokenizer, which the checkpoint holds. options: as for `load_model`."""
    model = load_model(checkpoint, **options)
    if not hasattr(model, "vocab_size"):
        raise UserError(f"checkpoint '{checkpoint}' is a model of images: leave out --data.kind text")
    if model.tokenizer is None:
        raise UserError(f"checkpoint '{checkpoint}' holds no tokenizer: only those of train.py do")
    return model, Encoder(model.tokenizer, model.max_length)


def outputs_of(model: nn.Module, loader: DataLoader) -> list[int]:
    """For each class of the loader's data set, the model output that stands for it."""
    return class_outputs(model.classes, model.arguments["num_classes"], loader.dataset.base.classes)


def class_outputs(trained: Sequence[str] | None, outputs: int, names: Sequence[str]) -> list[int]:
    """For each class of the data, the model output that stands for it.

    trained: class names in the order of the outputs, or None when the checkpoint did not record them; then a model of
    as many outputs as ImageNet-1k, -12k, -21k or -22k has classes, and class folders named like its synsets (n01440764)
    are matched by name, others by order. Raises UserError when the data's classes cannot be those of the model.
    """
    subset = infer_imagenet_subset({"num_classes": outputs})
    synsets = ImageNetInfo(subset).label_names() if trained is None and subset else []
    if set(names) <= set(synsets):
        trained = synsets
    if trained is None:
        if len(names) != outputs:
            raise UserError(f"{len(names)} classes of data do not fit a checkpoint of {outputs} outputs: use its data")
        return list(range(outputs))
    output = {name: position for position, name in enumerate(trained)}
    new = [name for name in names if name not in output]
    if new:
        raise UserError(
            f"{len(new)} of the data's {len(names)} classes are not among the checkpoint's {len(trained)}: "
            f"'{new[0]}' is new to it; use the data set it was trained on"
        )
    return [output[name] for name in names]
