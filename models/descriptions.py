"""What files of others say of their model beside its weights: heads, norms, normalisation, names of the classes.

Read are the configurations that lie in a checkpoint (the arguments of timm's and DeiT's scripts, hyper-parameters of
Lightning, trees of yacs) and, of a folder as HuggingFace and timm save one, config.json and preprocessor_config.json.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch

import models.timm_names  # noqa: F401, whose names timm is asked for
from models.file_kinds import SAVED
from utils.errors import UserError
from utils.notes import Notes

HEADS = {"num_heads", "num_attention_heads", "n_heads", "n_head", "heads"}
NAMES = ("arch", "architecture", "model", "model_name", "backbone")  # keys under which a timm name may stand
PROCESSOR = "preprocessor_config.json"
CLASSES = ("classes", "class_names", "label_names")
# Attention heads of published models by width and depth, where timm and HuggingFace know no two numbers of them.
VIT_HEADS = {
    (192, 12): 3, (384, 12): 6, (512, 12): 8, (768, 12): 12, (1024, 24): 16, (1152, 27): 16, (1280, 32): 16,
    (1408, 40): 16, (1664, 48): 16,
}  # fmt: skip
BERT_HEADS = {  # Google's of any depth have heads of 64; MiniLM's and TinyBERT's have 12 heads
    (768, 12): 12, (1024, 24): 16, (768, 6): 12, (384, 12): 12, (384, 6): 12, (384, 3): 12, (312, 4): 12,
    (128, 2): 2, (256, 4): 4, (512, 4): 8, (512, 8): 8,
}  # fmt: skip

GPT2_HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 36): 20, (1600, 48): 25, (768, 6): 12}  # the last: DistilGPT-2


@dataclass(frozen=True)
class Said:
    """What is said, None and {} where it is not. normalize_from: where the normalisation stands, for people; loss: what
    the model was trained by, as `training_loss` knows it."""

    heads: frozenset[int] = frozenset()
    timm_name: str | None = None
    normalize: dict | None = None
    normalize_from: str | None = None
    classes: list[str] | None = None
    config: dict = field(default_factory=dict)
    loss: str = "cross_entropy"


def read_description(content: Mapping, path: str | Path) -> Said:
    """Return what a checkpoint's content, and the files beside it that belong to it, say of the model."""
    config, processor = (_beside(Path(path), name) for name in ("config.json", PROCESSOR))
    trees = [config, *_trees(content)]
    normalize, source = _normalize(trees, processor, path)
    name = _timm_name(trees)
    if normalize is None and name is not None and ("arch" in content or "architecture" in config):
        found = timm.get_pretrained_cfg(name)
        if found is not None and _scale(found.mean, found.std):
            normalize, source = _scale(found.mean, found.std), f"timm's configuration of {name}, which the file names"
    heads = {value for tree in trees for key, value in _walk(tree) if key.lower() in HEADS and _whole(value)}
    attributes = config.get("problem_type") == "multi_label_classification"
    loss = "bce" if attributes else "cross_entropy"
    return Said(frozenset(heads), name, normalize, source, _classes(trees), config, loss)


def assume_classifier(said: Said, notes: Notes) -> None:
    """Note that a network trained for regression is taken for a classifier, if the file says that it is one."""
    if said.config.get("problem_type") == "regression":
        notes.assume("loss", "cross-entropy, as of a classifier: config.json says problem_type regression")


def find_heads(said: Said, dim: int, depth: int, kind: str, path: str | Path) -> tuple[int, str | None]:
    """Return (attention heads, a sentence where they are assumed). kind: 'vit', 'bert' or 'gpt2', for models that
    nobody speaks of.

    Raises UserError where nothing says how many there are: any number that divides the width fits the weights.
    """
    fitting = [number for number in said.heads if number > 0 and dim % number == 0]
    if len(fitting) == 1:
        return fitting[0], None
    if said.timm_name and (number := _timm_heads(said.timm_name, dim, depth)):
        return number, None
    known = {"vit": VIT_HEADS, "bert": BERT_HEADS, "gpt2": GPT2_HEADS}[kind].get((dim, depth))
    if known:
        text = f"{known} attention heads, as published models of width {dim} and depth {depth}: the file does not say"
        return known, text
    raise UserError(
        f"checkpoint '{path}' does not say how many attention heads its model has (width {dim}, depth {depth}): "
        "pass --num_heads N, or --model_options.num_heads N to attack.py"
    )


