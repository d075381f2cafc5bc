"""Without a position in the tokens, the first block gives every patch away, and rotary attention its place as well."""

import pytest
import torch
from torch import Tensor

from attacks.linear.first_block import first_block
from attacks.linear.row_spaces import affine_hull
from attacks.linear.token_equations import TokenEquations
from attacks.solvers.levenberg_marquardt import levenberg_marquardt
from attacks.threat_model.client import prepare, share
from models.jigsaw import Jigsaw, patchify, unpatchify
from tests.attacks.small_victims import MEAN, STD, UNDEFENDED, client, generator, vit
from utils.errors import UserError

SMALL = {"image_size": 24, "embed_dim": 36, "num_heads": 3}  # nine patches
FEW = {"starts": 64, "rounds": 12}


def rosenbrock(point: Tensor, given: Tensor) -> Tensor:
    return torch.stack([10 * (point[1] - point[0] ** 2), given[0] - point[0]])


def test_least_squares_solves_every_problem_for_itself():
    start = torch.randn(7, 2, generator=generator(), dtype=torch.float64)
    given = torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]
    found, misfit = levenberg_marquardt(rosenbrock, start, given, 200)
    assert torch.allclose(found, torch.cat([given, given**2], dim=1)) and misfit.max() < 1e-20
    alone, _ = levenberg_marquardt(rosenbrock, start[3:4], given[3:4], 200)
    assert torch.allclose(alone, found[3:4])
    few, misfit = levenberg_marquardt(rosenbrock, start, given, 3)
    before = torch.stack([rosenbrock(*pair).square().sum() for pair in zip(start, given, strict=True)])
    assert (misfit <= before).all() and not torch.allclose(few, found)


def test_the_affine_hull_is_that_of_the_points():
    points = torch.randn(4, 9, generator=generator(), dtype=torch.float64)
    matrix = torch.randn(6, 4, generator=generator(1), dtype=torch.float64) @ torch.nn.functional.pad(
        points, (0, 1), value=1
    )
    point, basis = affine_hull(torch.linalg.svd(matrix, full_matrices=False).Vh[:4])
    assert basis.shape == (3, 9) and torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    assert torch.allclose(point + (points - point) @ basis.T @ basis, points)


@pytest.mark.parametrize("positions, ordered", [("rotary", True), ("sinusoidal", True), ("none", False)])
def test_no_kind_of_position_hides_a_patch(positions, ordered):
    private, leak = client(vit(positions=positions, **SMALL))
    found = first_block(leak, generator=generator(), **FEW)
    patches, true = patchify(found.images, 8)[0], patchify(private.model_input, 8)[0]
    assert found.diagnostics["found"] == 9 and found.diagnostics["exact_up_to_order"]
    assert found.diagnostics["exact"] == ordered
    if ordered:
        assert torch.allclose(patches, true, atol=1e-5)
    else:
        nearest = torch.cdist(true, patches)
        assert nearest.min(dim=1).values.max() < 1e-5 and len(nearest.argmin(dim=1).unique()) == 9


def test_a_masked_step_of_mjp_gives_its_hidden_patches_away_too():
    model = vit(unknown=True, **SMALL)
    with torch.no_grad():
        model.unknown_pos_embed.add_(0.05)
    private, leak = client(model, ratio=0.34)
    assert private.mask.sum() == 3
    found = first_block(leak, generator=generator(), **FEW)
    patches, true = patchify(found.images, 8)[0], patchify(private.model_input, 8)[0]
    visible = ~private.mask[0]
    assert found.diagnostics["found"] == 9 and found.diagnostics["exact_up_to_order"]
    assert not found.diagnostics["exact"]  # the order is in no gradient
    assert torch.allclose(patches[visible], true[visible], atol=1e-5)
    assert torch.cdist(true[~visible], patches[~visible]).min(dim=1).values.max() < 1e-5


def test_single_precision_is_solved_as_far_as_its_rounding_explains():
    private, leak = client(vit(positions="rotary", **SMALL).float())
    found = first_block(leak, generator=generator(), **FEW)
    assert found.diagnostics["found"] == 9 and 1e-7 < found.diagnostics["noise"] < 1e-3
    away = (found.certificate.patches - patchify(private.model_input.double(), 8)).abs().amax(dim=2) * min(STD)
    assert bool(found.certificate.claimed.any()) and (away < found.certificate.radius).all()


