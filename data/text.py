"""Labelled sentences in CSV files, the tokenizer trained on them, and their batches.

`PATH/train.csv` and `PATH/val.csv` (or `test.csv`) have a header with a column of labels and one of texts, and perhaps
one of titles; or they are laid out as the Yelp and Amazon reviews are published: no header, a whole number as the
label, then the text, or the title and the text. A title is put in front of its text. Files are UTF-8.
"""

import csv
import os
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.classes import class_order
from data.loaders import EpochSampler, Part, TransformedDataset, batches, batches_of_share
from data.options import DataOptions
from utils.distributed import Processes
from utils.errors import UserError, did_you_mean
from utils.files import existing_folder

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked; sentences are short
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in this order: padding is 0
FILES = {"train": ("train.csv",), "val": ("val.csv", "test.csv")}
ALPHABET = 1000  # most letters a tokenizer learns, as BERT's
LOOKED_AT = 10_000  # training sentences whose length is measured


class Sentences(Dataset):
    """(text, label) by index; `classes` are the label names in order, `samples` where each sentence stands."""

    def __init__(self, path: Path, rows: list[tuple[int, str, str]], classes: list[str]):
        places = {name: label for label, name in enumerate(classes)}
        for line, name, _ in rows:
            if name not in places:
                raise UserError(f"'{path}' line {line}: label '{name}' does not occur in the training file: correct it")
        self.classes, self.texts = classes, [text for _, _, text in rows]
        self.samples = [(f"{path} line {line}", places[name]) for line, name, _ in rows]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        if not self.texts[index]:
            raise ValueError("the sentence is empty")
        return self.texts[index], self.samples[index][1]


