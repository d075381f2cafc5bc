"""attacks/exactness.py: `exact` is never said of a picture that is wrong, and is said of plain leaks."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.exactness import MISFIT, is_exact, numerical_rank, rounding, solve
from attacks.linear.closed_form import closed_form
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import Leak, LocalSteps
from attacks.threat_model.local_step import training_loss
from defenses import build_defense
from defenses.base import Step
from models.jigsaw import Jigsaw
from tests.attacks.small_victims import MEAN, STD, UNDEFENDED, client, generator, vit
from utils.errors import UserError

QKV = "blocks.0.attn.qkv.weight"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPS = {form: torch.finfo(form).eps for form in DTYPES}
DEFENSES = {
    "none": ("none", {}),
    "noise": ("noise", {"std": 1e-2}),
    "little noise": ("noise", {"std": 1e-6}),
    "dp_sgd": ("dp_sgd", {"clip": 1.0, "noise_multiplier": 0.5}),
    "prune": ("prune", {"ratio": 0.9}),
    "prune all but 1 %": ("prune", {"ratio": 0.99}),
    "quantize": ("quantize", {"bits": 8}),
    "sign": ("quantize", {"bits": 1}),
}
# Patches N of 16 x 16 pixels, dimensions D below, at and above them, and images.
SHAPES = [
    {"patch_size": side, "embed_dim": dim, "num_heads": 1, "depth": depth}
    for side, dims in ((8, (4, 5, 8, 24)), (4, (15, 16, 17, 20, 48, 96)))
    for dim, depth in zip(dims, (1, 2, 3, 2, 4, 2), strict=False)
]


def decibels(found: Tensor, true: Tensor, std: tuple[float, ...]) -> float:
    """PSNR of normalised pixels, not clamped: the claim is about the numbers."""
    error = (found.double() - true.double()) * torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
    return -10 * math.log10(max(float(error.square().mean()), 1e-30))


def defended(model: nn.Module, private, leak: Leak, name: str, options: dict, seed: int) -> dict[str, Tensor]:
    step = Step(model, private.model_input, nn.functional.one_hot(private.labels, 5).to(private.model_input), None,
                partial(training_loss, model))  # fmt: skip
    return build_defense(name, options).gradients(leak.gradients, step, generator=generator(seed))


def cases() -> Iterator[tuple]:
    """(shape, images, defence, format the gradients are rounded to, format they come in), a few hundred of them."""
    for shape in SHAPES:
        for form in DTYPES:
            yield from ((shape, 1, defence, form, form) for defence in DEFENSES)
            yield shape, 1, "none", form, torch.float64
        yield shape, 2, "none", torch.float32, torch.float32


def test_the_closed_form_never_claims_a_wrong_picture_and_claims_plain_ones():
    shared: dict = {}
    number, claims = 0, dict.fromkeys(DTYPES, 0)
    for shape, images, defence, form, holder in cases():
        seed = SHAPES.index(shape)
        if (seed, images) not in shared:  # one gradient per victim
            model = vit(image_size=16, **shape, seed=seed).float()
            shared[seed, images] = model, *client(model, images, seed)
        model, private, leak = shared[seed, images]
        if (seed, images, defence) not in shared:
            shared[seed, images, defence] = defended(model, private, leak, *DEFENSES[defence], seed)
        held = {name: value.to(form).to(holder) for name, value in shared[seed, images, defence].items()}
        try:
            found = closed_form(replace(leak, gradients=held), generator=generator(), underdetermined=True)
        except UserError as error:  # rounded to nothing
            assert "zero everywhere" in str(error) and (defence != "none" or EPS[form] > 1e-4)
            continue
        assert found.images.isfinite().all() and math.isfinite(found.diagnostics["residual"])
        quality, said = decibels(found.images, private.model_input, leak.std), found.diagnostics["exact"]
        about = f"{shape}, {images} images, {defence}, {form} in {holder}: {quality:.1f} dB, {found.diagnostics}"
        assert not said or quality >= 60, about
        # Of D equations one holds for any image, and one must be left over to confirm the others.
        plain = defence == "none" and images == 1 and model.grid[0] ** 2 < shape["embed_dim"] - 1
        if plain and form in (torch.float32, torch.float64):  # computed in float32 all the same
            assert said, about
        number, claims[form] = number + 1, claims[form] + said
    assert number > 200 and claims[torch.float32] >= 5 and claims[torch.float64] >= 10


@pytest.mark.parametrize("form", DTYPES)
def test_rounding_is_that_of_the_values_whatever_holds_them(form):
    values = torch.randn(50, generator=generator(), dtype=torch.float64).to(form)
    for holder in DTYPES:
        if EPS[holder] <= EPS[form] and {form, holder} != {torch.float16, torch.bfloat16}:
            assert rounding([values.to(holder)]) == EPS[form]
    fine = torch.randn(50, generator=generator(1), dtype=torch.float64)
    assert rounding([fine]) == EPS[torch.float64] and rounding([fine, values]) == EPS[form]
    assert rounding([torch.zeros(3), fine]) == EPS[torch.float64]


def system(rows: int, unknowns: int, columns: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    own = generator(2)
    left, true = (
        torch.randn(shape, generator=own, dtype=torch.float64) for shape in ((rows, unknowns), (unknowns, columns))
    )
    return left, true, left @ true


def test_equations_without_terms_have_no_weight_and_contradict_all_the_same():
    left, true, right = system(20, 8)
    left[3], right[3] = 0, 0
    for balance in (True, False):
        found = solve(left, right, EPS[torch.float32], balance=balance)
        torch.testing.assert_close(found.values, true)
        assert found.rank == 8 and found.misfit < MISFIT * EPS[torch.float32]
    right[3] = right.abs().max()  # a row of the one gradient pruned, of the other not
    found = solve(left, right, EPS[torch.float32])
    torch.testing.assert_close(found.values, true)
    assert math.isfinite(found.residual) and found.misfit > 0.1


def test_equations_without_terms_check_nothing():
    """As many equations as unknowns are met by anything; empty ones beside them do not make them a check."""
    left, true, right = system(8, 8)
    left, right = (torch.cat([value, torch.zeros(4, value.shape[1], dtype=value.dtype)]) for value in (left, right))
    found = solve(left, right, EPS[torch.float32])
    torch.testing.assert_close(found.values, true)
    assert math.isnan(found.misfit)


def test_the_predicted_error_is_the_error():
    left, true, right = system(40, 30, 200)
    for noise in (1e-3, 1e-6):
        disturbed = right + noise * torch.randn(right.shape, generator=generator(3), dtype=torch.float64)
        found = solve(left, disturbed, EPS[torch.float64], balance=False)
        assert found.error == pytest.approx(float((found.values - true).square().mean().sqrt()), rel=0.1)


def test_each_of_the_three_conditions_is_needed():
    given = {"rank": 5, "unknowns": 5, "misfit": 1e-7, "error": 1e-5, "eps": EPS[torch.float32]}
    assert is_exact(**given)
    for wrong in ({"rank": 4}, {"misfit": 1e-4}, {"misfit": math.nan}, {"error": 0.01}, {"error": math.nan}):
        assert not is_exact(**given | wrong)
    assert numerical_rank(torch.tensor([1.0, 1e-3, 1e-7]), 64, EPS[torch.float32]) == 2
    square, _, right = system(8, 8)
    assert not is_exact(rank=8, unknowns=8, misfit=solve(square, right, 1e-16).misfit, error=0.0, eps=1e-16)


def plain_leak(form: torch.dtype = torch.float32) -> tuple:
    model = vit(image_size=16, patch_size=4, embed_dim=40, num_heads=2).to(form)
    return client(model)


def test_loud_channels_do_not_drown_the_others():
    """Equations are weighed by the terms they sum: a channel of which all gradients are large, by a power of two so
    that not a bit of them changes, changes nothing."""
    private, leak = plain_leak()
    loud = torch.ones(40)
    loud[::3] = 2.0**20
    gradients = leak.gradients | {
        "pos_embed": leak.gradients["pos_embed"] * loud,
        "patch_embed.proj.weight": leak.gradients["patch_embed.proj.weight"] * loud[:, None, None, None],
        "patch_embed.proj.bias": leak.gradients["patch_embed.proj.bias"] * loud,
    }
    quiet, other = (closed_form(one, generator=generator()) for one in (leak, replace(leak, gradients=gradients)))
    torch.testing.assert_close(other.images, quiet.images, rtol=0, atol=1e-9)
    assert quiet.diagnostics["exact"] and other.diagnostics["exact"]


def test_gradients_scaled_apart_are_not_exact():
    """Clipped tensor by tensor, the equations hold for a picture of another contrast: the bias shows it."""
    _, leak = plain_leak()
    scaled = replace(leak, gradients=leak.gradients | {"pos_embed": leak.gradients["pos_embed"] / 2})
    found = closed_form(scaled, generator=generator()).diagnostics
    assert found["residual"] < 1e-6 and not found["exact"]


def test_local_steps_on_one_image_keep_the_equations():
    """Every step multiplies the same patches, so their mean does too."""
    model = vit(image_size=16, patch_size=4, embed_dim=40, num_heads=2)
    private, leak = client(model, local=LocalSteps(3, 0.01, 1))
    found = closed_form(leak, generator=generator())
    assert decibels(found.images, private.model_input, leak.std) > 150


def test_equations_that_hold_for_any_images_confirm_nothing():
    """With one dimension more than patches the equations hold for two images mixed, too: their sum is zero."""
    for images, dim in ((2, 17), (1, 17), (1, 18)):
        _, leak = client(vit(image_size=16, patch_size=4, embed_dim=dim, num_heads=1), images)
        found = closed_form(replace(leak, batch_size=1), generator=generator())
        assert found.diagnostics["exact"] == (found.certificate is not None) == (dim == 18)
        assert found.diagnostics["residual"] < 1e-6


@pytest.mark.parametrize(
    "wrong, outside", [({}, 0), ({"mean": (0.5,) * 3, "std": (1.0,) * 3}, 1.0), ({"std": (1.0,) * 3}, 1.0)]
)
def test_a_picture_outside_the_range_of_pixels_is_not_claimed(wrong, outside):
    """Told another normalisation, the equations determine numbers that are no picture."""
    _, leak = plain_leak()
    found = closed_form(replace(leak, **wrong), generator=generator())
    claims = {found.diagnostics[key] for key in ("exact", "exact_up_to_order")} | {found.certificate is not None}
    assert claims == {not wrong} and found.diagnostics.get("outside", 0) >= outside


def test_black_and_white_are_inside_the_range():
    model = vit(image_size=16, patch_size=4, embed_dim=40, num_heads=2).float()
    pixels = (torch.rand(1, 3, 16, 16, generator=generator()) > 0.5).float()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    private = prepare(model, (pixels - mean) / std, torch.tensor([1]), Jigsaw(model.grid, 0.0), 0)
    found = closed_form(share(model, private, UNDEFENDED, True, mean=MEAN, std=STD), generator=generator())
    assert found.diagnostics["exact"] and found.certificate.bits == 8 * pixels.numel()


@pytest.mark.parametrize("factor", [0.999, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("name", ["closed_form", "mjp_aware", "joint"])
def test_a_patch_projection_scaled_alone_is_not_exact(name, factor):
    """Position rows and bias agree there; only the first block tells that the picture's contrast is another."""
    private, leak = client(vit(unknown=True), attacker_knowledge="method")
    weight = "patch_embed.proj.weight"
    scaled = replace(leak, gradients=leak.gradients | {weight: factor * leak.gradients[weight]})
    sure, found = (ATTACKS[name](one, generator=generator()) for one in (leak, scaled))
    assert sure.diagnostics["exact"] and sure.certificate is not None and "contrast" not in sure.diagnostics
    assert not found.diagnostics["exact"] and found.certificate is None
    if name != "joint" and factor > 0.5:  # joint sees it before; a parabola is too simple further away
        assert found.diagnostics["contrast"] == pytest.approx(1 / factor, rel=0.02)


