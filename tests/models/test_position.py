"""models/position.py and what it makes of ViT and Swin: hidden positions change nothing else and give nothing away."""

import math

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.jigsaw import shuffle_patches
from models.position import (
    given_mask,
    grid_coordinates,
    hide_positions,
    pos_embed_similarity,
    resize_pos_embed,
    sinusoid_table,
)

SIZES = {
    "vit": {"image_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin_tiny": {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
}


def build(name: str = "vit", **options) -> nn.Module:
    """A small float64 model whose position embeddings matter as much as the patches."""
    return build_model(name, num_classes=5, pos_embed_std=1.0, **SIZES[name], **options).double().eval()


def batch(model: nn.Module, number: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = model.grid[0] * model.patch_size
    images = torch.randn(number, 3, side, side, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (number,), generator=generator)


def random_mask(model: nn.Module, share: float, rows: int = 1) -> Tensor:
    number = model.grid[0] * model.grid[1]
    order = torch.rand(rows, number, generator=torch.Generator().manual_seed(2)).argsort(1)
    return order < int(share * number)


def step(model: nn.Module, images: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every gradient; a parameter that is not used has gradient zero."""
    logits = model(images, mask)
    loss = nn.functional.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return logits.detach(), dict(zip(dict(model.named_parameters()), gradients, strict=True))


def largest_change(one: tuple[Tensor, dict], other: tuple[Tensor, dict]) -> tuple[float, float]:
    """Largest absolute change of the logits and of any gradient."""
    gradients = [(one[1][name] - other[1][name]).abs().max() for name in one[1]]
    return float((one[0] - other[0]).abs().max()), float(torch.stack(gradients).max())


@pytest.mark.parametrize("name", SIZES)
def test_no_mask_equals_an_all_false_mask_bit_for_bit(name):
    model = build(name, unknown=True)
    images, labels = batch(model)
    plain = step(model, images, labels, None)
    masked = step(model, images, labels, random_mask(model, 0))
    assert masked[0].equal(plain[0])
    for parameter in plain[1]:
        assert masked[1][parameter].equal(plain[1][parameter]), parameter
    assert plain[1]["pos_embed"].any()


@pytest.mark.parametrize("name", SIZES)
def test_masked_rows_get_no_gradient_and_the_unknown_row_their_sum(name):
    model = build(name, unknown=True)
    images, labels = batch(model)
    mask = random_mask(model, 0.4)
    hidden = nn.functional.pad(mask, (model.pos_embed.shape[1] - mask.shape[1], 0))[0]
    logits, gradients = step(model, images, labels, mask)
    with torch.no_grad():
        model.pos_embed[:, hidden] = model.unknown_pos_embed
    same_logits, separate = step(model, images, labels, None)
    rows = separate["pos_embed"][0]
    assert same_logits.equal(logits)
    assert not gradients["pos_embed"][0, hidden].any()
    torch.testing.assert_close(gradients["pos_embed"][0, ~hidden], rows[~hidden], rtol=0, atol=1e-14)
    torch.testing.assert_close(gradients["unknown_pos_embed"][0, 0], rows[hidden].sum(0), rtol=0, atol=1e-14)
    assert rows[hidden].abs().sum(1).min() > 1e-6


@pytest.mark.parametrize("name", SIZES)
def test_a_mask_per_image_equals_masking_the_images_one_by_one(name):
    model = build(name, unknown=True)
    images, _ = batch(model, 3)
    masks = random_mask(model, 0.4, rows=3)
    together = model(images, masks)
    for place in range(3):
        one = slice(place, place + 1)
        torch.testing.assert_close(together[one], model(images[one], masks[one]), rtol=0, atol=1e-12)
    assert (together[1:] - model(images, masks[:1])[1:]).abs().max() > 1e-6


def test_the_class_token_is_never_hidden():
    pos_embed, unknown = torch.randn(1, 10, 4), torch.randn(1, 1, 4)
    hidden = hide_positions(pos_embed, unknown, torch.ones(1, 9, dtype=torch.bool), 1)
    assert hidden[0, 0].equal(pos_embed[0, 0])
    assert hidden[0, 1:].equal(unknown[0].expand(9, -1))
    model = build(unknown=True)
    _, gradients = step(model, *batch(model), torch.ones(1, 36, dtype=torch.bool))
    assert gradients["pos_embed"][0, 0].any()
    assert not gradients["pos_embed"][0, 1:].any()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    ("dtype", "more"), [(torch.int64, 0), (torch.float64, 0), (torch.bool, 1), (torch.bool, -1), (torch.bool, -2)]
)
def test_masks_of_wrong_type_or_width_are_refused(name, dtype, more):
    model = build(name, unknown=True)
    mask = torch.zeros(1, model.grid[0] * model.grid[1] + more, dtype=dtype)
    with pytest.raises(ValueError, match="mask must be bool with"):
        model(batch(model)[0], mask)


@pytest.mark.parametrize("name", SIZES)
def test_a_mask_needs_an_unknown_position_embedding(name):
    model = build(name)
    assert not model.hides_positions
    with pytest.raises(ValueError, match="unknown"):
        model(batch(model)[0], random_mask(model, 0.5))


def derangement(mask: Tensor) -> Tensor:
    """Every masked patch moves to the place of the next one."""
    source, places = torch.arange(mask.shape[1]), mask[0].nonzero()[:, 0]
    source[places] = places.roll(1)
    return source[None]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_under_the_shared_row_the_order_of_the_masked_patches_leaves_no_trace(ratio):
    model = build(unknown=True, localization="nonlinear")
    images, labels = batch(model)
    mask = random_mask(model, ratio)
    assert mask.sum() >= 3
    shuffled = shuffle_patches(images, derangement(mask), model.patch_size)
    assert not shuffled.equal(images)
    logits, gradients = largest_change(step(model, images, labels, mask), step(model, shuffled, labels, mask))
    assert logits <= 1e-12
    assert gradients <= 1e-12


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("options", [{}, {"unknown": True, "index_embed": True}], ids=["naive shuffle", "index embed"])
def test_with_positions_kept_the_order_shows(ratio, options):
    model = build(**options)
    if model.index_embed is not None:
        nn.init.normal_(model.index_embed, generator=torch.Generator().manual_seed(3))
    images, labels = batch(model)
    mask = random_mask(model, ratio)
    shuffled = shuffle_patches(images, derangement(mask), model.patch_size)
    mask = given_mask(model, mask)
    logits, gradients = largest_change(step(model, images, labels, mask), step(model, shuffled, labels, mask))
    assert logits > 1e-6
    assert gradients > 1e-6


def test_resizing_to_the_same_grid_changes_nothing():
    pos_embed = torch.randn(1, 1 + 36, 8)
    assert resize_pos_embed(pos_embed, (6, 6), (6, 6), 1).equal(pos_embed)
    assert resize_pos_embed(pos_embed, (6, 6), None, 1).equal(pos_embed)
    oblong = torch.randn(1, 1 + 24, 8)
    torch.testing.assert_close(resize_pos_embed(oblong, (4, 6), (4, 6), 1), oblong, rtol=0, atol=1e-5)


@pytest.mark.parametrize("new_grid", [(9, 9), (3, 3), (4, 9)])
def test_resizing_keeps_prefix_rows_and_constants(new_grid):
    pos_embed = torch.randn(1, 2 + 36, 8)
    pos_embed[:, 2:] = torch.arange(8.0)
    resized = resize_pos_embed(pos_embed, new_grid, None, 2)
    assert resized.shape == (1, 2 + new_grid[0] * new_grid[1], 8)
    assert resized[:, :2].equal(pos_embed[:, :2])
    torch.testing.assert_close(resized[:, 2:], torch.arange(8.0).expand(1, new_grid[0] * new_grid[1], -1))


def test_resizing_keeps_rows_and_columns_apart():
    """A table that counts rows in one dimension and columns in the other does so afterwards, away from the borders."""
    pos_embed = grid_coordinates((8, 8))[None]
    resized = resize_pos_embed(pos_embed, (16, 16), None, 0).view(16, 16, 2)
    expected = (grid_coordinates((16, 16)).view(16, 16, 2) + 0.5) / 2 - 0.5
    torch.testing.assert_close(resized[4:-4, 4:-4], expected[4:-4, 4:-4], rtol=0, atol=1e-5)


def test_coordinates_are_rows_and_columns_in_row_major_order():
    expected = [[row, column] for row in range(2) for column in range(3)]
    assert grid_coordinates((2, 3)).tolist() == expected


def test_similarity_is_the_cosine_of_every_pair():
    rows = torch.tensor([[1.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])
    half = 0.5**0.5
    expected = torch.tensor([[1, half, -1], [half, 1, -half], [-1, -half, 1]])
    torch.testing.assert_close(pos_embed_similarity(rows), expected)


def test_sinusoids_run_from_a_rate_of_one_to_a_ten_thousandth():
    """Sines, then cosines, of row / 10000^(4 k / D), k below D / 4, and the same of the column (MoCo v3, MAE)."""
    table = sinusoid_table((3, 5), 16)
    for place, (row, column) in enumerate((row, column) for row in range(3) for column in range(5)):
        expected = []
        for coordinate in (row, column):
            angles = [coordinate / 10000 ** (4 * k / 16) for k in range(4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert table[place].tolist() == pytest.approx(expected, abs=1e-6)
