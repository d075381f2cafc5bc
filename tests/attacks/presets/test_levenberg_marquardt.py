"""Second-order matching: a linear problem, a gain behind a real start, batches from grey, and what is refused."""

from dataclasses import replace

import pytest
import torch

from attacks.linear.closed_form import closed_form
from attacks.presets import levenberg_marquardt as module
from attacks.presets.levenberg_marquardt import levenberg_marquardt, polish, roughness
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import Leak
from attacks.threat_model.local_step import LocalSteps
from defenses import build_defense, no_defense
from models import build_model
from models.jigsaw import Jigsaw
from tests.attacks.small_victims import MEAN, STD, generator
from utils.errors import UserError

TOLD = {"defense": "noise", "defense_options": {"std": 1e-6}, "base": "closed_form"}


def victim(**options) -> torch.nn.Module:
    shape = {"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 1}
    return build_model("vit", num_classes=4, **shape | options).eval().double()


def observe(model: torch.nn.Module, defense: str = "noise", **strength) -> tuple[Leak, torch.Tensor]:
    side = model.arguments["image_size"]
    images = torch.rand(1, 3, side, side, generator=generator(1), dtype=torch.float64)
    private = prepare(model, images, torch.tensor([1]), Jigsaw(model.grid, 0.0), 0)
    known, drawn = build_defense(defense, strength or {"std": 1e-6}), generator(2)
    leak = share(model, private, lambda gradients, step: known.gradients(gradients, step, generator=drawn), True)
    return replace(leak, mean=MEAN, std=STD), images


@pytest.mark.parametrize(("held", "rows"), [(module.HELD, module.ROWS), (module.HELD, 5), (0, 5)])
def test_a_linear_problem_is_solved(monkeypatch, held, rows):
    monkeypatch.setattr(module, "HELD", held)
    monkeypatch.setattr(module, "ROWS", rows)
    draw = {"generator": generator(), "dtype": torch.float64}
    matrix, shared = torch.randn(30, 12, **draw), torch.randn(30, **draw)
    weights, start = torch.rand(30, **draw) + 0.1, torch.randn(3, 2, 2, **draw)
    prior = roughness(start.shape, torch.ones(3, 1, 1))
    found, costs = polish(lambda image: matrix @ image.flatten(), shared, weights, start, prior, 12, 1e-3)
    expected = torch.linalg.solve(matrix.T @ (weights[:, None] * matrix) + prior, matrix.T @ (weights * shared))
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-4)
    assert all(after < before for before, after in zip(costs, costs[1:], strict=False))


def test_roughness_is_the_squared_difference_of_neighbours():
    image, std = torch.rand(3, 4, 5, generator=generator(), dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4])
    pixels = image * std.view(3, 1, 1)
    expected = pixels.diff(dim=1).square().sum() + pixels.diff(dim=2).square().sum()
    prior = roughness(image.shape, std.view(3, 1, 1))
    torch.testing.assert_close(image.flatten() @ prior @ image.flatten(), expected)


@pytest.mark.parametrize("labels", [True, False])
def test_behind_the_closed_form_the_picture_comes_nearer(labels):
    leak, images = observe(victim())
    leak = leak if labels else replace(leak, labels=None)
    start = closed_form(leak, generator=generator()).images
    found = levenberg_marquardt(leak, generator=generator(), steps=4, **TOLD)
    before, after = ((one - images).square().mean() for one in (start, found.images))
    assert after < before / 2 and before < 0.01
    assert found.diagnostics["objective"] < found.diagnostics["start"] and not found.diagnostics["exact"]
    same = levenberg_marquardt(leak, generator=generator(), steps=0, **TOLD)
    low, high = ((value - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1) for value in (0, 1))
    torch.testing.assert_close(same.images, torch.clamp(start, low, high), rtol=1e-6, atol=1e-6)


def test_eight_bits_are_read_by_their_spacing():
    leak, images = observe(victim(), "quantize", bits=12)
    told = {"defense": "quantize", "defense_options": {"bits": 12}, "base": "closed_form"}
    start, found = (levenberg_marquardt(leak, generator=generator(), steps=number, **told) for number in (0, 4))
    assert (found.images - images).square().mean() < (start.images - images).square().mean() / 2


def test_what_pruning_kept_is_exact_and_what_it_dropped_is_small():
    leak, images = observe(victim(), "prune", ratio=0.1)
    told = {"defense": "prune", "defense_options": {"ratio": 0.1}, "base": "closed_form"}
    start, found = (levenberg_marquardt(leak, generator=generator(), steps=number, **told) for number in (0, 20))
    assert (start.images - images).abs().max() > 1e-3
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-9)
    assert found.diagnostics["objective"] < 1


def test_from_grey_a_whole_batch_comes_back():
    model = build_model("lenet", image_size=8, num_classes=10, seed=0).eval().double()
    images = torch.rand(2, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    private = prepare(model, images, torch.tensor([3, 7]), Jigsaw(model.grid, 0.0), 0)
    leak = share(model, private, no_defense, reveal_labels=False)
    found = levenberg_marquardt(leak, generator=generator(), base="flat", steps=15)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-6)
    assert found.labels.tolist() == [3, 7]
    assert found.diagnostics["objective"] < 1 < found.diagnostics["start"] and not found.diagnostics["exact"]


def test_from_grey_rounding_is_all_that_is_left_of_single_precision():
    model = build_model("lenet", image_size=8, num_classes=10, seed=0).eval()
    images = torch.rand(1, 3, 8, 8, generator=generator(1))
    private = prepare(model, images, torch.tensor([4]), Jigsaw(model.grid, 0.0), 0)
    found = levenberg_marquardt(share(model, private, no_defense, True), generator=generator(), base="flat", steps=15)
    assert (found.images - images).abs().max() < 1e-4 and found.diagnostics["objective"] < 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"defense": "dp_sgd"}, "a defence whose errors have a spread.*got 'dp_sgd'"),
        ({"defense": "quantize", "defense_options": {"bits": 1}}, "of 2 bits and more"),
        ({"defense": "none"}, "base 'closed_form' must know a defence.*got 'none'"),
        ({"base": "flat", "defense": "dp_sgd"}, "noise, laplace, quantize, prune, none .*got 'dp_sgd'"),
        ({"base": "dlg"}, "base attack 'dlg'"),
        ({"smoothness": 0.0}, "smoothness above 0"),
        ({"labels": "joint"}, "label rule 'joint'"),
    ],
)
def test_wrong_options_are_one_line(options, match):
    leak, _ = observe(victim())
    with pytest.raises(UserError, match=match):
        levenberg_marquardt(leak, generator=generator(), **TOLD | options)


def test_leaks_without_equations_are_refused():
    leak, _ = observe(victim())
    large, _ = observe(victim(image_size=80, patch_size=40))
    two = replace(leak, batch_size=2)
    for wrong, match in (
        (large, "at most 12288: this has 19200"),
        (replace(leak, training=True), "training mode"),
        (two, "sum over 2 images"),
    ):
        with pytest.raises(UserError, match=match):
            levenberg_marquardt(wrong, generator=generator(), **TOLD)
    update = replace(leak, local=LocalSteps(steps=2, lr=0.1, batch_size=1))
    with pytest.raises(UserError, match="repeats one step of the client, and this leak is of 2"):
        levenberg_marquardt(update, generator=generator(), **TOLD | {"base": "flat"})
