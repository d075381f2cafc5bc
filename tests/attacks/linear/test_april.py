"""attacks/linear/april.py: exact on the model it was made for, an honest failure or a refusal on others."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from attacks.linear.april import april
from attacks.threat_model.client import PrivateBatch, prepare, share
from attacks.threat_model.leak import Leak, LocalSteps, Reconstruction
from defenses import no_defense
from models import build_model
from models.jigsaw import Jigsaw
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 4}
GOLDEN = {"image_size": 32, "patch_size": 4, "embed_dim": 96, "num_heads": 4}


def build(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    return build_model("vit", num_classes=10, **{**SMALL, "april": True, **options}).to(dtype)


def leak_of(model: nn.Module, ratio: float = 0.0, number: int = 1, seed: int = 0) -> tuple[PrivateBatch, Leak]:
    generator = torch.Generator().manual_seed(seed)
    images = 2 * torch.rand(number, 3, 32, 32, generator=generator).to(next(model.parameters()).dtype) - 1
    jigsaw = Jigsaw(model.grid, ratio, "uniform", seed=seed)
    private = prepare(model, images, torch.arange(number), jigsaw, 0)
    scale = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return private, share(model, private, partial(no_defense, generator=generator), reveal_labels=False, **scale)


def reconstruct(leak: Leak) -> Reconstruction:
    return april(leak, generator=torch.Generator())


def psnr(image: Tensor, reconstruction: Tensor, mean: float = 0.5, std: float = 0.5) -> float:
    """In dB, over pixels in [0, 1]."""
    truth, found = ((x.double() * std + mean).clamp(0, 1) for x in (image, reconstruction))
    return -10 * (truth - found).square().mean().log10().item()


@pytest.mark.parametrize(
    ("dtype", "decibels", "options"),
    [
        (torch.float64, 150, {}),
        (torch.float64, 150, {"depth": 6}),
        (torch.float64, 150, {"patch_size": 4}),
        (torch.float64, 150, {"unknown": True, "localization": "nonlinear"}),
        (torch.float32, 50, {}),
        (torch.float32, 50, {"depth": 6}),
    ],
)
def test_the_image_is_exact(options, dtype, decibels):
    private, leak = leak_of(build(dtype, **options))
    result = reconstruct(leak)
    # In single precision the patch projection makes about 0.1 % of the rounding: not always an exact picture.
    assert result.diagnostics["exact"] or dtype == torch.float32
    assert result.diagnostics["rank"] == result.diagnostics["unknowns"] == leak.gradients["pos_embed"].shape[1]
    assert result.diagnostics["residual"] < (1e-10 if dtype == torch.float64 else 1e-4)
    assert psnr(private.model_input, result.images) > (max(60, decibels) if result.diagnostics["exact"] else decibels)


def test_an_index_embedding_is_subtracted_too():
    model = build(index_embed=True)
    nn.init.normal_(model.index_embed, generator=torch.Generator().manual_seed(1))
    private, leak = leak_of(model)
    assert psnr(private.model_input, reconstruct(leak).images) > 150


def test_only_two_gradients_are_used():
    _, leak = leak_of(build())
    few = {name: leak.gradients[name] for name in ("pos_embed", "blocks.0.attn.qkv.weight")}
    assert reconstruct(replace(leak, gradients=few)).images.equal(reconstruct(leak).images)


@pytest.mark.parametrize("count", [1, 4])
def test_hidden_patches_spoil_the_system_and_it_says_so(count):
    model = build(unknown=True)
    private, leak = leak_of(model, ratio=count / 16)
    result = reconstruct(leak)
    assert int(private.mask.sum()) == count
    assert result.diagnostics["rank"] == result.diagnostics["unknowns"] - count
    assert not result.diagnostics["exact"]
    assert psnr(private.model_input, result.images) < 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_block_read_out_at_the_class_token_is_not_enough(dtype):
    private, leak = leak_of(build(dtype, depth=1))
    result = reconstruct(leak)
    assert result.diagnostics["rank"] == 2 * 4 + 1
    assert not result.diagnostics["exact"]
    assert psnr(private.model_input, result.images) < 40


def test_the_variant_differs_in_its_first_block_alone():
    plain, variant = build(april=False).state_dict(), build().state_dict()
    assert plain.keys() - variant.keys() == {"blocks.0.norm1.weight", "blocks.0.norm1.bias"}
    assert all(variant[key].equal(plain[key]) for key in variant)
    model, tokens = build(), torch.randn(1, 17, 192, dtype=torch.float64)
    first = model.blocks[0]
    torch.testing.assert_close(first(tokens), first.mlp(first.norm2(first.attn(tokens))))


def mixed(leak: Leak) -> Leak:
    return replace(leak, local=LocalSteps(2, 0.1, 1))


def without_embedding(leak: Leak) -> Leak:
    return replace(leak, gradients={name: value for name, value in leak.gradients.items() if name != "pos_embed"})


def silent(leak: Leak) -> Leak:
    return replace(leak, gradients=leak.gradients | {"pos_embed": torch.zeros_like(leak.gradients["pos_embed"])})


@pytest.mark.parametrize(
    ("options", "number", "change", "problem"),
    [
        ({"april": False}, 1, None, "april=true"),
        ({"embed_dim": 48}, 1, None, "192 pixel values to 48 dimensions"),
        ({}, 2, None, "batch_size 1"),
        ({}, 1, mixed, "local_steps 1"),
        ({}, 1, without_embedding, "needs the gradient of 'pos_embed'"),
        ({}, 1, silent, "zero everywhere"),
    ],
)
def test_what_it_cannot_attack_is_refused(options, number, change: Callable | None, problem):
    _, leak = leak_of(build(**options), number=number)
    with pytest.raises(UserError, match=problem) as caught:
        reconstruct(change(leak) if change else leak)
    assert "\n" not in str(caught.value)


def test_other_networks_are_refused():
    model = build_model("lenet", num_classes=10)
    with pytest.raises(UserError, match="needs a ViT"):
        reconstruct(Leak(model, {}, (3, 32, 32), 1))


@pytest.fixture
def reference(golden) -> dict:
    return golden("april") | golden("april_block0") | golden("april_block1")


def golden_leak(reference: dict, dtype: torch.dtype, depth: int = 2) -> tuple[Tensor, Leak, nn.Module]:
    model = build(dtype, depth=depth, **GOLDEN).eval()
    weights = {key[3:]: torch.tensor(value) for key, value in reference.items() if key.startswith("sd/")}
    model.load_state_dict({key: value for key, value in weights.items() if depth > 1 or "blocks.1" not in key})
    image = (torch.tensor(reference["image"]).permute(2, 0, 1)[None].to(dtype) / 255 - 0.5) / 0.25
    loss = nn.functional.cross_entropy(model(image), torch.tensor(reference["label"]))
    names = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(names.values()))
    scale = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return image, Leak(model, dict(zip(names, gradients, strict=True)), (3, 32, 32), 1, **scale), model


def test_the_model_is_that_of_the_reference(golden, reference):
    about = golden("april.json")
    image, leak, model = golden_leak(reference, torch.float64)
    assert [name for name, _ in model.named_parameters()] == about["param_order"]
    torch.testing.assert_close(model(image).detach(), torch.tensor(reference["logits"]), rtol=1e-8, atol=1e-10)
    norms = torch.stack([value.norm() for value in leak.gradients.values()])
    torch.testing.assert_close(norms, torch.tensor(reference["gradnorms"]), rtol=1e-7, atol=0)
    for key, value in reference.items():
        if key.startswith("grad_f64/"):
            ours = leak.gradients[key[9:]]
            ours = ours[::9] if "qkv" in key else ours  # every ninth row is stored
            torch.testing.assert_close(ours, torch.tensor(value), rtol=1e-7, atol=1e-12)


def test_the_reconstruction_is_that_of_the_reference(golden, reference):
    scalars = golden("april.json")["scalars"]
    image, leak, _ = golden_leak(reference, torch.float64)
    result, errors = reconstruct(leak), scalars["errors_f64"]["value"]
    assert (result.images - image).abs().max() < 100 * errors["max_abs"]
    assert (result.images[0] - torch.tensor(reference["rec_f64"])).abs().max() < 100 * errors["max_abs"]
    assert psnr(image, result.images, 0.5, 0.25) > 60
    assert result.diagnostics["condition"] == pytest.approx(errors["cond_A"], rel=1e-6)
    assert result.diagnostics["exact"]


def test_single_precision_gradients_reconstruct_as_well_as_the_reference(golden, reference):
    scalars = golden("april.json")["scalars"]
    image, leak, _ = golden_leak(reference, torch.float32)
    leaked = {key[9:]: torch.tensor(value) for key, value in reference.items() if key.startswith("grad_f32/")}
    expected = scalars["errors_f32"]["value"]["mse_pixels_clamped"]
    for gradients in (leaked, leak.gradients):
        found = 10 ** (-psnr(image, reconstruct(replace(leak, gradients=gradients)).images, 0.5, 0.25) / 10)
        assert expected / 10 < found < expected * 10


def test_the_counterexample_of_the_reference_fails_alike(golden, reference):
    scalars = golden("april.json")["scalars"]
    image, leak, _ = golden_leak(reference, torch.float64, depth=1)
    result, expected = reconstruct(leak), scalars["depth1_counterexample"]["value"]
    assert (result.diagnostics["rank"], result.diagnostics["unknowns"]) == (expected["rank_A"], expected["n_tokens"])
    assert not result.diagnostics["exact"]
    assert (result.images - image).abs().max().item() == pytest.approx(expected["max_abs_error"], rel=1e-6)