@pytest.mark.parametrize(
    "side, width, ratio, positions, dtype, seed",
    [(32, 96, 0.3, 1.0, torch.float64, 0), (24, 48, 0.5, 50.0, torch.float32, 1)],
)
def test_of_grey_patches_no_mixture_is_certified(side, width, ratio, positions, dtype, seed):
    model = vit(image_size=side, embed_dim=width, num_heads=3, unknown=True).to(dtype)
    with torch.no_grad():
        model.pos_embed.mul_(positions)
    greys = torch.rand(1, len(model.pos_embed[0]) - 1, 1, generator=generator(seed), dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    image = (unpatchify(greys.expand(-1, -1, 192), 8, model.grid) - mean) / std
    jigsaw = Jigsaw(model.grid, ratio, "uniform", seed=seed)
    private = prepare(model, image.to(dtype), torch.tensor([1]), jigsaw, 0)
    found = first_block(share(model, private, UNDEFENDED, False, mean=MEAN, std=STD), generator=generator(), **FEW)
    true, shown, claimed = patchify(private.model_input.double(), 8)[0], found.certificate, found.certificate.claimed[0]
    away = torch.stack([(patch - true).abs().amax(dim=1).min() * max(STD) for patch in shown.patches[0]])
    assert claimed.sum() >= 7 and (away < shown.radius[0])[claimed].all()


def test_of_tokens_on_a_curve_that_fill_its_span_nothing_is_certified():
    """Greys without positions: what the MLP reads of them fades into rounding, and other greys fit as well as they."""
    model, told = vit(positions="none", image_size=32, embed_dim=96, num_heads=3), []
    for content in (
        torch.linspace(0.2, 0.8, 16)[None, :, None].expand(-1, -1, 192),
        torch.rand(1, 16, 192, generator=generator()),
    ):
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
        image = (unpatchify(content.double(), 8, model.grid) - mean) / std
        private = prepare(model, image, torch.tensor([1]), Jigsaw(model.grid, 0.0, "uniform", seed=0), 0)
        leak = share(model, private, UNDEFENDED, False, mean=MEAN, std=STD)
        told.append(
            (first_block(leak, generator=generator(), starts=48, rounds=2), patchify(private.model_input, 8)[0])
        )
    found, true = told[0]
    away = torch.stack([(patch - true).abs().amax(dim=1).min() * min(STD) for patch in patchify(found.images, 8)[0]])
    assert found.diagnostics["found"] > 8 and away.max() > 5e-3  # solutions that are no patch
    assert found.certificate is None and not found.diagnostics["exact_up_to_order"]
    assert told[1][0].certificate is not None and bool(told[1][0].certificate.claimed.all())


def test_new_starts_leave_the_directions_of_what_is_found_alone():
    _, leak = client(vit(positions="rotary", **SMALL))
    tokens = TokenEquations(leak)
    found = torch.randn(4, len(tokens.basis) + len(tokens.mixes), generator=generator(1), dtype=torch.float64)
    seen = found[:, : len(tokens.basis)]
    between = seen[1:] - seen[0]  # the directions in which known tokens differ
    starts = tokens.start(6, found, generator())[:, : len(tokens.basis)]
    scale = float(starts.abs().max() * between.abs().max())
    assert ((starts[::2] - seen[0]) @ between.T - (seen.mean(dim=0) - seen[0]) @ between.T).abs().max() < 1e-9 * scale
    assert (starts[1::2] @ between.T).abs().max() > 1e-3 * scale


def test_the_truth_solves_the_equations():
    private, leak = client(vit(positions="rotary", **SMALL))
    tokens = TokenEquations(leak)
    true = (patchify(private.model_input, 8)[0] - tokens.point) @ tokens.basis.T
    assert torch.allclose(tokens.point + true @ tokens.basis, patchify(private.model_input, 8)[0])
    wrong = torch.zeros(9, len(tokens.mixes), dtype=torch.float64)  # attention did return something
    assert all(tokens.residual(one, torch.zeros(36)).norm() > 1e-4 for one in torch.cat([true, wrong], dim=1))


@pytest.mark.parametrize(
    "options, number, words",
    [
        ({"patch_size": 4}, 1, "64 patches and 48 dimensions"),
        ({}, 2, "batch_size 1"),
        ({"embed_dim": 26, "num_heads": 2, "mlp_ratio": 1}, 1, "27 equations for 31 unknowns"),  # 17 tokens
        ({"april": True, "patch_size": 4, "embed_dim": 96}, 1, "LayerNorm, attention, LayerNorm, MLP"),
    ],
)
def test_what_it_cannot_solve_is_said(options, number, words):
    with pytest.raises(UserError, match=words):
        first_block(client(vit(**options), number)[1], generator=generator())


def test_gradients_of_zero_are_refused_in_words():
    model = vit(**SMALL)
    torch.nn.init.zeros_(model.head.weight)
    with pytest.raises(UserError, match="the gradient of 'patch_embed.proj.weight' is zero everywhere"):
        first_block(client(model)[1], generator=generator())
