"""The entry scripts on sentences: train, evaluate, attack, resume, and what they say of wrong input."""

import json
import shlex
import shutil

import pytest
import torch

from data.reviews import write_reviews
from utils.campaign import Campaign

TINY = shlex.split(
    "--data.kind text --data.workers 0 --data.batch_size 8 --data.text.max_length 40 --data.text.vocab_size 300 "
    "--model.name text_small --model.embed_dim 48 --model.depth 2 --model.num_heads 2 --model.mlp_ratio 1 "
    "--model.drop_path 0 --model.unknown true --model.localization relative --optim.mixup 0 --optim.cutmix 0 "
    "--optim.epochs 2 --optim.warmup_epochs 1 --optim.lr 0.1 --jigsaw.mask_ratio 0.5 --jigsaw.start_epoch 1 "
    "--jigsaw.window 8 --device cpu"
)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    write_reviews(folder, 48, 12)
    return folder


@pytest.fixture
def train(call, reviews, tmp_path):
    return lambda *options: call("train.py", *TINY, "--data.path", reviews, "--output", tmp_path / "run", *options)


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def fails(outcome, *words: str) -> None:
    assert outcome.status == 2 and "Traceback" not in outcome.err, outcome
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


def test_train_evaluate_and_attack(call, train, reviews, tmp_path):
    """The checkpoint brings its tokenizer: nothing else is needed."""
    assert train().status == 0
    last = tmp_path / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    assert content["classes"] == ["bad", "good"] and '"[PAD]"' in content["tokenizer"]
    data = ["--data.kind", "text", "--data.path", reviews, "--data.workers", 0, "--checkpoint", last]
    outcome = call("eval.py", *data, "--mask_ratios", "0,0.5", "--seeds", 2, "--output", tmp_path / "eval")
    assert outcome.status == 0, outcome.err
    rows = results(tmp_path / "eval")["accuracy"]
    assert [row["images"] for row in rows] == [12, 12] and rows[1]["seeds"] == 2
    assert rows[0]["acc1"] == pytest.approx(results(tmp_path / "run")["acc1"])
    outcome = call("consistency.py", *data, "--mask_ratios", "0,0.5", "--output", tmp_path / "consistency")
    assert outcome.status == 0, outcome.err
    rows = results(tmp_path / "consistency")["consistency"]
    assert rows[0]["consistency"] == 100 and rows[0]["diff_norm"] == 0 and rows[1]["diff_norm"] > 0
    attack = ["--attack", "token_rows", "--checkpoint", last, "--data.kind", "text", "--data.path", reviews]
    for ratio in (0, 0.5):
        public = ["--data.public", reviews / "train.csv"] if ratio else []
        outcome = call("attack.py", *attack, *public, "--mask_ratio", ratio, "--output", tmp_path / str(ratio))
        assert outcome.status == 0, outcome.err
        found = results(tmp_path / str(ratio))
        assert found["summary"]["tokens_any_order"]["mean"] == 100 and found["summary"]["tokens_any_order"]["n"] == 12
        assert (found["summary"]["tokens_in_place"]["mean"] == 100) == (ratio == 0)
        assert "public sentences" in found["threat_model"]
    page = (tmp_path / "0.5" / "report.html").read_text()
    assert page.count('<div class="sentences">') == 12 and 'class="exact masked"' in page and "<img" not in page
    sentences = json.loads((tmp_path / "0.5" / "sentences.json").read_text())
    assert all(sorted(one["original"]) == sorted(one["reconstruction"]) for one in sentences)


def test_the_same_seed_gives_the_same_bits(call, train, reviews, tmp_path):
    assert train().status == 0
    assert call("train.py", *TINY, "--data.path", reviews, "--output", tmp_path / "other").status == 0
    one, two = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run", "other"))
    assert one["tokenizer"] == two["tokenizer"] and one["jigsaw"] == two["jigsaw"]
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())


def test_longer_sentences_are_cut_and_counted(train, tmp_path):
    outcome = train("--data.text.max_length", 12)
    assert outcome.status == 0 and "48 of 48 training sentences are cut" in outcome.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"stars,text\n1,fine\n", ("no label column 'label'", "--data.text.label_column")),
        (b"label,text\n1,caf\xe9\n", ("not UTF-8", "iconv")),
        (b"label,text\n1,fine\n1,  \n", ("line 3", "sentence is empty")),
    ],
)
def test_wrong_files_end_in_one_line(train, tmp_path, content, words):
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "train.csv").write_bytes(content)
    (folder / "val.csv").write_text("label,text\n1,fine\n")
    fails(train("--data.path", folder), *words)