def read_csv(path: Path, label_column: str, text_column: str, title_column: str | None) -> list[tuple[int, str, str]]:
    """Return (line, label, text) of every row of a file; the text may be empty. Raises UserError in one line."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except UnicodeDecodeError as error:
        where = f"byte {hex(error.object[error.start])} at {error.start} of the block being read"
        raise UserError(f"'{path}' is not UTF-8 ({where}): convert it, for example with iconv") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read ({error}): pass a CSV file") from error
    if not rows:
        raise UserError(f"'{path}' is empty: expected rows of label and text")
    header = rows[0][1]
    if label_column in header:
        for what, name in (("text", text_column), ("title", title_column)):
            if name is not None and name not in header:
                raise UserError(
                    f"'{path}' has no {what} column '{name}': {did_you_mean(name, header)} (--data.text.{what}_column)"
                )
        columns, rows = [header.index(name) for name in (title_column, text_column) if name], rows[1:]
        label, width = header.index(label_column), len(header)
    elif header[0].isdigit() and len(header) in (2, 3):
        columns, label, width = list(range(1, len(header))), 0, len(header)
    else:
        raise UserError(
            f"'{path}' has no label column '{label_column}': {did_you_mean(label_column, header)} "
            f"(--data.text.label_column)"
        )
    for line, row in rows:
        if len(row) != width or not row[label]:
            what = f"has {len(row)} columns instead of {width}" if len(row) != width else "has no label"
            raise UserError(f"'{path}' line {line} {what}: correct or remove it")
    if not rows:
        raise UserError(f"'{path}' has a header and no rows: expected rows of label and text")
    return [(line, row[label], _joined(row[column] for column in columns)) for line, row in rows]


def _joined(parts) -> str:
    return " ".join(part.replace("\\n", " ") for part in parts if part).strip()


def open_sentences(
    path: str | None,
    split: str,
    *,
    label_column: str = "label",
    text_column: str = "text",
    title_column: str | None = None,
    on_corrupt: str = "error",
) -> Sentences:
    """Return the `split` ('train' or 'val') of a folder; classes are the labels of its training file, in order.

    An empty sentence is an error that names its line, or with on_corrupt 'skip' fails when it is asked for, which
    `TransformedDataset` counts. Raises UserError for anything else that is wrong with the files.
    """
    if path is None:
        raise UserError("--data.path is missing: the folder that holds train.csv and val.csv")
    columns = label_column, text_column, title_column
    first, own = sentence_files(path, "train", split)
    training = read_csv(first, *columns)
    names = {label for _, label, _ in training}
    classes = class_order(names)
    rows = training if split == "train" else read_csv(own, *columns)
    for line, _, text in rows:
        if not text and on_corrupt == "error":
            raise UserError(
                f"'{own}' line {line}: the sentence is empty: fill or remove it (train.py and "
                f"eval.py pass over it with --data.on_corrupt skip)"
            )
    return Sentences(own, rows, classes)


def sentence_files(path: str, *splits: str) -> list[Path]:
    """Return the CSV files of a folder's `splits`. Raises UserError for one that is not there."""
    folder = existing_folder(path, "data folder")
    found = [next((folder / file for file in FILES[name] if (folder / file).is_file()), None) for name in splits]
    if None in found:
        missing = FILES[splits[found.index(None)]]
        raise UserError(f"'{path}' has no {' or '.join(missing)}: expected a CSV file of labels and texts")
    return found


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a lower-casing WordPiece tokenizer of at most `vocab_size` entries, as BERT's, trained on `texts`.

    The same texts give the same tokenizer: the library numbers the letters inside words as its hash table has them, and
    breaks ties by number, so they are handed to it in a fixed order, as if they were special.
    """
    normalizer, letters = normalizers.BertNormalizer(), Counter()
    for text in texts:
        letters.update(normalizer.normalize_str(text))
    common = sorted(letter for letter, _ in letters.most_common(ALPHABET) if not letter.isspace())
    fixed = [*SPECIAL, *common, *(f"##{letter}" for letter in common)]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(fixed)), special_tokens=fixed, initial_alphabet=common,
        limit_alphabet=len(common), show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator(texts, trainer)
    return _like_bert(learner.get_vocab())


def read_tokenizer(path: str) -> Tokenizer:
    """Return a tokenizer.json of HuggingFace, or a vocab.txt of BERT. Its padding has to be token 0."""
    try:
        if Path(path).suffix == ".txt":
            vocabulary = {word: place for place, word in enumerate(Path(path).read_text("utf-8").splitlines())}
            tokenizer = _like_bert(vocabulary)
        else:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
    except Exception as error:
        raise UserError(f"'{path}' is not a tokenizer.json or vocab.txt ({str(error).splitlines()[0]})") from error
    if tokenizer.token_to_id("[PAD]") != 0:
        raise UserError(f"tokenizer '{path}' has no [PAD] as its token 0: use one of BERT's kind")
    return tokenizer


def _like_bert(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


class Encoder:
    """text -> token ids (n,) int64, cut to `max_length` in all; BERT's kind has [CLS] in front and [SEP] at the end.

    inner: where a sentence's own tokens stand among its ids, between those that the tokenizer adds; GPT-2's adds none.
    """

    def __init__(self, tokenizer: str, max_length: int):
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length)
        self.padding = self.tokenizer.token_to_id("[PAD]")
        added = self.tokenizer.encode("a").special_tokens_mask
        front, back = (list(row).index(0) if 0 in added else 0 for row in (added, reversed(added)))
        self.inner = slice(front, -back or None)

    def __call__(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text).ids)

    def token(self, place: int) -> str:
        """Return the token of an id."""
        return self.tokenizer.id_to_token(place) or ""

    def words(self, ids: Tensor) -> list[str]:
        """Return the tokens of ids (n,), for people and for scores; padding left out."""
        return [self.tokenizer.id_to_token(place) for place in ids.tolist() if place != self.padding]

    def text(self, ids: Tensor) -> str:
        """Return the sentence of ids (n,), special tokens left out."""
        return self.tokenizer.decoder.decode([word for word in self.words(ids) if word not in SPECIAL])


def fit_tokenizer(
    peers: Processes, path: str | None, *, vocab_size: int, tokenizer: str | None, max_length: int, log=None, **columns
) -> str:
    """Return the tokenizer of a training run as JSON: read from the file `tokenizer`, or trained on the training
    sentences. One process trains, all have the same. Says in the log how many sentences are longer than
    `max_length`."""
    texts = [text for text in open_sentences(path, "train", **columns).texts if text]
    if not texts:
        raise UserError(f"'{path}' holds no sentence that is not empty: nothing can be trained on it")
    made = []
    if peers.is_main:
        own = read_tokenizer(tokenizer) if tokenizer else train_tokenizer(texts, vocab_size)
        lengths = [len(one.ids) for one in own.encode_batch(texts[:LOOKED_AT])]
        cut = sum(length > max_length for length in lengths)
        made = [own.to_str()]
        if log:
            log(f"tokenizer: {own.get_vocab_size()} tokens; {cut} of {len(lengths)} training sentences are cut")
    return peers.gather(made)[0]


def open_text_train(
    peers: Processes, data: DataOptions, encoder: Encoder, *, seed: int, accumulation: int
) -> DataLoader:
    """Open the training sentences in batches, padded with 0 to the longest; `batch_sampler` is an EpochSampler."""
    base = open_sentences(data.path, "train", on_corrupt=data.on_corrupt, **data.text.columns())
    base = base if data.train_images is None else Part(base, data.train_images)
    sampler = EpochSampler(len(base), data.batch_size, seed, peers.rank, peers.world_size, 1, accumulation)
    dataset = TransformedDataset(base, encoder, data.on_corrupt, replace=True, blank="", what="sentence")
    return batches(dataset, data.workers, peers.device, batch_sampler=sampler)


def open_text_eval(peers: Processes, data: DataOptions, encoder: Encoder, *, limit: int | None = None) -> DataLoader:
    """Open this process's share of the validation sentences, each counted once. limit: as in `open_eval`."""
    base = open_sentences(data.path, "val", on_corrupt=data.on_corrupt, **data.text.columns())
    return batches_of_share(base, encoder, peers, data, limit, blank="", what="sentence")
