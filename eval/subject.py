"""The model under evaluation, opened from what the command line says of it, and which of its outputs mean what."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

from torch import nn
from torch.utils.data import DataLoader

from data.decode import in_words
from data.inputs import input_scale, repeat_assumptions
from data.loaders import open_eval
from data.options import DataOptions
from data.outputs import class_outputs
from data.text import Encoder, open_text_eval
from eval.options import SubjectOptions
from models.checkpoints import load_model
from models.huggingface_models import is_huggingface, open_huggingface
from models.timm_models import TimmClassifier, open_timm
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes

PRIVACY = ("epsilon", "epsilon_shuffled", "delta", "privacy")  # what an account says: numbers, and in words


@dataclass(frozen=True)
class Inputs:
    """What a model under evaluation is shown: the data, with the image size and the scale that it expects.

    recipe: of timm's transform, for models of timm. encoder: makes tokens of sentences, for text models.
    """

    data: DataOptions
    recipe: dict | None = None
    encoder: Encoder | None = None

    def open(self, peers: Processes, limit: int | None = None) -> DataLoader:
        """Open this process's share of the validation split, or of `limit` of it, spread evenly, in batches."""
        if self.encoder is not None:
            return open_text_eval(peers, self.data, self.encoder, limit=limit)
        return open_eval(peers, self.data, recipe=self.recipe, limit=limit)


def open_model(
    peers: Processes, model: SubjectOptions, data: DataOptions, *, seed: int = 0, notes: Notes | None = None
) -> tuple[nn.Module, Inputs]:
    """Return the model on its device, and its inputs: what `data` leaves open is as the model expects it.

    seed: of random weights, which a model of timm has without checkpoint. notes: get what the model's files left open.
    """
    notes, given = notes or Notes(), {"ema": model.ema, "num_heads": model.num_heads}
    if data.kind == "text":
        network, encoder = open_text_model(model.checkpoint, **given)
        repeat_assumptions(network, notes)
        state_privacy(network, notes)
        return network.to(peers.device), Inputs(data, encoder=encoder)
    recipe = None
    if model.timm:
        options = {key: getattr(model, key) for key in ("checkpoint", "pretrained", "ema")}
        with peers.main_first() if model.pretrained else nullcontext():
            network = open_timm(model.timm, image_size=data.image_size, cell=model.patch_size, seed=seed, **options)
        recipe = network.recipe
    elif is_huggingface(model.checkpoint):
        network = _from_huggingface(model.checkpoint, ema=model.ema, image_size=data.image_size)
    else:
        network = load_model(model.checkpoint, image_size=data.image_size, **given)
        if hasattr(network, "vocab_size"):
            raise UserError(f"checkpoint '{model.checkpoint}' is a model of sentences: pass --data.kind text")
    state_privacy(network, notes)
    scale = input_scale(network, data.mean, data.std, notes)
    data = replace(data, image_size=network.arguments.get("image_size", 224), **scale)
    return network.to(peers.device), Inputs(data, recipe)


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
