"""The model whose gradients are shared: built or loaded, what it is called in messages, and the labels it is given."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from attacks.threat_model.local_step import causal, classes_of, multi_label
from models import build_model
from models.checkpoints import load_model
from models.external import is_external, open_external
from utils.errors import UserError, foreign

ADVICE = "a client cannot train it like this either: check --batch_size, --train_mode, --image_size, and the network"


def build_victim(
    checkpoint: str | None, name: str | None, *, seed: int, image_size: int | None, **options
) -> nn.Module:
    """Return the model of images whose gradients are shared: from a checkpoint, or named and randomly initialised, or
    one of models/external.py with or without a checkpoint. options: its own. Raises UserError for a model of
    sentences."""
    if is_external(name):
        model = open_external(name, checkpoint=checkpoint, image_size=image_size, seed=seed, **options)
    elif checkpoint:
        model = load_model(checkpoint, image_size=image_size, **options)
    else:
        return build_model(name, seed=seed, image_size=image_size, **options).eval()
    if hasattr(model, "vocab_size"):
        what = f"checkpoint '{checkpoint}'" if checkpoint else f"model '{name}'"
        raise UserError(f"{what} is a model of sentences: attack it by attack.py, with --data.kind text")
    return model


def title(model: nn.Module) -> str:
    """Return what to call a model in a message."""
    name = getattr(model, "spec", None) or getattr(model, "arguments", {}).get("name")
    return f"model '{name}'" if name else "the model"


def blame(model: nn.Module, doing: str, advice: str) -> AbstractContextManager:
    """Turn what a network from outside raises inside the block into one line; what ours raise is a bug of ours."""
    outside = getattr(model, "spec", None) is not None
    return foreign(f"{title(model)} fails {doing}", advice) if outside else nullcontext()


def check_classifier(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return the number of classes. Raises UserError for a model that is no classifier, or whose cross-entropy would
    be constant."""
    if getattr(model, "num_classes", None) == 0:
        raise UserError(f"{title(model)} has no classifier (num_classes 0): its outputs are features, not logits")
    classes = classes_of(model, image_shape)
    if classes < 2 and not multi_label(model):
        raise UserError(
            f"{title(model)} has {classes} output, of which the cross-entropy is constant: simulated clients train "
            f"classifiers of two classes or more; for a binary classifier attack a leak of its own step, --leak FILE "
            f'written by leak_file.save(..., loss="bce") (docs/leak_files.md)'
        )
    return classes


@torch.no_grad()
def labels_of(
    model: nn.Module, folders: Sequence[str], images: Tensor, classes: Mapping[str, int] | Sequence[str]
) -> Tensor:
    """Return (B,) labels: the output of an image's folder, or the model's prediction where that says nothing (a folder
    without an output, an output the model has not). classes: outputs by folder, or names in the order of the outputs,
    of which a single one says nothing. Of a model of attributes (B, attributes) of 0 and 1: `folders` are then the
    images themselves, and classes their attributes by image. Language models have none: 0."""
    if causal(model):  # it predicts its own input
        return torch.zeros(len(images), dtype=torch.int64)
    if not isinstance(classes, Mapping):
        classes = {name: place for place, name in enumerate(classes)} if len(classes) > 1 else {}
    with blame(model, f"on {len(images)} images", ADVICE):
        logits = model(images.clone())  # a network may change its input in place
    if multi_label(model):
        guessed = (logits > 0).long().tolist()
        rows = [classes.get(name, own) for name, own in zip(folders, guessed, strict=True)]
        if odd := next((row for row in rows if len(row) != logits.shape[1]), None):
            raise UserError(f"the model tells {logits.shape[1]} attributes, and an image is given {len(odd)}")
        return torch.tensor(rows)
    known = {name: label for name, label in classes.items() if label < logits.shape[1]}
    predicted = logits.argmax(dim=1).tolist()
    return torch.tensor([known.get(name, label) for name, label in zip(folders, predicted, strict=True)])