def read_tokenizer_beside(path: str | Path) -> str | None:
    """Return the tokenizer.json in a folder of HuggingFace as text; None where there is none."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent if Path(path).name in SAVED else None
    file = folder and folder / "tokenizer.json"
    return file.read_text("utf-8") if file and file.is_file() else None


def _beside(path: Path, name: str) -> dict:
    """Return the JSON file `name` in a folder that holds a model, or {}."""
    folder = path if path.is_dir() else path.parent if path.name in SAVED else None
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{folder / name}' is not JSON: get it again") from error
    return content if isinstance(content, dict) else {}


def _trees(content: Mapping) -> list[dict]:
    """Return the content itself and the configurations in it, as dicts; weights are not looked into."""
    trees = [dict(content)]
    for value in content.values():
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping) and not any(isinstance(item, torch.Tensor) for item in value.values()):
            trees.append(dict(value))
    return trees


def _walk(tree: Mapping, depth: int = 4) -> Iterator[tuple[str, object]]:
    for key, value in list(tree.items())[:1000]:
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(key, str):
            yield key, value
        if isinstance(value, Mapping) and depth and not any(isinstance(v, torch.Tensor) for v in value.values()):
            yield from _walk(value, depth - 1)


def _timm_name(trees: Sequence[Mapping]) -> str | None:
    for tree in trees:
        for key in NAMES:
            value = tree.get(key)
            if isinstance(value, str) and timm.is_model(value.removeprefix("timm/").split(".")[0]):
                return value.removeprefix("timm/")
    return None


def _timm_heads(name: str, dim: int, depth: int) -> int | None:
    """Return the heads of timm's model `name`, if it has these sizes."""
    with torch.device("meta"):
        network = timm.create_model(name.split(".")[0], pretrained=False)
    blocks = getattr(network, "blocks", None)
    same = getattr(network, "embed_dim", None) == dim and blocks is not None and len(blocks) == depth
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None) if same else None


def _normalize(trees: Sequence[Mapping], processor: Mapping, path: str | Path) -> tuple[dict | None, str | None]:
    if scale := _processor_scale(processor, path):
        return scale, PROCESSOR
    for tree in trees:
        for name in ("pretrained_cfg", "data_config", "normalize"):
            inner = tree.get(name)
            inner = vars(inner) if isinstance(inner, argparse.Namespace) else inner
            if isinstance(inner, Mapping) and (scale := _scale(inner.get("mean"), inner.get("std"))):
                return scale, f"'{name}' in the checkpoint's files"
        if scale := _scale(tree.get("mean"), tree.get("std")):
            return scale, "the arguments in the checkpoint"
    return None, None


def _processor_scale(processor: Mapping, path: str | Path) -> dict | None:
    """Return what a preprocessor_config.json does to pixels in [0, 1], None where it has no mean and std.

    It is written for pixels from 0 to 255, which it multiplies by rescale_factor first. Raises UserError where that is
    no normalisation, as a guess would take its place.
    """
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return None
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    try:
        times = round(255 * factor, 9)  # 1 for what was written as 0.00392156862745098
        mean, std = ([value] * 3 if isinstance(value, (int, float)) else value for value in (mean, std))
        scale = _scale([value / times for value in mean], [value / times for value in std])
    except (TypeError, ZeroDivisionError):
        scale = None
    if scale is None:
        raise UserError(
            f"'{path}' has a {PROCESSOR} with image_mean {mean}, image_std {std} and rescale_factor {factor}, which do "
            "not normalise three colours in [0, 1]: correct it, or move it away and pass --mean and --std"
        )
    return scale


def _scale(mean: object, std: object) -> dict | None:
    """Return the mean and std as a normalisation, if they can be one of pixels in [0, 1]."""
    if not all(isinstance(values, (list, tuple)) and len(values) == 3 for values in (mean, std)):
        return None
    numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in (*mean, *std))
    if not numbers or not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        return None
    return {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}


def _classes(trees: Sequence[Mapping]) -> list[str] | None:
    for tree in trees:
        for key in CLASSES:
            if isinstance(names := tree.get(key), list) and names and all(isinstance(name, str) for name in names):
                return names
        for key, turned in (("id2label", False), ("idx_to_class", False), ("class_to_idx", True), ("label2id", True)):
            if isinstance(table := tree.get(key), Mapping) and (names := _by_place(table, turned)):
                return names
    return None


def _by_place(table: Mapping, turned: bool) -> list[str] | None:
    """Return the names in {place: name}, or turned {name: place}, in order; None for LABEL_0, which says nothing."""
    pairs = [(value, key) for key, value in table.items()] if turned else list(table.items())
    places = {int(place): name for place, name in pairs if str(place).isdecimal() and isinstance(name, str)}
    names = [places.get(place) for place in range(len(pairs))]
    if None in names or len(set(names)) < len(names) or all(name == f"LABEL_{k}" for k, name in enumerate(names)):
        return None
    return names or None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
