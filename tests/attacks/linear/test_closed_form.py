"""attacks/linear/closed_form.py along the whole path of a leak: victim, defence, attack and score."""

import math
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks import ATTACKS
from attacks.linear.closed_form import closed_form, token_gradients
from attacks.threat_model.client import PrivateBatch, prepare, share
from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.leak import Leak, Reconstruction
from defenses import no_defense
from defenses.noise import Noise
from eval.reconstruction import score
from models import build_model
from models.jigsaw import Jigsaw, patchify
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}  # 16 patches of 192 values
FINE = {**SMALL, "patch_size": 4, "embed_dim": 96}  # 64 patches of 48 values
NO_NOISE = partial(no_defense, generator=torch.Generator())


def build(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    model = build_model("vit", num_classes=10, **{**SMALL, **options}).to(dtype)
    if model.index_embed is not None:
        nn.init.normal_(model.index_embed, std=0.02, generator=torch.Generator().manual_seed(4))
    return model


def photographs(number: int = 1, seed: int = 0, side: int = 32) -> Tensor:
    """Smooth pictures with texture, bytes in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 5, 5, generator=generator, dtype=torch.float64)
    smooth = nn.functional.interpolate(coarse, size=side, mode="bicubic", align_corners=False)
    texture = torch.rand(number, 3, side, side, generator=generator, dtype=torch.float64)
    return ((0.9 * smooth + 0.1 * texture).clamp(0, 1) * 255).round() / 255


def leak_of(
    model: nn.Module, ratio: float = 0.0, number: int = 1, seed: int = 0, defense=NO_NOISE
) -> tuple[PrivateBatch, Leak]:
    """What a victim with random labels and uniformly masked patches shares."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (number,), generator=generator)
    images = photographs(number, seed, model.grid[0] * model.patch_size).to(model.pos_embed.dtype)
    private = prepare(model, images, labels, Jigsaw(model.grid, ratio, "uniform", seed=seed), 0)
    return private, share(model, private, defense, reveal_labels=False)


def reconstruct(leak: Leak, **options) -> Reconstruction:
    return closed_form(leak, generator=torch.Generator(), **options)


def scores_of(model: nn.Module, private: PrivateBatch, result: Reconstruction) -> dict[str, float]:
    values = score(private.images, private.model_input, result.images, private.mask, model.patch_size)
    return {key: value.min().item() for key, value in values.items()}


def attack(
    model: nn.Module, underdetermined: bool = False, **options
) -> tuple[PrivateBatch, Reconstruction, dict[str, float]]:
    private, leak = leak_of(model, **options)
    result = reconstruct(leak, underdetermined=underdetermined)
    return private, result, scores_of(model, private, result)


def test_the_attack_is_registered():
    assert ATTACKS["closed_form"] is closed_form


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, FINE, {"depth": 1}, {"depth": 6}, {"unknown": True}, {"unknown": True, "localization": "nonlinear"}],
)
def test_double_precision_gradients_give_the_image_away(options, seed):
    model = build(**options)
    _, result, scores = attack(model, seed=seed)
    patches = model.grid[0] * model.grid[1]
    assert scores["psnr"] > 200
    assert scores["psnr_visible_raw"] > 200
    assert scores["exact_pixels"] == 100
    assert result.diagnostics["residual"] < 1e-10
    expected = {"patches": patches, "hidden": 0, "rank": patches, "unknowns": patches, "exact": True}
    assert {key: result.diagnostics[key] for key in expected} == expected
    assert result.diagnostics["equations"] == model.embed_dim


@pytest.mark.parametrize("options", [{}, FINE])
def test_single_precision_gradients_give_the_image_away(options):
    _, result, scores = attack(build(torch.float32, **options))
    assert scores["psnr"] > 80
    assert scores["exact_pixels"] == 100
    assert result.diagnostics["exact"]


def test_colours_outside_the_range_of_pictures_are_not_clamped():
    model = build()
    images = 4 * photographs() - 2
    private = prepare(model, images, torch.tensor([3]), Jigsaw(model.grid, 0), 0)
    result = reconstruct(share(model, private, NO_NOISE, reveal_labels=False))
    torch.testing.assert_close(result.images, images, rtol=0, atol=1e-8)
    assert result.images.min() < -1 and result.images.max() > 1


