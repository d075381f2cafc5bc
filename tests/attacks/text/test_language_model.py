"""A causal language model as victim: no place sees what follows, and its sentences come back, the last token too."""

import pytest
import torch
from torch import nn

from attacks.text.dager import dager
from attacks.text.sentence import Guesses
from attacks.text.text_matching import tag, text_dlg
from attacks.text.token_rows import token_rows
from attacks.threat_model.client import Client
from attacks.threat_model.leak import Leak
from defenses import build_defense
from models import build_model
from models.token_jigsaw import TokenJigsaw
from utils.errors import UserError

SENTENCE = torch.tensor([[2, 5, 40, 6, 5, 17, 33, 6, 21, 5, 9, 28, 6, 3]])
SIZE = {"vocab_size": 60, "max_length": 20, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def victim(dtype=torch.float64, **options) -> nn.Module:
    return build_model("causal_small", **SIZE | options).eval().to(dtype)


def observe(model: nn.Module, labels: bool = False, ratio: float = 0.0) -> Leak:
    terms = {"mean": (0.0,), "std": (1.0,), "reveal_labels": labels}
    client = Client(model, TokenJigsaw(ratio, window=6), build_defense("none", {}, "text"), 0, terms, ["a", "b"])
    return client.round(0, SENTENCE, ["a"]).leak


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_place_sees_itself_and_what_comes_before():
    model, other = victim(), SENTENCE.clone()
    other[0, 7] = 50
    before, after = model(SENTENCE), model(other)
    assert before.shape == (1, 60, 13)
    changed = (before != after).any(dim=1)[0]
    assert changed.tolist() == [False] * 7 + [True] * 6


def test_padding_behind_a_sentence_changes_nothing():
    model = victim()
    padded = torch.cat([SENTENCE, torch.zeros(1, 3, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model(padded)[:, :, :13], model(SENTENCE))


def test_the_client_trains_on_the_next_tokens():
    model = victim()
    leak = observe(model)
    nn.functional.cross_entropy(model(SENTENCE), SENTENCE[:, 1:]).backward()
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(leak.gradients[name], value.grad)
    with pytest.raises(UserError, match="labels of a language model are its sentence.*set --labels hidden"):
        observe(victim(), labels=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attack", [token_rows, dager])
def test_the_sentence_comes_back_with_its_last_token(attack, dtype):
    found = attack(observe(victim(dtype)), generator=seeded())
    assert torch.equal(found.images, SENTENCE) and found.diagnostics["exact"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_the_decoders_bias_its_matrix_tells_the_last_token(dtype):
    leak = observe(victim(dtype))
    del leak.gradients["head.bias"]
    found = token_rows(leak, generator=seeded())
    assert torch.equal(found.images, SENTENCE) and found.diagnostics["exact"]


def test_without_the_decoder_the_last_token_is_open_and_nothing_is_claimed():
    leak = observe(victim())
    del leak.gradients["head.bias"], leak.gradients["head.weight"]
    found = token_rows(leak, generator=seeded())
    assert torch.equal(found.images[0, :-1], SENTENCE[0, :-1]) and found.images[0, -1] == 0
    assert not found.diagnostics["exact"]


def test_guesses_are_scored_by_their_own_next_tokens():
    leak, wrong = observe(victim()), SENTENCE.clone()
    wrong[0, -1] = 4
    scores = Guesses(leak, None, seeded())(torch.cat([SENTENCE, wrong]))
    assert scores[0] < 1e-20 < 1e-4 < scores[1]


def test_matching_optimises_targets_with_the_sentence():
    leak = observe(victim())
    found, start = (tag(leak, generator=seeded(), iterations=number) for number in (30, 0))
    assert found.images.shape == SENTENCE.shape
    assert found.diagnostics["objective"] < 0.8 * start.diagnostics["objective"]
    with pytest.raises(UserError, match="labels of a language model are its tokens: set attack_options.labels joint"):
        text_dlg(leak, generator=seeded())


def test_hidden_places_are_left_to_matching():
    leak = observe(victim(unknown=True), ratio=0.5)
    with pytest.raises(UserError, match="hide no positions.*use tag"):
        token_rows(leak, generator=seeded())
    assert tag(leak, generator=seeded(), iterations=2).images.shape == SENTENCE.shape
