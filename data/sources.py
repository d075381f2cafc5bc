"""What a training run reads: batches of one kind of data, and what its model and its checkpoints must know of them."""

from typing import NamedTuple

from torch.utils.data import DataLoader

from data.loaders import open_eval, open_train
from data.text import Encoder, fit_tokenizer, open_text_eval, open_text_train
from utils.distributed import Processes


class Source(NamedTuple):
    """Batches of the two splits; model: sizes `build_model` needs; about: what a checkpoint says of its inputs."""

    train: DataLoader
    val: DataLoader
    model: dict
    about: dict


def open_images(peers: Processes, *, data: dict, augment: dict, order: dict, normalize: dict) -> Source:
    """data: the options of `open_eval` but mean and std, which are `normalize`; order: seed, repeats, accumulation."""
    val = open_eval(peers, **data | normalize)
    train = open_train(peers, augment=augment, **order, **data | normalize)
    size = {"image_size": data["image_size"]} | ({"in_chans": 1} if len(normalize["mean"]) == 1 else {})
    loss = "bce" if getattr(train.dataset.base, "multi_label", False) else "cross_entropy"
    return Source(train, val, size, {"normalize": normalize, "loss": loss})


def open_texts(peers: Processes, *, data: dict, encoding: dict, order: dict, log) -> Source:
    """data: the options of `open_text_eval` less its encoder; encoding: max_length, vocab_size and tokenizer
    of `fit_tokenizer`; order: seed and accumulation."""
    columns = {key: value for key, value in data.items() if key.endswith("_column")}
    tokenizer = fit_tokenizer(peers, data["path"], on_corrupt=data["on_corrupt"], log=log, **encoding, **columns)
    encoder = Encoder(tokenizer, encoding["max_length"])
    val = open_text_eval(peers, encoder=encoder, **data)
    train = open_text_train(peers, encoder=encoder, **order, **data)
    size = {"vocab_size": encoder.tokenizer.get_vocab_size(), "max_length": encoding["max_length"]}
    return Source(train, val, size, {"tokenizer": tokenizer})