@pytest.mark.parametrize("embed_dim", [8, 12, 16])
def test_as_many_patches_as_dimensions_are_too_many(embed_dim):
    _, leak = leak_of(build(embed_dim=embed_dim))
    with pytest.raises(UserError, match=f"16 patches are unknown, and {embed_dim} .* give {embed_dim - 1} equations"):
        reconstruct(leak)
    _, result, scores = attack(build(embed_dim=embed_dim), underdetermined=True)
    assert not result.diagnostics["exact"]
    assert result.diagnostics["rank"] < result.diagnostics["unknowns"] == 16
    assert result.diagnostics["equations"] == embed_dim
    assert scores["psnr"] < 60
    assert result.images.isfinite().all()


def test_a_naive_shuffle_hides_the_order_of_the_patches_only():
    model = build()
    private, result, scores = attack(model, ratio=0.5)
    assert not private.model_input.equal(private.images)
    assert scores["psnr_shown"] > 200
    assert scores["psnr"] < 40
    assert result.diagnostics["hidden"] == 0
    assert result.diagnostics["exact"]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_mjp_gives_its_mask_away(ratio):
    model = build(**FINE, unknown=True)
    private, leak = leak_of(model, ratio=ratio)
    rows, hidden = token_gradients(leak)
    assert hidden.equal(private.mask[0])
    assert rows.shape == (64, 96)
    result = reconstruct(leak)
    assert result.diagnostics["hidden"] == int(64 * ratio)
    assert result.diagnostics["unknowns"] == 64 - int(64 * ratio) + 1
    assert not result.diagnostics["exact"]


def test_mjp_spoils_the_visible_patches_the_more_it_hides():
    model, means = build(**FINE, unknown=True), []
    for ratio in (0.0, 0.05, 0.3, 0.9):
        decibels = [attack(model, ratio=ratio, seed=seed)[2]["psnr_visible_raw"] for seed in range(3)]
        means.append(sum(decibels) / len(decibels))
    assert means[0] > 200
    assert means[1] < 50
    assert all(later < earlier - 1 for earlier, later in zip(means, means[1:], strict=False))


@pytest.mark.parametrize("seed", range(3))
def test_one_hidden_patch_hides_nothing(seed):
    private, result, scores = attack(build(unknown=True), ratio=1 / 16, seed=seed)
    assert private.mask.sum() == 1
    assert result.diagnostics["hidden"] == 1
    assert result.diagnostics["exact"]
    assert scores["psnr"] > 200


def test_hidden_patches_share_the_solution_of_the_unknown_row():
    model = build(unknown=True)
    private, result, _ = attack(model, ratio=0.25)
    cells = result.images[0].unflatten(1, (4, 8)).unflatten(3, (4, 8)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    hidden = cells[private.mask[0]]
    assert len(hidden) == 4
    assert hidden.eq(hidden[:1]).all()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("unknown", [False, True])
def test_an_index_embedding_gives_everything_away_despite_the_mask(ratio, unknown):
    model = build(index_embed=True, unknown=unknown)
    private, result, scores = attack(model, ratio=ratio)
    assert private.mask.sum() == int(16 * ratio)
    assert scores["psnr_shown"] > 200
    assert result.diagnostics["hidden"] == 0
    assert result.diagnostics["exact"]


def test_with_every_patch_hidden_only_one_mixture_is_left():
    private, leak = leak_of(build(unknown=True), ratio=1.0)
    assert private.mask.all()
    rows, hidden = leak.gradients["pos_embed"][0, 1:], private.mask[0]
    assert not rows[hidden].any()
    result = reconstruct(leak)
    assert result.diagnostics["unknowns"] == 1 and not result.diagnostics["exact"]
    patches = patchify(result.images, 8)[0]
    assert torch.equal(patches, patches[:1].expand_as(patches))


def test_a_batch_is_mixed_and_says_so():
    with pytest.raises(UserError, match="sum over 2 images: use batch_size 1"):
        attack(build(), number=2)
    private, result, scores = attack(build(), number=2, underdetermined=True)
    assert result.images.shape == (2, 3, 32, 32)
    assert result.images[0].equal(result.images[1])
    assert not result.diagnostics["exact"]
    assert scores["psnr"] < 40


def changed(leak: Leak, name: str, value: Tensor | None) -> Leak:
    """The leak with one gradient replaced, or without it."""
    others = {key: gradient for key, gradient in leak.gradients.items() if key != name}
    return replace(leak, gradients=others if value is None else {**others, name: value})


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "unknown_pos_embed"])
def test_gradients_that_are_missing_or_broken_are_named(name):
    _, leak = leak_of(build(unknown=True), ratio=0.5)
    with pytest.raises(UserError, match=f"attack 'closed_form' needs the gradient of '{name}'"):
        reconstruct(changed(leak, name, None))
    for broken in (math.nan, math.inf):
        gradient = leak.gradients[name].clone()
        gradient.flatten()[-1] = broken
        with pytest.raises(UserError, match=f"the gradient of '{name}' holds NaN or infinity"):
            reconstruct(changed(leak, name, gradient))


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight"])
def test_gradients_that_are_zero_are_refused(name):
    _, leak = leak_of(build())
    with pytest.raises(UserError, match=f"the gradient of '{name}' is zero everywhere"):
        reconstruct(changed(leak, name, torch.zeros_like(leak.gradients[name])))


