"""What a training run reads: batches of one kind of data, and what its model and its checkpoints must know of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch.utils.data import DataLoader

from data.loaders import open_eval, open_train
from data.options import AugmentOptions, DataOptions
from data.text import Encoder, fit_tokenizer, open_text_eval, open_text_train
from data.transforms import training_scale
from utils.distributed import Processes


class Source(NamedTuple):
    """Batches of the two splits.

    model: sizes `build_model` needs; loss: what the labels ask for, cross_entropy or bce; about: what a checkpoint says
    of its inputs; normalize: mean and std of images.
    """

    train: DataLoader
    val: DataLoader
    model: dict
    loss: str
    about: dict
    normalize: dict


def open_source(
    peers: Processes,
    data: DataOptions,
    augment: AugmentOptions,
    *,
    seed: int,
    accumulation: int,
    log: Callable[[str], None] | None,
) -> Source:
    """Open images or sentences, as `data.kind` says, for a training of `accumulation` steps an update."""
    normalize = training_scale(data.mean, data.std, data.dataset, data.grey)
    order = {"seed": seed, "accumulation": accumulation}
    if data.kind == "text":
        return _open_texts(peers, data, order, normalize, log)
    return _open_images(peers, data, augment, order, normalize)


def _open_images(peers: Processes, data: DataOptions, augment: AugmentOptions, order: dict, normalize: dict) -> Source:
    data = replace(data, image_size=data.image_size or 224, **normalize)
    val, train = open_eval(peers, data), open_train(peers, data, augment, **order)
    model = {"image_size": data.image_size} | ({"in_chans": 1} if data.grey else {})
    loss = "bce" if getattr(train.dataset.base, "multi_label", False) else "cross_entropy"
    return Source(train, val, model, loss, {"normalize": normalize, "loss": loss}, normalize)


def _open_texts(peers: Processes, data: DataOptions, order: dict, normalize: dict, log) -> Source:
    text, how = data.text, {"on_corrupt": data.on_corrupt, "log": log}
    tokenizer = fit_tokenizer(peers, data.path, **how, **text.encoding(), **text.columns())
    encoder = Encoder(tokenizer, text.max_length)
    val, train = open_text_eval(peers, data, encoder), open_text_train(peers, data, encoder, **order)
    model = {"vocab_size": encoder.tokenizer.get_vocab_size(), "max_length": text.max_length}
    about = {"tokenizer": tokenizer, "loss": "cross_entropy"}
    return Source(train, val, model, "cross_entropy", about, normalize)