def test_empty_sentences_may_be_skipped_and_are_counted(train, reviews, tmp_path):
    folder = tmp_path / "skipped"
    folder.mkdir()
    for name in ("train.csv", "val.csv"):
        (folder / name).write_text((reviews / name).read_text() + "good,\n")
    outcome = train("--data.path", folder, "--data.on_corrupt", "skip")
    assert outcome.status == 0, outcome.err
    assert results(tmp_path / "run")["skipped"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.name", "deit_small"], ("--model.name", "data.kind text")),
        (["--model.name", "causal_small"], ("model.name", "a classifier, text_small or bert")),
        (["--optim.mixup", 0.8], ("mixup", "data.kind text")),
        (["--defense", "ats"], ("defence 'ats' works on images", "noise")),
        (["--data.path", "/no/such/folder"], ("/no/such/folder",)),
        (["--data.text.max_length", 2], ("data.text.max_length", "at least 3")),
        (["--data.text.txt_column", "x"], ("did you mean 'data.text.text_column'",)),
        (["--data.text.tokenizer", "/no/such.json"], ("/no/such.json",)),
    ],
)
def test_wrong_options_of_training_are_named(train, options, words):
    fails(train(*options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--attack", "mjp_aware"], ("--attack", "data.kind text")),
        (["--batch_size", 2], ("batch_size", "1 for text, except with --attack dager")),
        (["--model", "vit"], ("--model", "a model of sentences")),
        (["--data.min_tokens", 90, "--data.max_tokens", 99], ("only 0 sentences have 90 to 99 tokens",)),
        (["--data.public", "/no/such.csv"], ("/no/such.csv",)),
        (["--images", "."], ("--images", "data.kind text")),
        (["--withhold", "pos_embed"], ("token_rows", "pos_embed")),
    ],
)
def test_wrong_options_of_attacks_are_named(call, reviews, tmp_path, options, words):
    given = ["--attack", "token_rows", "--model", "text_small", "--data.kind", "text", "--data.path", reviews]
    fails(call("attack.py", *given, *options, "--output", tmp_path / "run"), *words)


@pytest.mark.parametrize("file", ["train.csv", "val.csv"])
def test_a_campaign_does_not_go_on_with_other_sentences_in_files_of_the_old_name(
    call, reviews, tmp_path, monkeypatch, file
):
    data = tmp_path / "data"
    shutil.copytree(reviews, data)
    given = ["--attack", "token_rows", "--model", "text_small", "--data.kind", "text", "--data.path", data]
    given += ["--num_images", 2, "--resume", "auto", "--output", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Campaign, "merge", lambda self: [])  # stopped before the results
        assert call("attack.py", *given).status == 0
    content = (data / file).read_text()
    (data / file).write_text(content.replace("the", "a", 1))
    assert (data / file).read_text() != content
    fails(call("attack.py", *given), "sentences", "--overwrite")
    (data / file).write_text(content)
    outcome = call("attack.py", *given)
    assert outcome.status == 0 and "2 of 2 sentences are done" in outcome.out


def test_a_language_model_gives_its_sentences_away(call, reviews, tmp_path):
    given = ["--attack", "token_rows", "--model", "causal_small", "--data.kind", "text", "--data.path", reviews]
    given += ["--model_options.embed_dim", 48, "--num_images", 2]
    fails(call("attack.py", *given, "--output", tmp_path / "told"), "labels of a language model", "--labels hidden")
    outcome = call("attack.py", *given, "--labels", "hidden", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    found = results(tmp_path / "run")
    assert all(row["exact"] and row["tokens_in_place"] == 100 for row in found["per_image"])
    assert "label" not in found["per_image"][0] and (tmp_path / "run" / "report.html").is_file()


def test_models_of_the_other_kind_are_named(call, trained, reviews, images, tmp_path):
    text = ["--data.kind", "text", "--data.path", reviews, "--checkpoint", trained / "last.pt"]
    fails(call("eval.py", *text, "--output", tmp_path / "run"), "is a model of images")
