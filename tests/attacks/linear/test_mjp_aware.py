"""mjp_aware.py: what MJP leaves of a photograph to a server that knows it, in exact and in rounded gradients."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from skimage import data, transform
from torch import Tensor, nn

from attacks.linear import mjp_patches
from attacks.linear.closed_form import closed_form, token_gradients
from attacks.linear.mjp_aware import mjp_aware
from attacks.linear.mjp_equations import FirstBlock, Span
from attacks.linear.mjp_queries import Queries
from attacks.linear.smoothness import Smoothness
from attacks.threat_model.leak import Leak, Reconstruction
from models import build_model
from models.jigsaw import Jigsaw, patchify, shuffle_patches
from models.position import given_mask
from utils.errors import UserError

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.22, 0.2)
SMALL = {"image_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}  # 64 patches of 192 values


def build(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    model = build_model("vit", num_classes=10, **{**SMALL, "unknown": True, **options}).to(dtype).eval()
    if model.index_embed is not None:
        nn.init.normal_(model.index_embed, std=0.02, generator=torch.Generator().manual_seed(4))
    return model


def train_a_little(model: nn.Module) -> nn.Module:
    """Weights as after some training: no LayerNorm is the identity, no bias zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.05 * noise * (1 if parameter.ndim == 1 else parameter.std())
    return model


