"""Kinds of positions: what each adds to the tokens, what each shares, and that checkpoints keep them."""

import pytest
import torch

from models import build_model
from models.bottleneck import VariationalBottleneck, divergence
from models.checkpoints import load_model, save_checkpoint
from models.jigsaw import shuffle_patches
from models.position import sinusoid_table, tied_places
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def build(**options):
    return build_model("vit", **SMALL, **options).eval()


@pytest.mark.parametrize(
    "positions, shared", [("learned", 17), ("tied", 5), ("sinusoidal", 0), ("none", 0), ("rotary", 0)]
)
def test_what_is_learned(positions, shared):
    model = build(positions=positions)
    names = dict(model.named_parameters())
    assert (names["pos_embed"].shape[1] if "pos_embed" in names else 0) == shared
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_learned_is_the_model_as_it_was():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert build()(images).equal(build(positions="learned")(images))


def test_all_kinds_but_none_see_the_order_of_patches():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))[None]
    for positions in ("learned", "sinusoidal", "tied", "none", "rotary"):
        model = build(positions=positions).double()
        change = (model(images) - model(shuffle_patches(images, order, 8))).abs().max().item()
        assert change < 1e-12 if positions == "none" else change > 1e-6, positions


def test_rotary_sees_distances_alone():
    """Attention logits depend on the difference of two places, and the class token sees every patch alike."""
    attention = build(positions="rotary").blocks[0].attn
    values = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(1, 3, 17, 16)
    turned = attention._rotate(values)[0, 0]
    logits = turned[1:] @ turned[1:].T
    assert logits[0, 5].item() == pytest.approx(logits[10, 15].item(), abs=1e-4)
    assert turned[0].equal(values[0, 0, 0]) and not torch.allclose(logits[0, 1], logits[0, 2], atol=1e-3)


def test_tables():
    assert tied_places((4, 4), 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert tied_places((3, 3), 2).tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 3]
    table = sinusoid_table((4, 4), 48)
    assert table.shape == (16, 48) and len(table.unique(dim=0)) == 16 and table.abs().max() <= 1


def test_patches_of_a_square_share_its_row_and_the_class_token_has_its_own():
    model = build(positions="tied")
    rows, squares = model.token_pos_embed()[0], tied_places((4, 4), 2)
    assert rows[0].equal(model.pos_embed[0, 0])
    for place, square in enumerate(squares.tolist()):
        assert rows[1 + place].equal(model.pos_embed[0, 1 + square])
    assert len(rows.unique(dim=0)) == 1 + len(squares.unique()) == model.pos_embed.shape[1]


@pytest.mark.parametrize("positions", ["none", "rotary", "tied"])
def test_nothing_to_hide(positions):
    with pytest.raises(UserError, match="have no row per patch"):
        build(positions=positions, unknown=True)


@pytest.mark.parametrize(
    "options", [{"positions": "sinusoidal"}, {"positions": "tied"}, {"positions": "rotary"}, {"bottleneck": 6}]
)
def test_checkpoints_keep_the_kind(tmp_path, options):
    model, images = build(**options), torch.rand(2, 3, 32, 32)
    save_checkpoint(tmp_path / "model.pt", {"arguments": model.arguments, "model": model.state_dict()})
    assert load_model(tmp_path / "model.pt")(images).equal(model(images))


def test_divergence_is_zero_for_the_standard_normal_and_in_bits():
    assert divergence(torch.zeros(2, 3), torch.ones(2, 3)).item() == 0
    normal, standard = torch.distributions.Normal(0.5, 2.0), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).item() * 3 / torch.log(torch.tensor(2.0)).item()
    assert divergence(torch.full((2, 3), 0.5), torch.full((2, 3), 2.0)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["vit", "lenet", "convnet"])
def test_bottleneck_draws_in_training_and_when_seeded(name):
    options = {key: SMALL[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")} if name == "vit" else {}
    model = build_model(name, num_classes=5, image_size=32, bottleneck=6, **options).eval()
    images = torch.rand(2, 3, 32, 32)
    layer = next(layer for layer in model.modules() if isinstance(layer, VariationalBottleneck))
    plain = model(images)
    assert plain.equal(model(images))
    layer.noise_seed = 3
    seeded = model(images)
    assert seeded.equal(model(images)) and not seeded.equal(plain)


def test_a_training_pass_keeps_the_divergence_that_its_loss_adds():
    layer = VariationalBottleneck(6, 4)
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    layer.eval()(features)
    assert layer.kl is None
    layer.train()(features)
    mean, raw = layer.encode(features).chunk(2, dim=-1)
    assert layer.kl.equal(divergence(mean, torch.nn.functional.softplus(raw))) and layer.kl.requires_grad