@pytest.mark.parametrize("options", [{}, {"absolute_pos_embed": True}])
def test_swin_is_refused(options):
    shape = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    model = build_model("swin_tiny", num_classes=10, **shape, **options).double()
    private = prepare(model, photographs(), torch.tensor([3]), Jigsaw(model.grid, 0), 0)
    with pytest.raises(UserError, match="closed_form"):
        reconstruct(share(model, private, NO_NOISE, reveal_labels=False))


def test_models_without_patch_embedding_are_refused():
    leak = Leak(build_model("resnet50", image_size=32), {"fc.bias": torch.ones(1000)}, (3, 32, 32), 1)
    with pytest.raises(UserError, match="attack 'closed_form' needs the gradient of 'patch_embed.proj.weight'"):
        reconstruct(leak)


def test_the_same_leak_gives_the_same_image():
    model = build(unknown=True)
    _, leak = leak_of(model, ratio=0.3)
    one = closed_form(leak, generator=torch.Generator().manual_seed(1))
    other = closed_form(leak, generator=torch.Generator().manual_seed(2))
    assert one.images.equal(other.images)
    assert one.diagnostics == other.diagnostics
    assert reconstruct(leak_of(model, ratio=0.3)[1]).images.equal(one.images)


def test_noise_has_the_stated_strength_and_lowers_the_score():
    model, decibels = build(), []
    for std in (0.0, 1e-8, 1e-6, 1e-4):
        generator = torch.Generator().manual_seed(0)
        private, leak = leak_of(model, defense=partial(Noise(std=std).gradients, generator=generator))
        decibels.append(scores_of(model, private, reconstruct(leak))["psnr_visible_raw"])
    assert decibels[0] > 200
    assert all(later < earlier - 10 for earlier, later in zip(decibels, decibels[1:], strict=False))
    gradients = {"a": torch.zeros(200, 100), "b": torch.ones(3, dtype=torch.float64)}
    noisy = Noise(std=0.1).gradients(gradients, generator=torch.Generator().manual_seed(0))
    assert noisy["a"].std().item() == pytest.approx(0.1, rel=0.02)
    assert noisy["a"].mean().abs().item() < 0.003
    assert [value.dtype for value in noisy.values()] == [torch.float32, torch.float64]
    assert not gradients["a"].any()
    again = Noise(std=0.1).gradients(gradients, generator=torch.Generator().manual_seed(0))
    other = Noise(std=0.1).gradients(gradients, generator=torch.Generator().manual_seed(1))
    assert again["a"].equal(noisy["a"]) and again["b"].equal(noisy["b"])
    assert not other["a"].equal(noisy["a"])