def photograph(name: str = "astronaut", side: int = 64) -> Tensor:
    """(1, 3, side, side) normalised."""
    pixels = torch.from_numpy(transform.resize(getattr(data, name)(), (side, side), anti_aliasing=True)).permute(
        2, 0, 1
    )
    return ((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]


def leak_of(model: nn.Module, ratio: float, *, seed: int = 0, sampler: str = "uniform", image: Tensor | None = None):
    """((original, shown, hidden (N,), source (N,)), the leak of one image)."""
    dtype = next(model.parameters()).dtype
    original = (photograph() if image is None else image).to(dtype)
    mask, source = Jigsaw(model.grid, ratio, sampler, seed=seed).draw_for([0])
    shown = shuffle_patches(original, source, model.patch_size)
    loss = nn.functional.cross_entropy(model(shown, given_mask(model, mask)), torch.tensor([3]))
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
    leak = Leak(model, gradients, tuple(shown.shape[1:]), 1, mean=MEAN, std=STD)
    return (original, shown, mask[0], source[0]), leak


def run(leak: Leak, **options) -> Reconstruction:
    return mjp_aware(leak, generator=torch.Generator().manual_seed(0), **options)


def patches_of(images: Tensor, size: int) -> Tensor:
    """(N, P) in [0, 1]."""
    pixels = images.double() * torch.tensor(STD).view(3, 1, 1).double() + torch.tensor(MEAN).view(3, 1, 1).double()
    return patchify(pixels.clamp(0, 1), size)[0]


def decibels(error: Tensor) -> float:
    return -10 * math.log10(max(float(error.mean()), 1e-30))


def scores(private, images: Tensor, size: int) -> dict[str, float]:
    """PSNR of the visible patches, of the hidden ones in any order and in place, and of the image."""
    original, shown, hidden, _ = private
    truth, seen, found = (patches_of(x, size) for x in (original, shown, images))
    values = {"visible": decibels((found - seen)[~hidden].square()), "image": decibels((found - truth).square())}
    cost = (found[hidden][:, None] - truth[hidden][None]).square().mean(dim=2)
    values["hidden"] = decibels(cost[linear_sum_assignment(cost.numpy())])
    values["in place"] = decibels(cost.diagonal())
    return values


def attack(model: nn.Module, ratio: float, **options):
    private, leak = leak_of(model, ratio)
    result = run(leak, **options)
    return scores(private, result.images, model.patch_size), result, (private, leak)


@pytest.mark.parametrize("options", [{}, {"depth": 4}, {"num_heads": 6}, {"localization": "nonlinear"}])
@pytest.mark.parametrize("trained", [False, True])
def test_exact_gradients_give_every_visible_patch_away(options, trained):
    model = build(**options)
    model = train_a_little(model) if trained else model
    values, result, (private, leak) = attack(model, 0.3, hidden_steps=0, steps=2)
    naive = scores(private, closed_form(leak, generator=torch.Generator()).images, 8)
    assert result.diagnostics["first_block"]
    assert result.diagnostics["hidden"] == 19 and result.diagnostics["rank"] == 18
    assert result.diagnostics["noise"] < 1e-5
    assert naive["visible"] < 25
    assert values["visible"] > 100


@pytest.mark.parametrize("trained", [False, True])
def test_a_few_hidden_patches_come_back_in_place(trained):
    model = train_a_little(build()) if trained else build()
    values, result, (private, _) = attack(model, 4 / 64)
    assert private[2].sum() == 4
    assert values["hidden"] > 60
    assert values["in place"] == values["hidden"]
    assert values["image"] > 70
    assert result.diagnostics["exact_up_to_order"] and not result.diagnostics["exact"]  # the order is a guess


@pytest.mark.parametrize("steps, solved", [(15, False), (60, True)])
def test_hidden_patches_that_are_not_there_yet_are_not_claimed(steps, solved):
    """Colour ramps, half of them hidden: the misfit is that of a solution, and a few steps do not lead there."""
    options = {"image_size": 32, "embed_dim": 96, "depth": 2, "num_heads": 3}
    model, own = build(**options), torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.unknown_pos_embed.add_(0.05 * torch.randn(1, 1, 96, generator=own, dtype=torch.float64))
        for norm in (layer for layer in model.modules() if isinstance(layer, nn.LayerNorm)):
            norm.weight.mul_(torch.randn(96, generator=own, dtype=torch.float64).exp())
            norm.bias.add_(0.3 * torch.randn(96, generator=own, dtype=torch.float64))
    rising = torch.linspace(0, 1, 32, dtype=torch.float64)
    ramp = torch.stack([rising.expand(32, 32), rising[:, None].expand(32, 32), (rising + rising[:, None]) / 2])
    ramp = (255 * ramp).round() / 255
    image = ((ramp - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None]
    (_, shown, _, _), leak = leak_of(model, 0.5, image=image)
    options = {"steps": 3, "hidden_steps": 8, "newton_steps": steps}
    found = mjp_aware(leak, generator=torch.Generator().manual_seed(0), **options)
    patches, true = patchify(found.images, 8)[0], patchify(shown, 8)[0]
    rows, columns = linear_sum_assignment(torch.cdist(patches, true).numpy())
    error = ((patches[rows] - true[columns]).square().mean(dim=1).sqrt() * max(STD)).max()
    assert (error < 1e-3) == solved == found.diagnostics["exact_up_to_order"]


def test_rounded_gradients_leave_a_good_picture():
    values, result, (private, leak) = attack(build(torch.float32), 0.25)
    naive = scores(private, closed_form(leak, generator=torch.Generator()).images, 8)
    mean = patches_of(private[1], 8)[~private[2]].mean(dim=0)
    fill = decibels((mean - patches_of(private[0], 8)[private[2]]).square())
    assert not result.diagnostics["exact"]
    assert 1e-4 < result.diagnostics["noise"] < 1
    assert values["visible"] > naive["visible"] + 10
    assert values["hidden"] > max(naive["hidden"], fill) + 1
    prior = scores(private, run(leak, first_block=False).images, 8)
    assert prior["visible"] > naive["visible"] + 5
    assert values["visible"] > prior["visible"]


def test_the_hull_and_the_span_hold_every_patch():
    model = build()
    (_, shown, hidden, _), leak = leak_of(model, 0.2)
    rows, _ = token_gradients(leak)
    span = Span.of(leak, rows, hidden, leak.gradients["unknown_pos_embed"].reshape(1, -1))
    assert span.basis.shape == (int(hidden.sum()) - 1, 192)
    offset = patchify(shown, 8)[0] - span.base
    assert (offset - offset @ span.basis.T @ span.basis).abs().max() < 1e-6
    assert offset.abs().max() > 0.1


def test_the_equations_of_the_first_block_hold_at_the_truth():
    model = train_a_little(build())
    (_, shown, hidden, _), leak = leak_of(model, 0.2)
    rows, _ = token_gradients(leak)
    span = Span.of(leak, rows, hidden, leak.gradients["unknown_pos_embed"].reshape(1, -1))
    block = FirstBlock.of(leak, span)
    patches = patchify(shown, 8)[0]
    truth = ((patches - span.base) @ span.basis.T)[~hidden]
    tokens = block.start + truth @ block.slope
    assert (block.target + block.ratios(truth)[:, None] * tokens).norm() < 1e-4 * block.target.norm()
    assert (block.target + block.ratio[:, None] * tokens).norm() < 1e-4 * block.target.norm()
    queries = Queries(block, patches[~hidden])
    assert queries.residual(patches[hidden]).square().mean().sqrt() < 1e-5
    mixture = patches[hidden].mean(dim=0).expand(int(hidden.sum()), -1)
    assert queries.residual(mixture).square().mean().sqrt() > 1e-3


@pytest.mark.parametrize("far", [False, True])
def test_a_solution_outside_the_range_of_pixels_is_not_taken(monkeypatch, far):
    """Of what Newton finds, only a solution counts out there; the start stays."""
    model = train_a_little(build())
    (_, shown, hidden, _), leak = leak_of(model, 4 / 64)
    rows, _ = token_gradients(leak)
    span = Span.of(leak, rows, hidden, leak.gradients["unknown_pos_embed"].reshape(1, -1))
    patches = patchify(shown, 8)[0]
    queries = Queries(FirstBlock.of(leak, span), patches[~hidden])
    given = (span, Smoothness(leak), patches[~hidden], queries, 1.0, 5)

    def moved(queries, mean, basis, start, *rest):
        return start + (1e4 if far else 1e-3)

    start, _ = mjp_patches.hidden_patches(*given, 0, torch.Generator())
    monkeypatch.setattr(mjp_patches, "_newton", moved)
    found, _ = mjp_patches.hidden_patches(*given, 5, torch.Generator())
    assert found.equal(start) == far and (found - start).abs().max() < 1


def test_the_jacobian_of_the_queries_is_their_derivative():
    model = train_a_little(build())
    (_, shown, hidden, _), leak = leak_of(model, 4 / 64)
    rows, _ = token_gradients(leak)
    span = Span.of(leak, rows, hidden, leak.gradients["unknown_pos_embed"].reshape(1, -1))
    queries = Queries(FirstBlock.of(leak, span), patchify(shown, 8)[0][~hidden])
    patches, chosen = patchify(shown, 8)[0][hidden] + 0.1, torch.tensor([0, 5, 9])
    residual, jacobian = queries.residual(patches, chosen, span.basis)
    torch.testing.assert_close(residual, queries.residual(patches)[:, chosen])
    expected = torch.autograd.functional.jacobian(
        lambda value: queries.residual(patches + value @ span.basis, chosen),
        torch.zeros(4, 3, dtype=torch.float64),
    )
    torch.testing.assert_close(jacobian, expected.flatten(0, 2).flatten(1))


def test_smoothness_by_hand():
    leak = Leak(build(image_size=16), {}, (3, 16, 16), 1, std=(1.0, 1.0, 1.0))
    penalty = Smoothness(leak)
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    picture = lambda values: patchify(values.double().expand(1, 3, -1, -1), 8)[0]  # noqa: E731
    everywhere = penalty.weights(torch.zeros(4, dtype=torch.bool))
    assert penalty(picture(3 * row - 2 * column + 1), everywhere, 0.0).item() == pytest.approx(0, abs=1e-9)
    # A grey parabola: second difference 2 across, none down, none mixed; grey is sqrt(3) in the luma channel.
    assert penalty(picture(column**2), everywhere, 0.0).item() == pytest.approx(16 * 14 * 2 * math.sqrt(3))
    assert penalty(picture(row * column), everywhere, 0.0).item() == pytest.approx(3 * 15 * 15 * math.sqrt(3))
    # Nothing that touches an absent patch counts, and the absent patch itself does not either.
    absent = torch.tensor([True, False, False, False])
    weights = penalty.weights(absent)
    inside = (row < 8) & (column < 8)
    one, other = (picture(column**2 + inside * value) for value in (0.0, 5.0))
    assert penalty(one, weights, 0.0).item() == pytest.approx(penalty(other, weights, 0.0).item())
    assert penalty(one, weights, 0.0) < penalty(one, everywhere, 0.0)


@pytest.mark.parametrize("hidden", [0, 1])
def test_up_to_one_hidden_patch_is_the_closed_form(hidden):
    private, leak = leak_of(build(), hidden / 64)
    assert private[2].sum() == hidden
    result = run(leak)
    assert result.images.equal(closed_form(leak, generator=torch.Generator()).images)
    assert result.diagnostics["exact"] and result.diagnostics["hidden"] == hidden


def test_an_index_embedding_voids_the_protection():
    model = build(index_embed=True)
    image = photograph("chelsea", 64)
    private, leak = leak_of(model, 0.1, image=image)
    guessed = run(leak)
    assert decibels((patches_of(guessed.images, 8) - patches_of(private[0], 8)).square()) > 20
    assert guessed.diagnostics["exact_up_to_order"] and not guessed.diagnostics["exact"]
    told = run(replace(leak, attacker_knowledge="permutation", mask=private[2], source=private[3]))
    assert decibels((patches_of(told.images, 8) - patches_of(private[0], 8)).square()) > 150
    assert told.diagnostics["exact"]


def test_a_naive_shuffle_is_undone_with_the_permutation_and_mostly_with_the_mask():
    model = build(unknown=False, patch_size=16, image_size=128)
    private, leak = leak_of(model, 0.2, image=photograph("astronaut", 128))
    original, shown, hidden, source = private
    as_shown = run(leak).images
    torch.testing.assert_close(as_shown, shown, rtol=0, atol=1e-6)
    solved = run(replace(leak, attacker_knowledge="mask", mask=hidden)).images
    right = (patchify(solved, 16)[0] - patchify(original, 16)[0]).abs().amax(dim=1) < 1e-6
    assert right[~hidden].all()
    assert right[hidden].double().mean() > 0.7
    told = run(replace(leak, attacker_knowledge="permutation", mask=hidden, source=source)).images
    torch.testing.assert_close(told, original, rtol=0, atol=1e-6)


@pytest.mark.parametrize("std", [1e-6, 1e-2])
def test_noise_lowers_the_score_and_crashes_nothing(std):
    private, leak = leak_of(build(torch.float32), 0.25)
    generator = torch.Generator().manual_seed(0)
    gradients = {name: x + std * torch.randn(x.shape, generator=generator) for name, x in leak.gradients.items()}
    noisy = replace(leak, gradients=gradients, attacker_knowledge="mask", mask=private[2])
    result = run(noisy, steps=20, hidden_steps=20)
    assert result.images.isfinite().all()
    assert result.diagnostics["mask_source"] == "told"
    assert not result.diagnostics["exact"]
    assert result.diagnostics["rank"] < int(private[2].sum()) - 1
    clean = scores(private, run(leak, steps=20, hidden_steps=20).images, 8)
    assert scores(private, result.images, 8)["visible"] < clean["visible"]


@pytest.mark.parametrize("ratio", [0.9, 1.0])
def test_large_masks_crash_nothing(ratio):
    _, leak = leak_of(build(), ratio)
    result = run(leak, steps=5, hidden_steps=5)
    assert result.images.isfinite().all()
    assert not result.diagnostics["exact_up_to_order"] or ratio == 0.9


def test_more_unknowns_than_equations_leave_the_prior():
    result = run(leak_of(build(embed_dim=96), 0.5)[1], steps=5, hidden_steps=5)
    assert not result.diagnostics["first_block"]
    assert result.images.isfinite().all()


def test_without_first_block_gradients_the_prior_is_left_to_those_who_ask_for_it():
    _, leak = leak_of(build(), 0.2)
    gradients = {name: value for name, value in leak.gradients.items() if name != "blocks.0.attn.proj.weight"}
    blind = replace(leak, gradients=gradients)
    with pytest.raises(UserError, match=r"'blocks.0.attn.proj.weight'.*--attack_options.first_block false leaves"):
        run(blind)
    result = run(blind, steps=10, first_block=False)
    assert not result.diagnostics["first_block"] and not result.diagnostics["exact"]
    assert math.isnan(result.diagnostics["noise"])
    assert result.images.equal(run(leak, steps=10, first_block=False).images)


def test_the_same_leak_gives_the_same_image():
    _, leak = leak_of(build(), 4 / 64)
    assert run(leak, steps=10, hidden_steps=10).images.equal(run(leak, steps=10, hidden_steps=10).images)


def test_what_it_cannot_do_is_said_in_one_line():
    _, leak = leak_of(build(), 0.2)
    with pytest.raises(UserError, match="a batch of one image, this gradient is of 2"):
        run(replace(leak, batch_size=2))
    with pytest.raises(UserError, match="--attacker_knowledge method"):
        run(replace(leak, attacker_knowledge="none"))
    for name in ("pos_embed", "patch_embed.proj.weight", "unknown_pos_embed"):
        missing = replace(leak, gradients={key: value for key, value in leak.gradients.items() if key != name})
        with pytest.raises(UserError, match=f"attack 'mjp_aware' needs the gradient of '{name}'"):
            run(missing)
        broken = replace(leak, gradients=leak.gradients | {name: leak.gradients[name] * math.nan})
        with pytest.raises(UserError, match=f"the gradient of '{name}' holds NaN"):
            run(broken)
    with pytest.raises(UserError, match="64 patches are unknown, and 48 embedding dimensions give 47 equations"):
        run(leak_of(build(embed_dim=48), 0.2)[1])
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    model = build_model("swin_tiny", num_classes=10, **swin)
    with pytest.raises(UserError, match="attack 'mjp_aware' needs the gradient of 'pos_embed'"):
        run(Leak(model, {"patch_embed.proj.weight": torch.ones(1)}, (3, 32, 32), 1))
