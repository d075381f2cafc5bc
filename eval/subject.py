"""The model under evaluation, opened from what the command line says of it, and which of its outputs mean what."""

from contextlib import nullcontext

from torch import nn
from torch.utils.data import DataLoader

from data.decode import in_words
from data.inputs import input_scale, repeat_assumptions
from data.outputs import class_outputs
from data.text import Encoder
from models.checkpoints import load_model
from models.huggingface_models import is_huggingface, open_huggingface
from models.timm_models import TimmClassifier, open_timm
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes

PRIVACY = ("epsilon", "epsilon_shuffled", "delta", "privacy")  # what an account says: numbers, and in words


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
    notes: Notes | None = None,
) -> tuple[nn.Module, dict]:
    """Return the model on its device, and the data options with what it expects of its inputs where they are None.

    checkpoint: a file that `load_model` reads, with ema and num_heads. timm: a name `open_timm` knows, with checkpoint,
    pretrained, patch_size, and seed for random weights; the data options then get timm's `recipe`. kind: 'image' or
    'text', whose data options get the model's `encoder`. notes: get what the model's files left open.
    """
    notes = notes or Notes()
    if kind == "text":
        model, encoder = open_text_model(checkpoint, ema=ema, num_heads=num_heads)
        repeat_assumptions(model, notes)
        state_privacy(model, notes)
        return model.to(peers.device), data | {"encoder": encoder}
    if timm:
        options = {
            "checkpoint": checkpoint,
            "pretrained": pretrained,
            "patch_size": patch_size,
            "seed": seed,
            "ema": ema,
        }
        with peers.main_first() if pretrained else nullcontext():
            model = open_timm(timm, image_size=data["image_size"], **options)
        data = data | {"recipe": model.recipe}
    elif is_huggingface(checkpoint):
        model = _from_huggingface(checkpoint, ema=ema, image_size=data["image_size"])
    else:
        model = load_model(checkpoint, ema=ema, image_size=data["image_size"], num_heads=num_heads)
        if hasattr(model, "vocab_size"):
            raise UserError(f"checkpoint '{checkpoint}' is a model of sentences: pass --data.kind text")
    state_privacy(model, notes)
    data = data | {"image_size": model.arguments.get("image_size", 224)}
    return model.to(peers.device), data | input_scale(model, data["mean"], data["std"], notes)


def state_privacy(model: nn.Module, notes: Notes) -> None:
    """State the guarantee of a checkpoint that was trained with one: epsilon, None once an update had no defence."""
    account = getattr(model, "privacy", None) or {}
    for key in PRIVACY if "epsilon" in account else ():
        if key in account:
            notes.state(key, account[key], f"{key} of the checkpoint: {account[key]}")


def _from_huggingface(spec: str, **options) -> nn.Module:
    """Return a model of HuggingFace behind the interface of models/__init__.py; options of `open_huggingface`."""
    network = open_huggingface(spec, **options)
    if getattr(network, "arguments", None) is not None:
        return network
    model = TimmClassifier(network, spec, network.patch_embed.img_size[0]).eval()
    for key in ("normalize", "normalize_from", "classes", "assumed"):
        setattr(model, key, getattr(network, key))
    return model


def open_text_model(checkpoint: str, **options) -> tuple[nn.Module, Encoder]:
    """Return a text model and its tokenizer, of a checkpoint of train.py, of scripts/prepare_weights.py, or hf:FOLDER.
    options: as for `load_model`."""
    open_it = open_huggingface if is_huggingface(checkpoint) else load_model
    model = open_it(checkpoint, **options)
    if not hasattr(model, "vocab_size"):
        raise UserError(f"checkpoint '{checkpoint}' is a model of images: leave out --data.kind text")
    if model.tokenizer is None:
        raise UserError(
            f"checkpoint '{checkpoint}' holds no tokenizer: those of train.py do, and folders of HuggingFace with a "
            "tokenizer.json"
        )
    return model, Encoder(model.tokenizer, model.max_length)


def outputs_of(model: nn.Module, loader: DataLoader, notes: Notes | None = None) -> list[int] | None:
    """Return for each class of the loader's data set the model output that stands for it (data/outputs.py), and note
    how many hidden files and folders the data set passed over. None for attributes, which must be the model's own."""
    base, notes = loader.dataset.base, notes or Notes()
    multi_label = getattr(base, "multi_label", False)
    if multi_label != (getattr(model, "loss", "cross_entropy") == "bce"):
        kind = "attributes" if multi_label else "classes"
        raise UserError(f"the data has {kind}, the model was not trained on them: see --data.dataset")
    if multi_label:
        if model.classes is not None and list(model.classes) != list(base.classes):
            raise UserError(f"the model's attributes ({', '.join(model.classes[:3])}, ...) are not those of the data")
        return None
    if litter := getattr(base, "litter", None):
        notes.state("passed_over", len(litter), in_words(litter, base.root))
    return class_outputs(model.classes, model.arguments["num_classes"], base.classes, notes)
