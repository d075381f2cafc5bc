"""models/text.py: padding, masks, embeddings in place of ids, and parity with HuggingFace's BERT."""

import copy

import pytest
import torch
from torch import nn

from models import build_model
from models.checkpoints import FINE_TUNED, load_model, load_weights, read_checkpoint, weights_of
from models.huggingface_weights import from_huggingface
from models.localization import Localization
from utils.errors import UserError

SIZE = {"vocab_size": 40, "max_length": 12, "num_classes": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}
IDS = torch.tensor([[2, 5, 6, 7, 8, 9, 3, 0, 0], [2, 9, 9, 4, 6, 10, 11, 12, 3]])
MASK = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 0, 0]], dtype=torch.bool)


def small(name="text_small", **options) -> nn.Module:
    return build_model(name, **SIZE | {"unknown": True} | options).eval().double()


@pytest.mark.parametrize("name", ["text_small", "bert"])
def test_padding_changes_nothing(name):
    model = small(name)
    alone = model(IDS[:1, :7], MASK[:1, :7])
    torch.testing.assert_close(model(IDS, MASK)[:1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["text_small", "bert"])
def test_embeddings_stand_for_ids(name):
    model, ids = small(name), IDS[1:]
    assert torch.equal(model(model.token_embed(ids), MASK[1:]), model(ids, MASK[1:]))


def test_no_mask_and_an_empty_mask_are_the_same_bits():
    model = small()
    assert torch.equal(model(IDS), model(IDS, torch.zeros_like(MASK)))


def test_hidden_tokens_are_a_set():
    """Permuting hidden tokens changes neither the logits nor any gradient, and their position rows get none."""
    model = small()
    swapped = IDS.clone()
    swapped[1, [2, 3, 6]] = IDS[1, [3, 6, 2]]
    gradients = []
    for ids in (IDS, swapped):
        model.zero_grad()
        nn.functional.cross_entropy(model(ids[1:], MASK[1:]), torch.tensor([1])).backward()
        gradients.append([value.grad.clone() for value in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    rows = model.pos_embed.grad[0, :9]
    assert torch.equal(rows.eq(0).all(1), MASK[1])


def test_sentences_longer_than_the_table_are_refused():
    with pytest.raises(ValueError, match="13 tokens is longer than the 12 position rows"):
        small()(torch.ones(1, 13, dtype=torch.int64))


def test_positions_none_is_a_bag_of_words():
    model = small(positions="none", unknown=False)
    torch.testing.assert_close(model(IDS[1:, [0, *range(7, 0, -1), 8]]), model(IDS[1:]), rtol=0, atol=1e-12)


def test_unseen_places_are_masked_padding_or_beyond():
    expected = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1]]).bool()
    assert torch.equal(small().unseen(IDS, MASK), expected)


def test_checkpointing_changes_no_gradient():
    model, found = small(dropout=0.0).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IDS, MASK).square().sum().backward()
        found.append(model.token_embed.weight.grad.clone())
    assert torch.equal(*found)


def test_relative_localization_compares_pairs_within_windows():
    head = Localization("relative", 8, (7,), window=3).double()
    rows = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    errors = [
        (head.layers(rows[i] - rows[j]) - (i - j)).abs().item()
        for away in mask.tolist()
        for i in range(7)
        for j in range(7)
        if i != j and i // 3 == j // 3 and not away[i] and not away[j]
    ]
    assert head(rows, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def huggingface_bert(dim: int, heads: int) -> nn.Module:
    """HuggingFace's classifier with random weights, all of them: its own start has biases and LayerNorms at 0 and 1."""
    from transformers import BertConfig, BertForSequenceClassification  # 3 s, which most tests here do without

    shape = BertConfig(
        vocab_size=40, hidden_size=dim, num_hidden_layers=2, num_attention_heads=heads, intermediate_size=96,
        max_position_embeddings=20, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(shape).eval()
        for name, value in model.named_parameters():
            scale = 0.3 if value.dim() == 1 or "embeddings" in name else 2 / dim**0.5
            nn.init.normal_(value, mean=float("LayerNorm.weight" in name), std=scale)
    return model


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return huggingface_bert(128, 2)


def test_huggingface_weights_give_its_numbers(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with torch.inference_mode():
        theirs = bert(IDS, attention_mask=(IDS != 0).long()).logits
        hidden = bert.bert(IDS, attention_mask=(IDS != 0).long()).last_hidden_state
        torch.testing.assert_close(model(IDS), theirs, rtol=0, atol=1e-5)
        ours = model.forward_features(IDS)
    for row, length in enumerate((IDS != 0).sum(1).tolist()):
        torch.testing.assert_close(ours[row, :length], hidden[row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dim", "heads"), [(128, 2), (384, 12), (96, 1)])  # 64 per head; 32 as in MiniLM; 96
def test_the_encoder_is_huggingfaces_for_any_number_of_heads(dim, heads):
    theirs = huggingface_bert(dim, heads).double()
    ours = build_model("bert", **SIZE | {"max_length": 20, "embed_dim": dim, "num_heads": heads, "mlp_ratio": 96 / dim})
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    ours, attends = ours.double().eval(), (IDS != 0).long()
    with torch.inference_mode():
        wanted = theirs(IDS, attention_mask=attends, output_hidden_states=True)
        torch.testing.assert_close(ours(IDS), wanted.logits, rtol=0, atol=1e-10)
        found = ours.forward_features(IDS)
    real = IDS != 0  # what stands at padding is nobody's business
    torch.testing.assert_close(found[real], wanted.hidden_states[-1][real], rtol=0, atol=1e-10)
    assert wanted.logits.std() > 0.1


def test_gradients_of_a_bert_are_huggingfaces(bert):
    ours = build_model("bert", **SIZE | {"max_length": 20, "embed_dim": 128, "mlp_ratio": 0.75}).double().eval()
    theirs = copy.deepcopy(bert).double()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    labels = torch.tensor([2, 0])
    nn.functional.cross_entropy(ours(IDS), labels).backward()
    nn.functional.cross_entropy(theirs(IDS, attention_mask=(IDS != 0).long()).logits, labels).backward()
    wanted = from_huggingface({name: value.grad for name, value in theirs.named_parameters()})
    for name, value in ours.named_parameters():
        torch.testing.assert_close(
            value.grad, wanted[name], rtol=1e-6, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_training_starts_from_a_bert_without_a_classifier(bert, tmp_path):
    bert.bert.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="BERT without a classifier"):
        load_model(tmp_path)
    size = SIZE | {"embed_dim": 128, "mlp_ratio": 0.75}  # 12 of its 20 position rows
    model = build_model("bert", **size, unknown=True)
    new = load_weights(model, weights_of(read_checkpoint(tmp_path), tmp_path), tmp_path, FINE_TUNED)
    assert {name.split(".")[0] for name in new} == {"head", "unknown_pos_embed"}
    assert torch.equal(model.pos_embed[0], bert.bert.embeddings.position_embeddings.weight[:12])


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"without model\.safetensors or pytorch_model\.bin"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name, eps", [("text_small", 1e-5), ("bert", 1e-12)])
def test_norms_have_the_eps_of_torch_or_of_bert(name, eps):
    norms = [module for module in small(name).modules() if isinstance(module, nn.LayerNorm)]
    assert norms and {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize("name", ["text_small", "bert"])
def test_a_tenth_is_dropped_in_training_as_in_bert(name):
    rates = [module.p for module in small(name).modules() if isinstance(module, nn.Dropout)]
    assert rates and set(rates) == {0.1}