def columns_first(places: Tensor) -> Tensor:
    return places.view(4, 4).T.flatten()


def last_two_swapped(places: Tensor) -> Tensor:
    return torch.cat([places[:-2], places[-2:].flip(0)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("order", [columns_first, last_two_swapped])
@pytest.mark.parametrize("name", ["closed_form", "joint"])
def test_position_rows_in_another_order_are_not_exact(name, order, seed):
    """The equations hold with patches in other places; the first block read other tokens, of about this contrast."""
    _, leak = client(vit(image_size=16, patch_size=4, embed_dim=96, seed=seed).float())
    rows = leak.gradients["pos_embed"]
    moved = torch.cat([rows[:, :1], rows[:, 1 + order(torch.arange(16))]], dim=1)
    other = replace(leak, gradients=leak.gradients | {"pos_embed": moved})
    sure, found = (ATTACKS[name](one, generator=generator()) for one in (leak, other))
    assert sure.diagnostics["exact"] and sure.certificate is not None
    assert not found.diagnostics["exact"] and found.certificate is None
    assert found.diagnostics.get("unexplained", 1) > 1e-5


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "head.weight"])
def test_the_scale_of_a_layer_that_claims_do_not_use_costs_none(layer):
    private, leak = client(vit().float())
    other = replace(leak, gradients=leak.gradients | {layer: 1e-3 * leak.gradients[layer]})
    found = closed_form(other, generator=generator())
    assert found.diagnostics["exact"] and found.certificate is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda leak: replace(leak, local=LocalSteps(3, 0.01, 1)),
        lambda leak: replace(leak, gradients={k: v for k, v in leak.gradients.items() if "qkv" not in k}),
        lambda leak: replace(leak, gradients=leak.gradients | {QKV: 0 * leak.gradients[QKV]}),
    ],
)
def test_a_contrast_that_cannot_be_measured_costs_no_claim(change):
    _, leak = client(vit())
    found = closed_form(change(leak), generator=generator())
    assert found.diagnostics["exact"] and "contrast" not in found.diagnostics
