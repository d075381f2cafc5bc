"""training/fastest.py: what is chosen is faster and the same gradient, and is remembered for this machine."""

import json

import pytest
import torch

from models import build_model
from training import fastest as module
from training.fastest import cache_file, candidates, choose_recipe, fastest, is_true_float32, measure
from training.options import OptimOptions
from utils.distributed import Processes
from utils.errors import UserError

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
DEFAULT, PLAIN, BF16 = ("none", "highest", "fused"), ("none", "highest", "plain"), ("bf16", "highest", "plain")


@pytest.fixture
def model():
    return build_model("vit", image_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/mjp/recipes.json"


def row(name, ratio, gradient=0.0) -> dict:
    return {"name": list(name), "ratio": ratio, "gradient": gradient}


def test_the_fastest_is_taken_only_with_the_same_gradient_and_a_clear_gain():
    assert fastest([row(DEFAULT, 1.0), row(PLAIN, 0.9), row(BF16, 0.3, 0.01)]) == BF16
    assert fastest([row(DEFAULT, 1.0), row(PLAIN, 0.9), row(BF16, 0.3, 0.06)]) == PLAIN
    assert fastest([row(DEFAULT, 1.0), row(PLAIN, 0.98)]) == DEFAULT


def test_gradients_of_all_candidates_are_measured_against_float32_and_the_model_stays(model):
    before, fused = {name: value.clone() for name, value in model.state_dict().items()}, model.training
    names = candidates(model, "auto", CPU)
    assert names[0] == DEFAULT and len(names) == 6
    rows = {tuple(one["name"]): one for one in measure(model, names, 2, CPU)}
    assert rows[DEFAULT]["gradient"] == 0 and rows[DEFAULT]["ratio"] == 1 and 0 < rows[PLAIN]["gradient"] < 1e-5
    assert 1e-4 < rows[BF16]["gradient"] < 0.05  # bf16 is seen as what it is, emulated or not
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training == fused and all(value.grad is None for value in model.parameters())
    assert all(block.attn.fused_attn for block in model.blocks) and torch.get_float32_matmul_precision() == "highest"


def test_float32_leaves_out_what_rounds(model, monkeypatch):
    assert {name[0] for name in candidates(model, "float32", CPU)} == {"none"}
    monkeypatch.setattr(module.Precision, "error", lambda self: 2e-3)
    assert is_true_float32(DEFAULT, CPU) and not is_true_float32(("none", "medium", "fused"), CPU)
    assert not is_true_float32(BF16, CPU)
    tried = []
    monkeypatch.setattr(module, "measure", lambda model, names, *_: tried.extend(names) or [row(DEFAULT, 1.0)])
    choose_recipe(model, OptimOptions(recipe="float32"), 2, ALONE, None)
    assert tried == [DEFAULT, PLAIN]


def test_it_is_measured_once_logged_and_remembered(model, cache, monkeypatch):
    calls, lines = [], []
    rows = [row(DEFAULT, 1.0), row(BF16, 0.3, 0.01)]
    monkeypatch.setattr(module, "measure", lambda *_: calls.append(1) or rows)
    given = OptimOptions(recipe="auto", lr=0.25)
    for _ in range(2):
        chosen = choose_recipe(model, given, 2, ALONE, lines.append)
        assert (chosen.amp, chosen.matmul, chosen.attention, chosen.lr) == (*BF16, 0.25)
    assert len(calls) == 1 and cache_file() == cache
    assert "--optim.amp bf16" in lines[0] and "bf16/highest/plain 0.30 of the time, 1e-02 off" in lines[0]
    assert str(cache) in lines[1]
    known = json.loads(cache.read_text())
    (key,) = known
    cache.write_text(json.dumps({key: "edited", "other": 1}))
    choose_recipe(model, given, 2, ALONE, None)
    assert len(calls) == 2 and json.loads(cache.read_text()) == {key: rows, "other": 1}
    cache.write_text("[")
    choose_recipe(model, given, 2, ALONE, None)
    assert len(calls) == 3 and json.loads(cache.read_text()) == {key: rows}


def test_what_cannot_be_kept_is_said(model, cache, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: [row(DEFAULT, 1.0)])
    cache.parent.parent.write_text("a file where the folder should be")
    lines = []
    assert choose_recipe(model, OptimOptions(recipe="auto"), 2, ALONE, lines.append).amp == "none"
    assert "not kept" in lines[0]


def test_given_options_stay_and_sentences_are_refused(model, cache):
    given = OptimOptions(amp="bf16")
    assert choose_recipe(model, given, 2, ALONE, None) is given and not cache.exists()
    text = build_model("text_small")
    with pytest.raises(UserError, match="takes sentences"):
        choose_recipe(text, OptimOptions(recipe="auto"), 2, ALONE, None)
