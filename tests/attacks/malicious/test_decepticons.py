"""Bins of tokens: what comes back is what the client read, tokens that MJP hides lose their places, and refusals."""

import pytest
import torch

from attacks.malicious.decepticons import decepticons
from attacks.malicious.decepticons_server import Decepticons
from attacks.malicious.server import Knowledge
from attacks.threat_model.leak import Leak
from defenses.detector import suspicion, weight_statistics
from models import build_model
from utils.errors import UserError

SIZE = {"vocab_size": 200, "max_length": 12, "num_classes": 3}
SHAPES = {"text_small": {}, "bert": {"embed_dim": 64, "depth": 3, "num_heads": 2}}


def leak_of(name: str, number: int, hidden: bool = False) -> tuple[torch.Tensor, torch.Tensor, Leak]:
    """Return (sentences (B, 12), which places are hidden, what one step on them shares)."""
    model = build_model(name, unknown=hidden, **SIZE, **SHAPES[name]).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (number, 12), generator=generator)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sent = Decepticons().tamper(model, Knowledge((12,), (0.0,), (1.0,)), generator=generator).eval()
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert suspicion(weight_statistics(sent.state_dict(), before))  # a client could tell
    mask = torch.zeros(number, 12, dtype=torch.bool)
    mask[:, 3:7] = hidden
    loss = torch.nn.functional.cross_entropy(sent(ids, mask) if hidden else sent(ids), torch.arange(number) % 3)
    names = dict(sent.named_parameters())
    found = zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True), strict=True)
    return ids, mask, Leak(sent, {name: value for name, value in found if value is not None}, (12,), number)


@pytest.mark.parametrize("name", SHAPES)
def test_sentences_of_a_batch_come_back_apart_and_in_order(name):
    ids, _, leak = leak_of(name, 3)
    result = decepticons(leak, generator=torch.Generator())
    told, right = result.diagnostics, 0
    assert told["sentences"] == 3 and told["placed"] >= 26
    for sentence in result.images:
        same = (sentence[None] == ids).sum(dim=1)
        found = int((sentence > 0).sum())
        assert int(same.max()) == found  # every token that is told stands where it stood
        right += found
    assert right == told["placed"]


def test_hidden_tokens_are_told_without_their_places():
    ids, mask, leak = leak_of("text_small", 1, hidden=True)
    result = decepticons(leak, generator=torch.Generator())
    found = result.images[0]
    seen = found[~mask[0]] > 0
    assert (found[~mask[0]][seen] == ids[0][~mask[0]][seen]).all() and int(seen.sum()) >= 6
    assert result.diagnostics["placed"] <= 8 and not result.diagnostics["exact"]
    assert len(set(found[mask[0]].tolist()) & set(ids[0][mask[0]].tolist())) >= 3


def test_honest_models_and_models_without_bins_are_refused():
    _, _, leak = leak_of("text_small", 1)
    del leak.model.token_bins
    with pytest.raises(UserError, match="use the server 'decepticons'"):
        decepticons(leak, generator=torch.Generator())
    server, knowledge, generator = Decepticons(), Knowledge((12,), (0.0,), (1.0,)), torch.Generator()
    for model, words in (
        (build_model("vit", image_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2), "text models"),
        (build_model("text_small", depth=1, **SIZE), "two blocks"),
        (build_model("text_small", positions="none", **SIZE), "with positions"),
    ):
        with pytest.raises(UserError, match=words):
            server.tamper(model, knowledge, generator=generator)
    with pytest.raises(UserError, match="--server_options.steep must be above 0"):
        Decepticons(steep=0.0)


def test_the_guarantee_is_that_of_bins():
    assert Decepticons().guarantee(1, rows=100) == pytest.approx(1.0)
    assert Decepticons().guarantee(64, rows=384) == pytest.approx((1 - 1 / 384) ** 63)
    assert Decepticons().guarantee(64) is None