@pytest.mark.parametrize("options", [{}, {"april": True}, {"embed_dim": 96, "num_heads": 6}], ids=str)
@pytest.mark.parametrize("number", [1, 3])
def test_the_mask_is_read_off_the_rows_even_under_noise(options, number):
    model = build(unknown=True, **options)
    for seed, ratio in enumerate((0.5, 0.25, 0.0)):
        private, leak = leak_of(model, ratio, number, seed)
        assert hidden_rows(leak).equal(private.mask[0])
        visible = leak.gradients["pos_embed"][0, 1:][~private.mask[0]]
        noise = Noise(std=0.1 * float(visible.std(dim=1).min()))
        protect = partial(noise.gradients, generator=torch.Generator().manual_seed(seed))
        noisy = leak_of(model, ratio, number, seed, defense=protect)[1]
        assert not (noisy.gradients["pos_embed"] == 0).any()
        assert hidden_rows(noisy).equal(private.mask[0])
        assert not hidden_rows(changed(noisy, "patch_embed.proj.bias", None)).any()  # then only zero rows count


def test_a_leak_holds_gradients_and_nothing_private():
    model = build(unknown=True, localization="nonlinear")
    private, leak = leak_of(model, ratio=0.5, number=2)
    public = [
        "model",
        "gradients",
        "image_shape",
        "batch_size",
        "mean",
        "std",
        "training",
        "attacker_knowledge",
        "public",
    ]
    told_on_purpose = ["labels", "local", "aggregate", "dropout_seed", "statistics", "mask", "source"]
    assert {field.name for field in fields(Leak)} == {*public, *told_on_purpose}
    assert (leak.image_shape, leak.batch_size, leak.training, leak.attacker_knowledge) == (
        (3, 32, 32),
        2,
        False,
        "method",
    )
    assert all(getattr(leak, name) is None for name in told_on_purpose)
    assert leak.model is model and not leak.public  # sentences that are the server's own
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(private.model_input, private.mask), private.labels), model.pos_embed
    )[0]
    torch.testing.assert_close(leak.gradients["pos_embed"], expected, rtol=1e-12, atol=1e-15)
    assert not any(key.startswith("localization") for key in leak.gradients)
    assert all(not gradient.requires_grad for gradient in leak.gradients.values())
    assert share(model, private, NO_NOISE, reveal_labels=True).labels.equal(private.labels)


def test_the_victims_jigsaw_depends_on_its_index_alone():
    model, images, labels = build(unknown=True), photographs(2), torch.tensor([0, 1])
    jigsaw = Jigsaw(model.grid, 0.5, "uniform", seed=1)
    one, other, again = (prepare(model, images, labels, jigsaw, index) for index in (0, 1, 0))
    assert one.mask.shape == (1, 16)
    assert one.mask.equal(again.mask) and one.model_input.equal(again.model_input)
    assert not one.mask.equal(other.mask)
    assert one.images.equal(images)


def test_an_attacker_who_knows_the_noise_solves_as_far_as_it_allows():
    """The ridge beats the plain solution on noisy gradients, and none of it is left where there is no noise."""
    model = build_model("vit", image_size=32, patch_size=4, embed_dim=96, depth=2, num_heads=3, num_classes=5).eval()
    images = torch.nn.functional.interpolate(
        torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=32, mode="bilinear"
    )
    private = prepare(model, images, torch.tensor([1]), Jigsaw(model.grid, 0.0, seed=0), 0)
    generator = torch.Generator().manual_seed(1)

    def noisy(gradients, step):
        return {k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in gradients.items()}

    leak = share(model, private, noisy, True)
    errors = [
        float((closed_form(leak, generator=generator, noise=noise).images - images).square().mean())
        for noise in (0.0, 1e-3)
    ]
    assert errors[1] < 0.8 * errors[0] and errors[1] < float(images.square().mean())
    assert not closed_form(leak, generator=generator, noise=1e-3).diagnostics["exact"]


def test_patches_that_share_a_row_share_what_it_gives_away():
    """Each square's one solution is the mixture of its patches: where these are equal, it is the picture."""
    model = build(positions="tied")
    squares = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).repeat(1, 1, 4, 4)
    images = nn.functional.interpolate(squares, scale_factor=16) * (0.5 + fine)
    private = prepare(model, images, torch.tensor([3]), Jigsaw(model.grid, 0.0), 0)
    found = reconstruct(share(model, private, NO_NOISE, reveal_labels=False), underdetermined=True)
    assert (found.images - images).abs().max() < 1e-6 and not found.diagnostics["exact"]
