"""models/localization.py: the loss against plain loops, what it may depend on, and its extremes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import build_model
from models.localization import LOCALIZATION_HEADS, Localization
from models.task import Task
from utils.errors import UserError

GRID, NUMBER, DIM = (4, 6), 24, 40
PCA = ["pca", "pca_official"]


def table(seed: int = 0, number: int = NUMBER, dim: int = DIM) -> Tensor:
    """Position embeddings with a clear two-dimensional structure, so that their main directions are well defined."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(number, dtype=torch.float64)
    directions = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(number, dim, generator=generator, dtype=torch.float64)
    coordinates = torch.stack([3 * (place // GRID[1]), place % GRID[1]], 1) - 2
    return coordinates @ directions + 0.1 * noise


def head(kind: str, **options) -> Localization:
    """A float64 head whose learned layers are far from zero."""
    torch.manual_seed(0)
    localization = Localization(kind, DIM, GRID, **options).double()
    for parameter in localization.parameters():
        nn.init.normal_(parameter, std=0.2)
    return localization


def mask_of(*hidden: int) -> Tensor:
    mask = torch.zeros(1, NUMBER, dtype=torch.bool)
    mask[0, list(hidden)] = True
    return mask


def plain_loop(predicted: dict[int, Tensor], scale: tuple[float, float] = (1, 1)) -> float:
    """Mean absolute error over the predicted patches and both coordinates."""
    errors = [
        abs(xy[axis].item() - divmod(patch, GRID[1])[axis] * scale[axis])
        for patch, xy in predicted.items()
        for axis in (0, 1)
    ]
    return sum(errors) / len(errors)


def principal_scores(rows: Tensor, visible: list[int], centred: bool) -> np.ndarray:
    """The visible rows on the first two principal axes of the visible rows, in NumPy."""
    chosen = rows[visible].numpy()
    middle = chosen.mean(0)
    _, _, axes = np.linalg.svd(chosen - middle, full_matrices=False)
    return (chosen - middle if centred else chosen) @ axes[:2].T


@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_every_kind_builds_in_a_model(kind):
    model = build_model("vit", image_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, localization=kind)
    loss = model.localization(model.patch_pos_embed(), torch.zeros(1, 16, dtype=torch.bool))
    assert loss.shape == ()
    assert 0 < loss < 5
    loss.backward()
    assert model.pos_embed.grad[0, 1:].any()
    assert not model.pos_embed.grad[0, 0].any()


def test_an_unknown_kind_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="unknown localization head 'liner': did you mean 'linear'"):
        Localization("liner", DIM, GRID)


@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_the_loss_does_not_depend_on_the_images(kind):
    options = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
    task = Task(build_model("vit", unknown=True, localization=kind, **options))
    mask = torch.arange(16)[None] < 5
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits, loss, _ = task(images, mask)
    other_logits, other_loss, _ = task(torch.randn(2, 3, 16, 16), mask)
    assert loss.equal(other_loss)
    assert not logits.equal(other_logits)
    assert torch.autograd.grad(loss, images, allow_unused=True) == (None,)


@pytest.mark.parametrize("hidden", [(), (0, 3, 7, 8, 20), tuple(range(1, NUMBER))])
@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_learned_heads_equal_a_plain_loop(kind, hidden):
    localization, rows = head(kind), table()
    visible = [patch for patch in range(NUMBER) if patch not in hidden]
    weights = [(layer.weight, layer.bias) for layer in localization.modules() if isinstance(layer, nn.Linear)]
    predicted = {}
    for patch in visible:
        value = rows[patch]
        for number, (weight, bias) in enumerate(weights):
            value = weight @ (value.clamp(min=0) if number else value) + bias
        predicted[patch] = value.detach()
    assert len(weights) == (2 if kind == "nonlinear" else 1)
    assert localization(rows, mask_of(*hidden)).item() == pytest.approx(plain_loop(predicted), rel=1e-12)


@pytest.mark.parametrize("hidden", [(), (0, 3, 7, 8, 20), tuple(range(10))])
def test_pca_equals_a_plain_loop(hidden):
    rows = table()
    visible = [patch for patch in range(NUMBER) if patch not in hidden]
    target = np.array([divmod(patch, GRID[1]) for patch in visible], dtype=float)
    scores, middle = principal_scores(rows, visible, centred=True), target.mean(0)
    signs = np.sign((scores * (target - middle)).sum(0))
    predicted = dict(zip(visible, torch.tensor(scores * signs + middle), strict=True))
    assert head("pca")(rows, mask_of(*hidden)).item() == pytest.approx(plain_loop(predicted), rel=1e-9)


@pytest.mark.parametrize("hidden", [(), (0, 3, 7, 8, 20), tuple(range(10))])
def test_official_pca_equals_a_plain_loop_for_one_choice_of_signs(hidden):
    rows = table()
    visible = [patch for patch in range(NUMBER) if patch not in hidden]
    scores = principal_scores(rows, visible, centred=False)
    choices = [
        plain_loop(dict(zip(visible, torch.tensor(scores * [down, right]), strict=True)))
        for down in (1, -1)
        for right in (1, -1)
    ]
    loss = head("pca_official")(rows, mask_of(*hidden)).item()
    assert min(abs(loss - choice) for choice in choices) < 1e-9
    assert max(choices) - min(choices) > 0.1


@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_unit_targets_end_at_one(kind):
    localization = head(kind, unit_targets=True)
    assert localization.target.amin(0).tolist() == [0, 0]
    assert localization.target.amax(0).tolist() == [1, 1]
    line = Localization(kind, DIM, (1, 6), unit_targets=True)
    torch.testing.assert_close(line.target[:, 0], torch.zeros(6))
    torch.testing.assert_close(line.target[:, 1], torch.arange(6) / 5)


def test_unit_targets_divide_the_loss_when_the_predictions_shrink_alike():
    whole, unit = head("linear"), head("linear", unit_targets=True)
    scale = torch.tensor([3.0, 5.0], dtype=torch.float64)
    with torch.no_grad():
        unit.layers.weight.copy_(whole.layers.weight / scale[:, None])
        unit.layers.bias.copy_(whole.layers.bias / scale)
    rows, mask = table(), mask_of(2, 5, 11)
    visible = (~mask[0]).nonzero()[:, 0].tolist()
    predicted = {patch: whole.layers(rows[patch]).detach() / scale for patch in visible}
    expected = plain_loop(predicted, scale=(1 / 3, 1 / 5))
    assert unit(rows, mask).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_hidden_rows_do_not_matter(kind):
    localization, rows, mask = head(kind), table().requires_grad_(), mask_of(1, 2, 9, 23)
    loss = localization(rows, mask)
    loss.backward()
    assert not rows.grad[mask[0]].any()
    assert rows.grad[~mask[0]].any(1).all()
    changed = rows.detach().clone()
    changed[mask[0]] += 5
    assert localization(changed, mask).item() == pytest.approx(loss.item(), rel=1e-12)
    changed[0] += 5
    assert abs(localization(changed, mask).item() - loss.item()) > 1e-3


@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_with_everything_hidden_the_loss_is_zero_and_harmless(kind):
    localization, rows = head(kind), table().requires_grad_()
    loss = localization(rows, torch.ones(1, NUMBER, dtype=torch.bool))
    assert loss.item() == 0
    loss.backward()
    for gradient in (rows.grad, *(parameter.grad for parameter in localization.parameters())):
        assert not gradient.any()  # NaN counts as true


@pytest.mark.parametrize("dim", [8, 40])
@pytest.mark.parametrize("visible", [1, 2, 3, 12, 24])
@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_with_few_patches_visible_loss_and_gradients_are_finite(kind, visible, dim):
    torch.manual_seed(0)
    localization, rows = Localization(kind, dim, GRID), table(dim=dim).float().requires_grad_()
    loss = localization(rows, torch.arange(NUMBER)[None] >= visible)
    loss.backward()
    assert loss.isfinite()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("hidden", [(0, 3, 7), tuple(range(14))])
@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_gradients_equal_finite_differences(kind, hidden):
    localization, mask = head(kind), mask_of(*hidden)
    assert torch.autograd.gradcheck(lambda rows: localization(rows, mask), table().requires_grad_())


def test_pca_ignores_the_signs_and_the_centre_of_the_table():
    localization, rows, mask = head("pca"), table(), mask_of(0, 5, 6)
    loss = localization(rows, mask).item()
    offset = torch.linspace(-3, 3, DIM, dtype=torch.float64)
    assert localization(-rows, mask).item() == pytest.approx(loss, abs=1e-6)
    assert localization(rows + offset, mask).item() == pytest.approx(loss, abs=1e-6)
    assert abs(localization(2 * rows, mask).item() - loss) > 1e-2
    assert abs(head("pca_official")(rows + offset, mask).item() - head("pca_official")(rows, mask).item()) > 1e-2


@pytest.mark.parametrize("kind", ["linear", "nonlinear", "pca"])
def test_with_a_mask_per_image_the_mean_runs_over_all_visible_patches(kind):
    localization, rows = head(kind), table()
    masks = torch.cat([mask_of(*range(12)), mask_of(3), mask_of()])
    losses = torch.stack([localization(rows, mask[None]) for mask in masks])
    visible = (~masks).sum(1)
    expected = (losses * visible).sum() / visible.sum()
    assert abs(expected - losses.mean()) > 1e-4
    assert localization(rows, masks).item() == pytest.approx(expected.item(), rel=1e-9)
