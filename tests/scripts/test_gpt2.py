"""GPT-2 as HuggingFace saves it, with its byte-level tokenizer, as the victim of attacks on sentences."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from attacks.text.dager import dager
from attacks.text.text_matching import tag
from attacks.text.token_rows import token_rows
from attacks.threat_model.client import Client
from attacks.threat_model.leak import Leak
from attacks.threat_model.terms import Terms
from data.text import Encoder
from defenses import build_defense
from models import build_model
from models.external import open_external
from models.token_jigsaw import TokenJigsaw
from tests.scripts.test_text import fails, results
from utils.errors import UserError

TEXTS = ["! the acting is good and the plot is good!", "a weak film, and nobody knows why it was made"] * 20
IDS = torch.tensor([[5, 0, 17, 17, 40, 0, 8, 31, 5]])  # token 0 is one like any other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT2LMHeadModel with random weights, all of them, and a tokenizer trained on two sentences."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXTS, vocab_size=320, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = {"vocab_size": tokenizer.get_vocab_size(), "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**size))
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> nn.Module:
    return open_external(f"hf:{folder}")


def observe(model: nn.Module, *withheld: str) -> Leak:
    terms = Terms(mean=(0.0,), std=(1.0,), reveal_labels=False, withhold=withheld)
    client = Client(model, TokenJigsaw(0.0), build_defense("none", {}, "text"), 0, terms, ["a", "b"])
    return client.round(0, IDS, ["a"]).leak


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def test_logits_are_those_of_transformers(folder, model):
    theirs = hf.GPT2LMHeadModel.from_pretrained(folder).eval()(IDS).logits
    torch.testing.assert_close(model(IDS), theirs[:, :-1].movedim(-1, 1), rtol=0, atol=1e-5)
    assert theirs.std() > 0.1


def test_the_gradient_of_the_tied_table_is_that_of_transformers(folder, model):
    theirs = hf.GPT2LMHeadModel.from_pretrained(folder).eval()
    theirs(IDS, labels=IDS).loss.backward()
    ours = observe(model).gradients
    assert "head.weight" not in ours
    torch.testing.assert_close(ours["token_embed.weight"], theirs.transformer.wte.weight.grad, rtol=1e-4, atol=1e-6)
    wanted = theirs.transformer.h[1].attn.c_attn.weight.grad.T
    torch.testing.assert_close(ours["blocks.1.attn.qkv.weight"], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dager_reads_the_sentence_with_its_last_token(model, dtype):
    found = dager(observe(open_copy(model, dtype)), generator=seeded())
    assert torch.equal(found.images, IDS) and found.diagnostics["exact"]


def open_copy(model: nn.Module, dtype: torch.dtype, **options) -> nn.Module:
    copy = build_model(**model.arguments | options).eval()
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)


def test_a_decoder_of_its_own_is_read_too(model):
    own = open_copy(model, torch.float64, tied=False)
    for attack in (dager, token_rows):
        found = attack(observe(own), generator=seeded())
        assert torch.equal(found.images, IDS) and found.diagnostics["exact"]


def test_without_the_positions_gradient_the_last_token_is_open(model):
    found = dager(observe(open_copy(model, torch.float64), "pos_embed"), generator=seeded())
    assert torch.equal(found.images[0, :-1], IDS[0, :-1]) and not found.diagnostics["exact"]


def test_tag_lowers_its_objective_and_may_read_token_0(model):
    leak = observe(model)
    found, start = (tag(leak, generator=seeded(), iterations=number) for number in (30, 0))
    assert found.diagnostics["objective"] < 0.8 * start.diagnostics["objective"]
    with pytest.raises(UserError, match="decoder of this model is the token table.*vocabulary all"):
        tag(leak, generator=seeded(), vocabulary="leaked")


def test_the_tied_table_is_refused_by_token_rows(model):
    with pytest.raises(UserError, match="token_rows.*the table is the decoder too.*use dager"):
        token_rows(observe(model), generator=seeded())


def test_the_tokenizer_adds_nothing_and_loses_nothing(folder, model):
    encoder, text = Encoder(model.tokenizer, 32), "! and a film"
    ids = encoder(text)
    assert ids[0] == 0 and encoder.text(ids) == text and ids[encoder.inner].equal(ids)


def test_sentences_are_attacked_from_the_command_line(call, folder, tmp_path):
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    for name in ("train.csv", "val.csv"):
        (reviews / name).write_text(
            "label,text\n" + "".join(f'{place},"{text}"\n' for place, text in enumerate(TEXTS[:2]))
        )
    given = ["--model", f"hf:{folder}", "--data.kind", "text", "--data.path", reviews, "--labels", "hidden"]
    given += ["--num_images", 2, "--data.max_tokens", 24, "--data.min_tokens", 3]
    fails(call("attack.py", "--attack", "token_rows", *given, "--output", tmp_path / "rows"), "use dager")
    outcome = call("attack.py", "--attack", "dager", *given, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    rows = results(tmp_path / "run")["per_image"]
    assert all(row["exact"] and row["tokens_in_place"] == 100 for row in rows) and len(rows) == 2


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"architectures": ["GPT2ForSequenceClassification"]}, "'GPT2ForSequenceClassification'.*save a GPT2LMHead"),
        ({"activation_function": "relu"}, "GPT-2 with activation_function relu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_relatives_are_refused_in_a_line(folder, tmp_path, said, match):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=match):
        open_external(f"hf:{tmp_path}")


def test_positions_are_not_hidden(model):
    with pytest.raises(UserError, match="no padding, which MJP passes over"):
        build_model(**model.arguments | {"unknown": True})


def test_attacks_on_images_refuse_it(call, folder, images, tmp_path):
    given = ["--model", f"hf:{folder}", "--images", images, "--output", tmp_path / "run"]
    fails(call("attack.py", "--attack", "closed_form", *given), "is a model of sentences", "--data.kind text")
    assert not (tmp_path / "run").exists()
