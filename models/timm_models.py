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

from models.checkpoints import FORMAT, plain_weights, read_checkpoint
from utils.errors import UserError, did_you_mean

PATCH = 16  # pixels: cells of the puzzle for networks without patches of their own, as in the official code
HEADS = ("head", "head.fc", "fc", "classifier")  # where classifiers are, should timm's configuration not say


class TimmClassifier(nn.Module):
    """`network` of timm as a model here. It hides no positions; what else it has (blocks, pos_embed) is found on it.

    recipe: interpolation, crop_pct and crop_mode of timm's evaluation transform.
    """

    hides_positions = False

    def __init__(self, network: nn.Module, name: str, image_size: int | None = None, patch_size: int | None = None):
        super().__init__()
        self.network = network
        config = resolve_model_data_config(network)
        channels, height, width = config["input_size"]
        if channels != 3 or height != width:
            raise UserError(f"timm model '{name}' wants {channels} x {height} x {width} inputs: only RGB squares work")
        own = next((part.patch_size[0] for part in network.modules() if isinstance(part, PatchEmbed)), PATCH)
        side, self.patch_size = image_size or height, patch_size or own
        self.grid = (side // self.patch_size, side // self.patch_size)
        self.normalize = {key: tuple(config[key]) for key in ("mean", "std")}
        self.recipe = {key: config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
        self.classes = None
        self.arguments = {"name": name, "num_classes": network.num_classes, "image_size": side}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward_features(self, images: Tensor, mask: None = None) -> Tensor:
        """Images -> what the network's own `forward_features` gives."""
        if mask is not None:
            raise ValueError("a timm model has no unknown position embedding: pass no mask")
        return self.network.forward_features(images)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Features of the images -> logits (B, classes), or with pre_logits what the classifier reads, (B, D)."""
        return self.network.forward_head(tokens, pre_logits=pre_logits).flatten(1)

    def features(self, images: Tensor, mask: None = None) -> Tensor:
        """Images -> features (B, D) the classifier reads."""
        return self.forward_head(self.forward_features(images, mask), pre_logits=True)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        return self.forward_head(self.forward_features(images, mask))

    def patch_pos_embed(self) -> Tensor:
        """The PE rows of the patches, (N, D). Raises UserError unless there is one for every cell of the grid."""
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
    patch_size: int | None = None,
    seed: int = 0,
    **options,
) -> TimmClassifier:
    """The timm model `name` in evaluation mode, on the CPU.

    Its weights come from the file `checkpoint` (timm's layout or one that timm converts), with `pretrained` from what
    timm downloads, or they are those `timm.create_model` draws after `torch.manual_seed(seed)`. image_size: side of the
    inputs where it differs from the model's own. patch_size: cells of the puzzle in pixels, by default the model's
    patches, or 16 where it has none. options: more arguments of timm.create_model. Raises UserError.
    """
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"unknown timm model '{name}': {did_you_mean(name, timm.list_models())}")
    if "." in name and name not in (known := timm.list_pretrained()):
        raise UserError(f"timm model '{name}': no weights have that tag: {did_you_mean(name, known)}")
    config = timm.get_pretrained_cfg(name)
    if image_size and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if checkpoint:
        weights = _weights(checkpoint)
        classes = _classes(weights, config)
        overlay = {"state_dict": weights, "label_offset": 0} | ({"num_classes": classes} if classes else {})
        options |= {"pretrained_cfg_overlay": overlay} | ({"num_classes": classes} if classes else {})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = timm.create_model(name, pretrained=pretrained or bool(checkpoint), **options)
        except Exception as error:  # what a download can raise depends on the client
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if checkpoint:
                raise UserError(f"checkpoint '{checkpoint}' does not fit timm model '{name}' ({reason})") from error
            if pretrained:
                raise UserError(
                    f"cannot get the pretrained weights of timm model '{name}' ({reason}): "
                    "where there is no network, copy its file here and pass --checkpoint FILE"
                ) from error
            raise UserError(f"cannot build timm model '{name}' ({reason})") from error
    if not network.num_classes:
        raise UserError(f"timm model '{name}' has no classifier: choose weights that have one")
    return TimmClassifier(network, name, image_size, patch_size).eval()


def _weights(path: str | Path) -> dict[str, Tensor]:
    content = read_checkpoint(path)
    if content.get("format") == FORMAT:
        raise UserError(f"checkpoint '{path}' was written by train.py and says which model it is: leave out --timm")
    return plain_weights(content, path)


def _classes(weights: dict[str, Tensor], config) -> int | None:
    """Outputs of the classifier in a state dict, None where it is not found under a usual name."""
    known = getattr(config, "classifier", None) or ()
    for head in (*((known,) if isinstance(known, str) else known), *HEADS):
        if f"{head}.weight" in weights:
            return len(weights[f"{head}.weight"])
    return None
