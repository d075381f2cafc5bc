"""Attacks on sentences: exact where their equations say so, by what is shared and what the attacker knows of MJP."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS, SENTENCES
from attacks.matching import MatchingOptions
from attacks.matching.loss import Phase, ReconstructionLoss
from attacks.matching.problem import build_problem
from attacks.text.bigram_order import order_hidden
from attacks.text.dager import dager
from attacks.text.sentence import Guesses, search
from attacks.text.text_matching import _embedded, tag, text_dlg
from attacks.text.token_rows import token_rows
from attacks.threat_model.client import PrivateBatch, prepare, share
from attacks.threat_model.leak import Leak
from defenses import no_defense
from models import build_model
from models.token_jigsaw import TokenJigsaw
from utils.errors import UserError

# Tokens 5 and 6 are there several times, as articles and full stops are.
SENTENCE = torch.tensor([[2, 5, 40, 6, 5, 17, 33, 6, 21, 5, 9, 28, 6, 3]])
SIZE = {"vocab_size": 60, "max_length": 20, "num_classes": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}


def victim(name="text_small", dtype=torch.float64, **options) -> nn.Module:
    return build_model(name, **SIZE | {"unknown": True} | options).eval().to(dtype)


def observe(model: nn.Module, ratio: float = 0.0, seed: int = 0, **terms) -> tuple[PrivateBatch, Leak]:
    private = prepare(model, SENTENCE, torch.tensor([1]), TokenJigsaw(ratio, window=6, seed=seed), 0)
    return private, share(model, private, terms.pop("defense", no_defense), terms.pop("reveal_labels", True), **terms)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def same_set(one: Tensor, other: Tensor) -> bool:
    return sorted(one.tolist()) == sorted(other.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["text_small", "bert"])
@pytest.mark.parametrize("attack", [token_rows, dager])
def test_plain_steps_give_the_sentence_away(attack, name, dtype):
    _, leak = observe(victim(name, dtype), reveal_labels=False)
    found = attack(leak, generator=generator())
    assert torch.equal(found.images, SENTENCE) and found.diagnostics["exact"]


def test_a_naive_shuffle_hides_nothing_of_what_the_model_saw():
    private, leak = observe(victim(unknown=False), 0.7)
    assert not torch.equal(private.model_input, SENTENCE)
    assert torch.equal(token_rows(leak, generator=generator()).images, private.model_input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attack", [token_rows, dager])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masked_steps_hide_the_order_of_hidden_tokens_alone(attack, seed, dtype):
    private, leak = observe(victim("text_small", dtype), 0.6, seed)
    hidden = private.mask[0]
    found = attack(leak, generator=generator())
    assert found.diagnostics["hidden"] == hidden.sum() >= 6 and found.diagnostics["exact_up_to_order"]
    assert not found.diagnostics["exact"]
    assert torch.equal(found.images[0, ~hidden], private.model_input[0, ~hidden])
    assert same_set(found.images[0, hidden], private.model_input[0, hidden])


def test_the_naive_attacker_misses_hidden_tokens():
    private, leak = observe(victim(), 0.6, attacker_knowledge="none")
    hidden = private.mask[0]
    for attack in (token_rows, dager):
        found = attack(leak, generator=generator())
        assert not same_set(found.images[0, hidden], private.model_input[0, hidden])
        assert not found.diagnostics["exact_up_to_order"]


def test_withheld_tables_do_not_stop_the_row_space():
    """With the mask told as well as inferred."""
    for attacker_knowledge in ("method", "mask"):
        private, leak = observe(
            victim(), 0.6, withhold=["token_embed.weight", "*pos_embed"], attacker_knowledge=attacker_knowledge
        )
        found = dager(leak, generator=generator())
        assert found.diagnostics["exact_up_to_order"] and same_set(found.images[0], SENTENCE[0])
        with pytest.raises(UserError, match=r"needs the gradient of 'token_embed\.weight'"):
            token_rows(leak, generator=generator())


@pytest.mark.parametrize("ratio", [0.0, 0.6])
def test_the_true_sentence_has_an_objective_of_zero(ratio):
    """Victim and attacker share weights and loss: for guesses of tokens, and for vectors in their place."""
    private, leak = observe(victim(), ratio)
    hidden = private.mask[0] if ratio else None
    guesses = Guesses(leak, hidden, generator())
    other = private.model_input.clone()
    other[0, 2] = 41
    true, wrong = guesses(torch.cat([private.model_input, other])).tolist()
    assert true < 1e-25 and wrong > 1e-6
    inner = _embedded(leak)
    for objective in ("l2", "tag", "cosine"):
        options = MatchingOptions(objective=objective)
        problem = build_problem([inner], options, [generator()])
        data = {key: value[0] for key, value in problem.data.items()}
        vectors = leak.model.token_embed.weight.detach()[private.model_input]
        targets = nn.functional.one_hot(private.labels, 2).double()
        _, distance = ReconstructionLoss(problem, options)(Phase(1.0, 0.0, {}), vectors, targets, data)
        assert float(distance.detach().abs()) < 1e-10, objective


def test_matching_recovers_a_plain_sentence():
    """Eight tokens, from the gradient of a small victim; nearest rows over the whole vocabulary."""
    model = victim("text_small", torch.float32)
    private = prepare(model, SENTENCE[:, [0, 1, 2, 5, 6, 8, 12, 13]], torch.tensor([1]), TokenJigsaw(0), 0)
    leak = share(model, private, no_defense, True)
    found = text_dlg(leak, generator=generator(), iterations=80, restarts=1)
    assert (found.images == private.model_input).double().mean() > 0.85
    assert 0 < found.diagnostics["similarity"] <= 1.0001


def test_presets_of_sentences_keep_what_defines_them():
    dlg = {"objective": "l2", "optimizer": "lbfgs", "lr": 1.0, "restarts": 3, "init": "randn_truncated", "clip": 0.0}
    of_tag = {"objective": "tag", "layer_weights": "linear", "optimizer": "adamw", "schedule": "linear", "warmup": 50}
    of_tag |= {"lr": 0.05, "clip": 1.0, "init": "randn_truncated", "labels": "joint"}
    for attack, wanted in ((text_dlg, dlg), (tag, of_tag)):
        assert {name: getattr(attack.preset, name) for name in wanted} == wanted


def test_every_way_a_bag_fills_the_hidden_places_is_guessed():
    """Two tokens for four places: each is there at least once, in any number."""
    ids, hidden, seen = torch.tensor([2, 7, 7, 7, 7, 3]), [1, 2, 3, 4], []

    def guesses(candidates: Tensor) -> Tensor:
        seen.extend(candidates[:, hidden].tolist())
        return (candidates[:, hidden] != torch.tensor([7, 8, 8, 8])).sum(dim=1).double()

    best, score = search(guesses, ids, {}, hidden, [7, 8], sweeps=0)
    assert seen == [[7, 7, 7, 7], [7, 8, 7, 7], [7, 8, 7, 8], [7, 8, 8, 8]]
    assert best.tolist() == [2, 7, 8, 8, 8, 3] and score == 0


def test_tag_runs_side_by_side_as_alone_and_with_leaked_words_only():
    model = victim("text_small", torch.float64)
    leaks = [observe(model, 0.5, seed)[1] for seed in (0, 1)]
    options = {"iterations": 3, "warmup": 1, "vocabulary": "leaked"}
    both = tag(leaks, generator=[generator(), generator()], **options)
    for leak, one in zip(leaks, both, strict=True):
        alone = tag(leak, generator=generator(), **options)
        assert torch.equal(alone.images, one.images) and one.diagnostics["mask"] == "inferred"
        assert set(one.images[0].tolist()) <= set(SENTENCE[0].tolist())
    naive = tag(replace(leaks[0], attacker_knowledge="none"), generator=generator(), **options)
    assert naive.diagnostics["mask"] == "none"


def test_noise_below_the_rows_is_seen_through():
    def noisy(gradients, step):
        draws = torch.Generator().manual_seed(1)
        return {
            name: value + 1e-6 * torch.randn(value.shape, generator=draws, dtype=value.dtype)
            for name, value in gradients.items()
        }

    _, leak = observe(victim(), defense=noisy)
    found = token_rows(leak, generator=generator())
    assert torch.equal(found.images, SENTENCE) and not found.diagnostics["exact"]


def test_language_orders_hidden_tokens():
    _, leak = observe(victim(), 0.6)
    public = tuple(torch.tensor([2, 10, 11, 12, 13, 14, 15, 3]) for _ in range(3))
    hidden = torch.tensor([0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    wrong = torch.tensor([2, 13, 11, 10, 12, 14, 15, 3])
    right = order_hidden(replace(leak, public=public), wrong, hidden, generator())
    assert right.tolist() == public[0].tolist()
    drawn = order_hidden(leak, wrong, hidden, generator())
    assert torch.equal(drawn[~hidden], wrong[~hidden]) and same_set(drawn, wrong)


@pytest.mark.parametrize("name", SENTENCES)
def test_leaks_of_images_and_of_batches_are_refused(name):
    assert ATTACKS[name] is SENTENCES[name]
    _, leak = observe(victim())
    line = "3 blocks or more" if name == "dager" else "one sentence and one gradient"
    with pytest.raises(UserError, match=line):
        ATTACKS[name](replace(leak, batch_size=2), generator=generator())
    with pytest.raises(UserError, match="reconstructs sentences"):
        ATTACKS[name](replace(leak, image_shape=(3, 8, 8)), generator=generator())


def test_a_bag_of_words_has_no_places_to_tell_apart():
    _, leak = observe(victim(positions="none", unknown=False))
    with pytest.raises(UserError, match="position rows, and this model has none"):
        dager(leak, generator=generator())


def batch(lengths: list[int], ratio: float, name: str, dtype: torch.dtype, seed: int = 0) -> tuple[PrivateBatch, Leak]:
    """Random sentences of these lengths behind one gradient of a model of three blocks."""
    drawn, ids = torch.Generator().manual_seed(seed), torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(5, 60, (length,), generator=drawn)
        row[0], row[length - 1] = 2, 3
    model = victim(name, dtype, embed_dim=96, depth=3)
    private = prepare(model, ids, torch.arange(len(lengths)) % 2, TokenJigsaw(ratio, window=6, seed=seed), 0)
    return private, share(model, private, no_defense, True)


@pytest.mark.parametrize(
    "name, dtype", [("text_small", torch.float32), ("text_small", torch.float64), ("bert", torch.float64)]
)
def test_sentences_of_a_batch_are_put_together(name, dtype):
    private, leak = batch([12, 9], 0.0, name, dtype)
    found = dager(leak, generator=generator())
    assert found.diagnostics["exact"] and found.diagnostics["assembled"] == 2
    assert sorted(found.images.tolist()) == sorted(private.images.tolist())


def test_masked_sentences_of_a_batch_are_put_together_up_to_hidden_order():
    private, leak = batch([10, 8], 0.5, "text_small", torch.float64)
    assert private.mask.shape == (2, 10) and private.mask.any(dim=1).all()
    found = dager(leak, generator=generator())
    assert found.diagnostics["exact_up_to_order"] and not torch.equal(private.mask[0], private.mask[1])
    order = [max((0, 1), key=lambda place: int((found.images[place] == row).sum())) for row in private.model_input]
    for row, mask, place in zip(private.model_input, private.mask, order, strict=True):
        assert torch.equal(found.images[place, ~mask], row[~mask]) and same_set(found.images[place], row)


def test_whoever_does_not_know_mjp_gets_a_mixture_of_sentences():
    _, leak = batch([10, 8], 0.5, "text_small", torch.float64)
    found = dager(replace(leak, attacker_knowledge="none"), generator=generator(), tries=1, sweeps=2)
    assert found.images.shape == (2, 10) and not found.diagnostics["exact_up_to_order"]


def test_a_mixture_of_sentences_is_never_called_exact():
    private, leak = batch([12, 9], 0.0, "text_small", torch.float64)
    found = dager(leak, generator=generator(), tries=1, sweeps=0)
    assert found.diagnostics["assembled"] < 2 and not found.diagnostics["exact_up_to_order"]


def test_batches_with_masks_that_are_told_and_no_tries_are_refused():
    _, leak = batch([12, 9], 0.0, "text_small", torch.float64)
    with pytest.raises(UserError, match="tries must be 1 or more, got 0"):
        dager(leak, generator=generator(), tries=0)
    with pytest.raises(UserError, match="use --attacker_knowledge method"):
        dager(replace(leak, attacker_knowledge="mask"), generator=generator())
