"""Any classifier of timm by its name, behind the interface of models/__init__.py, to be evaluated.

The network is timm's own, and so is what its inputs look like: `normalize` and `recipe` come from its data
configuration. Without a file and without `pretrained` its weights are random.
"""

from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed
from torch import Tensor, nn

import models.timm_names  # noqa: F401, whose names timm is asked for
from models.archives import check_numbers
from models.checkpoints import FORMAT, read_checkpoint, weights_of
from models.containers import flatten, misfit, plain_weights
from models.inference import NEW_HEAD
from models.layouts import VIT_MARKS
from utils.channels import channels_of
from utils.errors import UserError, did_you_mean
from utils.files import existing_file
from utils.notes import Notes

PATCH = 16  # pixels: cells of the puzzle for networks without patches of their own, as in the official code
HEADS = ("head", "head.fc", "fc", "classifier")  # where classifiers are, should timm's configuration not say


class TimmClassifier(nn.Module):
    """`network` of timm as a model here. It hides no positions; what else it has (blocks, pos_embed) is found on it.

    recipe: interpolation, crop_pct and crop_mode of timm's evaluation transform.
    """

    hides_positions = False

    def __init__(self, network: nn.Module, name: str, image_size: int | None = None, cell: int | None = None):
        super().__init__()
        self.network = network
        config = resolve_model_data_config(network)
        channels, height, width = config["input_size"]
        channels = channels_of(network)
        if height != width:
            raise UserError(f"timm model '{name}' wants {channels} x {height} x {width} inputs: only squares work")
        own = next((part.patch_size[0] for part in network.modules() if isinstance(part, PatchEmbed)), PATCH)
        side, self.patch_size = image_size or height, cell or own
        self.grid = (side // self.patch_size, side // self.patch_size)
        self.normalize = {key: tuple(config[key]) for key in ("mean", "std")}
        if channels == 1:
            self.normalize = {key: (sum(value) / len(value),) for key, value in self.normalize.items()}
        self.recipe = {key: config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
        self.classes = None
        self.arguments = {"name": name, "num_classes": network.num_classes, "image_size": side}
        self.arguments |= {"in_chans": 1} if channels == 1 else {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward_features(self, images: Tensor, mask: None = None) -> Tensor:
        """Map images to what the network's own `forward_features` gives."""
        if mask is not None:
            raise ValueError("a timm model has no unknown position embedding: pass no mask")
        return self.network.forward_features(images)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features of the images to logits (B, classes), or with pre_logits what the classifier reads, (B, D)."""
        return self.network.forward_head(tokens, pre_logits=pre_logits).flatten(1)

    def features(self, images: Tensor, mask: None = None) -> Tensor:
        """Map images to features (B, D) the classifier reads."""
        return self.forward_head(self.forward_features(images, mask), pre_logits=True)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        return self.forward_head(self.forward_features(images, mask))

    def patch_pos_embed(self) -> Tensor:
        """Return the PE rows of the patches, (N, D). Raises UserError unless there is one for every cell of the
        grid."""
        table, number = self.network.pos_embed, self.grid[0] * self.grid[1]
        prefix = getattr(self.network, "num_prefix_tokens", 0)
        if not isinstance(table, Tensor) or table.dim() != 3 or table.shape[1] - number not in (0, prefix):
            name = self.arguments["name"]
            raise UserError(
                f"timm model '{name}' has no table of one position embedding per {self.patch_size}-pixel patch"
            )
        return table[0, -number:]


def open_timm(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    image_size: int | None = None,
    cell: int | None = None,
    seed: int = 0,
    ema: bool = False,
    **options,
) -> TimmClassifier:
    """Return the timm model `name` in evaluation mode, on the CPU.

    Its weights come from the file `checkpoint` (timm's layout or one that timm converts), with `pretrained` from what
    timm downloads, or they are those `timm.create_model` draws after `torch.manual_seed(seed)`. image_size: side of the
    inputs where it differs from the model's own. cell: side of the puzzle's cells in pixels, by default that of the
    model's patches, or 16 where it has none. ema: the file's averaged weights. options: more arguments of
    timm.create_model; with a num_classes that is not the file's, the classifier is drawn anew.
    The model says in `assumed` what was chosen of the file. Raises UserError.
    """
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"unknown timm model '{name}': {did_you_mean(name, timm.list_models())}")
    if "." in name and name not in (known := timm.list_pretrained()):
        raise UserError(f"timm model '{name}': no weights have that tag: {did_you_mean(name, known)}")
    config = timm.get_pretrained_cfg(name)
    if image_size and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    notes, numpy = Notes(), bool(checkpoint) and Path(checkpoint).suffix == ".npz"
    if numpy:
        existing_file(checkpoint, "checkpoint")
    elif checkpoint:
        weights = _weights(checkpoint, name, ema, notes)
        if asked := options.get("num_classes"):
            weights |= _new_classifier(name, config, weights, asked, seed, options, notes)
        classes = _classes(weights, config)
        overlay = {"state_dict": weights, "label_offset": 0} | ({"num_classes": classes} if classes else {})
        options |= {"pretrained_cfg_overlay": overlay} | ({"num_classes": classes} if classes else {})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = timm.create_model(name, pretrained=pretrained or bool(checkpoint) and not numpy, **options)
            if numpy:
                network.load_pretrained(str(checkpoint))
        except Exception as error:  # what a download can raise depends on the client
            reason = misfit(error)
            if checkpoint:
                raise UserError(f"checkpoint '{checkpoint}' does not fit timm model '{name}' ({reason})") from error
            if pretrained:
                raise UserError(
                    f"cannot get the pretrained weights of timm model '{name}' ({reason}): "
                    "where there is no network, copy its file here and pass --checkpoint FILE"
                ) from error
            raise UserError(f"cannot build timm model '{name}' ({reason})") from error
    if not network.num_classes:
        raise UserError(f"timm model '{name}' has no classifier: choose weights that have one, or {NEW_HEAD}")
    if checkpoint:
        check_numbers(network.state_dict() if numpy else weights, network.state_dict(), checkpoint)
    model = TimmClassifier(network, name, image_size, cell).eval()
    own = resolve_model_data_config(network)["input_size"][-1] if config is None else config.input_size[-1]
    if image_size not in (None, own):
        notes.assume("image_size", f"the model was made for images of {own} pixels and is used at {image_size}")
    model.normalize_from, model.assumed = f"timm's configuration of {name}", notes.assumed
    return model


def _weights(path: str | Path, name: str, ema: bool, notes: Notes) -> dict[str, Tensor]:
    """Return a file's weights without what is wrapped around them; timm converts layouts it knows, and those of
    HuggingFace's and torchvision's ViTs are converted here."""
    content = read_checkpoint(path)
    if content.get("format") == FORMAT:
        raise UserError(
            f"checkpoint '{path}' was written by train.py and says which model it is: leave out --timm, or for "
            f"attack.py --model timm:{name}"
        )
    with torch.device("meta"):
        own = timm.create_model(name, pretrained=False).state_dict()
    foreign = {mark for mark in VIT_MARKS if mark not in own} if "patch_embed.proj.weight" in own else set()
    if any(name.endswith(tuple(foreign)) for name in flatten(content, path)):
        return weights_of(content, path, ema=ema, notes=notes)
    return plain_weights(content, path, own, all_names=True, ema=ema, notes=notes)


def _new_classifier(
    name: str, config, weights: dict[str, Tensor], number: int, seed: int, options: dict, notes: Notes
) -> dict[str, Tensor]:
    """Return a classifier of `number` outputs as `seed` draws it, by its names; {} where the file has one of this size.

    The notes say that it is new.
    """
    if _classes(weights, config) == number:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = timm.create_model(name, pretrained=False, **options)
        except Exception as error:
            raise UserError(f"cannot build timm model '{name}' ({misfit(error)})") from error
    known = network.pretrained_cfg.get("classifier") or ()
    heads = (known,) if isinstance(known, str) else tuple(known)
    new = {key: value for key, value in network.state_dict().items() if key.rpartition(".")[0] in heads}
    if new:
        notes.assume("new", f"a classifier of {number} outputs was drawn, as asked for: {', '.join(new)}")
    return new


def _classes(weights: dict[str, Tensor], config) -> int | None:
    """Return the outputs of the classifier in a state dict, None where it is not found under a usual name."""
    known = getattr(config, "classifier", None) or ()
    for head in (*((known,) if isinstance(known, str) else known), *HEADS):
        if f"{head}.weight" in weights:
            return len(weights[f"{head}.weight"])
    return None
