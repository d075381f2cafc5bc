"""data/text.py and data/reviews.py: layouts of CSV files, what is wrong with them, the tokenizer, the corpus."""

import random

import pytest
import torch

from data.reviews import BAD, GOOD, THINGS, review, write_reviews
from data.text import Encoder, open_sentences, read_csv, read_tokenizer, train_tokenizer
from utils.errors import UserError

TEXTS = ["the soup was really fresh", "the bed was not clean , but the view was splendid", "awful ! never again"]


def write(folder, train: str | bytes, val: str | None = None):
    folder.mkdir(exist_ok=True)
    for name, content in (("train.csv", train), ("val.csv", val)):
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_columns_by_name_and_titles_in_front(tmp_path):
    write(tmp_path, 'id,stars,body,head\n1,5,"good, really",Nice\n2,1,bad,\n', "id,stars,body,head\n3,1,so so,Hm\n")
    columns = {"label_column": "stars", "text_column": "body", "title_column": "head"}
    train, val = (open_sentences(tmp_path, split, **columns) for split in ("train", "val"))
    assert train.classes == val.classes == ["1", "5"]
    assert [train[0], train[1], val[0]] == [("Nice good, really", 1), ("bad", 0), ("Hm so so", 0)]
    assert train.samples[1][0].endswith("train.csv line 3")


@pytest.mark.parametrize("row, text", [('"3","fine\\nplace"', "fine place"), ('"3","Title","fine"', "Title fine")])
def test_published_layouts_have_no_header(tmp_path, row, text):
    """Yelp: label, text. Amazon: label, title, text. Labels are sorted as numbers."""
    other = '"10",' + row.split(",", 1)[1]
    write(tmp_path, f"{row}\n{other}\n")
    (tmp_path / "test.csv").write_text(row + "\n")
    assert open_sentences(tmp_path, "train").classes == ["3", "10"]
    assert open_sentences(tmp_path, "val")[0] == (text, 0)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("labell,text\n1,a\n", ("no label column 'label'", "did you mean 'labell'")),
        ("label,body\n1,a\n", ("no text column 'text'", "label, body")),
        (b"label,text\n1,caf\xe9\n", ("not UTF-8", "0xe9", "iconv")),
        ("label,text\n1,a\n1,\n", ("line 3", "sentence is empty", "--data.on_corrupt skip")),
        ("label,text\n1,a\n1,a,b\n", ("line 3", "3 columns instead of 2")),
        ("label,text\n,a\n", ("line 2", "no label")),
        ("label,text\n", ("no rows",)),
        ("", ("is empty",)),
        ('label,text\n1,"a\x00b"\n', None),
    ],
)
def test_wrong_files_are_named_in_one_line(tmp_path, train, words):
    write(tmp_path, train)
    if words is None:
        read_csv(tmp_path / "train.csv", "label", "text", None)  # what Python can read, it reads
        return
    with pytest.raises(UserError) as error:
        open_sentences(tmp_path, "train")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_labels_new_in_validation_and_missing_files_are_named(tmp_path):
    write(tmp_path, "label,text\n1,a\n", "label,text\n1,b\n2,c\n")
    with pytest.raises(UserError, match=r"val\.csv' line 3: label '2' does not occur"):
        open_sentences(tmp_path, "val")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(UserError, match=r"has no val\.csv or test\.csv"):
        open_sentences(tmp_path, "val")


def test_the_same_texts_give_the_same_tokenizer():
    texts = [review(random.Random(seed), True) for seed in range(60)]
    assert len({train_tokenizer(texts, 120).to_str() for _ in range(4)}) == 1


def test_encoder_keeps_both_ends_and_cuts_the_rest():
    encoder = Encoder(train_tokenizer(TEXTS, 400).to_str(), 6)
    ids = encoder(TEXTS[1])
    assert encoder.words(ids) == ["[CLS]", "the", "bed", "was", "not", "[SEP]"]
    assert encoder.text(ids) == "the bed was not" and ids.dtype == torch.int64
    whole = Encoder(train_tokenizer(TEXTS, 400).to_str(), 64)
    assert whole.text(whole(TEXTS[0])) == TEXTS[0]
    assert "[SEP]" not in whole.words(whole("[SEP] the"))[1:-1]  # nobody writes special tokens into a sentence
    assert len(whole("")) == 2


def test_tokenizers_of_bert_are_read(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nsoup\n##s\n")
    encoder = Encoder(read_tokenizer(str(tmp_path / "vocab.txt")).to_str(), 8)
    assert encoder("Soups").tolist() == [2, 5, 6, 3]
    train_tokenizer(TEXTS, 400).save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(str(tmp_path / "tokenizer.json")).token_to_id("[PAD]") == 0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json"):
        read_tokenizer(str(tmp_path / "other.json"))


def test_the_words_of_two_opinions_do_not_tell_their_label():
    """A label that counts polarities of words, negations included, is undecided on every review of two opinions."""
    rng = random.Random(1)
    undecided = 0
    for place in range(400):
        words = review(rng, place % 2 == 0).split()
        polarity = 0
        for index, word in enumerate(words):
            if word in GOOD or word in BAD:
                sign = 1 if word in GOOD else -1
                polarity += -sign if words[index - 2] == "not" else sign
        opinions = sum(word in THINGS for word in words)
        assert opinions == 2 and polarity == 0 or opinions == 1 and polarity == (1 if place % 2 == 0 else -1)
        undecided += opinions == 2
    assert 0.5 < undecided / 400 < 0.7


def test_corpus_is_seeded_and_its_splits_are_disjoint(tmp_path):
    for name in ("a", "b"):
        write_reviews(tmp_path / name, 60, 30)
    texts = {split: (tmp_path / "a" / f"{split}.csv").read_text() for split in ("train", "val")}
    assert all((tmp_path / "b" / f"{split}.csv").read_text() == text for split, text in texts.items())
    assert not set(texts["train"].splitlines()[1:]) & set(texts["val"].splitlines()[1:])
