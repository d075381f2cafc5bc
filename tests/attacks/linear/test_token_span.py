"""Withholding or fixing the position embedding hides nothing; leaving positions out of the tokens leaves a span."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from attacks.linear.closed_form import closed_form
from attacks.linear.token_span import Spans, token_positions, token_span
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import on_cpu
from defenses import no_defense
from models import build_model
from models.jigsaw import Jigsaw, patchify
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def leak_of(withhold=(), ratio=0.0, dtype=torch.float64, batch=1, attacker_knowledge="method", **options):
    model = build_model("vit", num_classes=7, **{**SMALL, **options}).eval().to(dtype)
    pixels = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smooth = torch.nn.functional.avg_pool2d(pixels, 5, 1, 2)
    images = ((smooth - 0.5) / 0.25).to(dtype)
    private = prepare(model, images, torch.arange(batch), Jigsaw(model.grid, ratio, "uniform"), 0)
    undefended = partial(no_defense, generator=None)
    return private, share(
        model, private, undefended, True, mean=MEAN, std=STD, withhold=withhold, attacker_knowledge=attacker_knowledge
    )


def attack(leak, **options):
    return token_span(leak, generator=torch.Generator().manual_seed(0), **options)


def attack_all_the_same(leak, **options):
    return attack(leak, underdetermined=True, **options)


def error(images, private) -> float:
    return float((images.double() - private.model_input.double()).abs().max())


def test_a_withheld_table_gives_the_image_away_exactly():
    private, leak = leak_of(withhold=["pos_embed"])
    with pytest.raises(UserError, match="pos_embed"):
        closed_form(leak, generator=torch.Generator())
    found = attack(leak)
    assert found.diagnostics["exact"] and found.diagnostics["determined"] == found.diagnostics["span"] == 15
    assert error(found.images, private) < 1e-4


def test_equations_that_leave_coordinates_open_are_refused_unless_asked_for():
    _, leak = leak_of(withhold=["pos_embed"], embed_dim=24)
    with pytest.raises(UserError, match=r"determine \d of the 15 coordinates .* 16 patches of 24 dimensions"):
        attack(leak)
    assert attack_all_the_same(leak, prior_steps=1, match_steps=0).diagnostics["determined"] < 15


def test_single_precision_is_enough_for_a_recognisable_image():
    private, leak = leak_of(withhold=["pos_embed"], dtype=torch.float32)
    assert (attack(leak, match_steps=0).images.double() - private.model_input).square().mean() < 0.02


def test_masked_patches_keep_their_differences_to_themselves():
    """Four patches that share the unknown row differ in three directions of which the equations say nothing."""
    private, leak = leak_of(ratio=0.25, unknown=True)
    spans = Spans(leak)
    assert private.mask.sum() == 4 and spans.determined == 15 - 3 and not spans.certain


@pytest.mark.parametrize("positions, determined", [("none", 0), ("rotary", 0), ("tied", 3), ("sinusoidal", 6)])
def test_the_affine_rank_of_the_table_is_what_the_equations_determine(positions, determined):
    withhold = ["pos_embed"] if positions == "tied" else []
    private, leak = leak_of(positions=positions, withhold=withhold)
    spans = Spans(leak)
    patches = patchify(private.model_input, 8)[0]
    outside = patches - spans.point
    assert (outside - outside @ spans.basis.T @ spans.basis).abs().max() < 1e-6  # the span itself leaks
    assert len(spans.basis) == 15 and spans.determined == determined and not spans.certain


def test_small_patches_close_the_span():
    """With more patches than pixels in a patch the rows of the patch-embedding gradient span everything."""
    _, leak = leak_of(positions="rotary", patch_size=4)
    assert len(Spans(leak).basis) == 48


def test_more_patches_than_values_of_a_patch_come_back_exactly():
    """The rows of 64 patches of 48 values span everything, and the position table still tells all 48 of them."""
    private, leak = leak_of(withhold=["pos_embed"], patch_size=4, embed_dim=132)
    found = attack(leak)
    assert found.diagnostics["determined"] == 48 and found.diagnostics["exact"]
    assert error(found.images, private) < 1e-4


def test_matching_lowers_the_objective_and_follows_its_generator():
    private, leak = leak_of(positions="rotary")
    short, long, again = (attack_all_the_same(leak, match_steps=steps) for steps in (1, 15, 15))
    assert long.diagnostics["objective"] < short.diagnostics["objective"]
    assert long.images.equal(again.images)


@pytest.mark.parametrize(
    "options, words",
    [({"batch": 2}, "use batch_size 1"), ({"withhold": ["blocks.0.attn.qkv.bias"]}, "needs the gradient of 'blocks.0")],
)
def test_leaks_it_cannot_use(options, words):
    with pytest.raises(UserError, match=words):
        attack(leak_of(**options)[1])


def test_models_it_cannot_use():
    model = build_model("lenet", num_classes=7, image_size=32).eval()
    private = prepare(model, torch.zeros(1, 3, 32, 32), torch.tensor([0]), Jigsaw(model.grid, 0), 0)
    with pytest.raises(UserError, match="needs the gradient of 'patch_embed"):
        attack(share(model, private, partial(no_defense, generator=None), True))


class Elsewhere(torch.Tensor):
    """A tensor on another device, as far as a CPU can play one: it works with its like, and with others only once
    `.cpu()` has brought it here."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "__get__" and args and function.__self__ is torch.Tensor.device:
            return torch.device("cuda")
        plain = [value.as_subclass(torch.Tensor) if isinstance(value, cls) else value for value in args]
        if function in (torch.Tensor.cpu, torch.Tensor.any, torch.Tensor.isfinite):
            return function(*plain)
        if any(isinstance(value, torch.Tensor) and not isinstance(value, cls) and value.dim() for value in args):
            raise RuntimeError("tensors on two devices")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_everything_works_where_the_leak_is_brought_to():
    """With the gradients and the mask told on another device, the model of MJP included in what is moved."""
    private, leak = leak_of(ratio=0.25, unknown=True, attacker_knowledge="mask")
    away = replace(
        leak,
        gradients={name: value.as_subclass(Elsewhere) for name, value in leak.gradients.items()},
        mask=leak.mask.as_subclass(Elsewhere),
        labels=leak.labels.as_subclass(Elsewhere),
    )
    with pytest.raises(RuntimeError, match="two devices"):
        token_positions(away, 16)
    options = {"prior_steps": 1, "match_steps": 1}
    assert attack(away, **options).images.equal(attack(leak, **options).images)


@pytest.mark.parametrize("field", ["gradients", "labels", "mask", "source", "public", "statistics"])
def test_whatever_a_leak_holds_is_brought(field):
    """Even where it is the only thing that lies on another device."""

    def away(value):
        return value.as_subclass(Elsewhere)

    _, leak = leak_of(ratio=0.25, unknown=True, attacker_knowledge="permutation")
    one = torch.ones(2)
    leak = replace(leak, public=(one,), statistics={"norm": (one, one)})
    held = getattr(leak, field)
    if field == "gradients":
        moved = {name: away(value) for name, value in held.items()}
    elif field == "statistics":
        moved = {name: tuple(map(away, pair)) for name, pair in held.items()}
    else:
        moved = tuple(map(away, held)) if field == "public" else away(held)
    found = getattr(on_cpu(replace(leak, **{field: moved})), field)
    found = list(found.values()) if isinstance(found, dict) else found
    tensors = [found] if isinstance(found, torch.Tensor) else found
    for value in tensors:
        for tensor in value if isinstance(value, tuple) else (value,):
            assert not isinstance(tensor, Elsewhere)
