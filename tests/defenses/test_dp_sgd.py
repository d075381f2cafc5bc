"""DP-SGD in training: what is clipped, what is noised, and that the loss trained is the loss printed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from data.loaders import Batch
from defenses import DEFENSES, build_defense
from defenses.base import Recipe
from models import build_model
from models.task import Task, reached_by_examples
from training.masking import MaskPolicy
from training.options import JigsawOptions, LogOptions, OptimOptions
from training.trainer import Trainer
from utils.distributed import Processes
from utils.errors import UserError

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
BATCH = 4
MODELS = {
    "plain": {},
    "localization": {"unknown": True, "localization": "nonlinear"},
    "linear localization": {"unknown": True, "localization": "linear"},
    "pca": {"unknown": True, "localization": "pca"},
    "bottleneck": {"bottleneck": 6},
    "both": {"unknown": True, "localization": "nonlinear", "bottleneck": 6},
    "stochastic depth": {"unknown": True, "localization": "nonlinear", "bottleneck": 6, "drop_path": 0.5},
}


def trainer(model: nn.Module, defense: str = "none", *, per_sample=False, amp="none", mixup=0.0, ema=0.0, **options):
    """One update is two steps, so that after one the gradients lie there, half of them."""
    puzzle = {"mask_ratio": 0.5, "probability": 1.0, "start_epoch": 0, "move": "pixels", "min_block": 2}
    policy = MaskPolicy(model.grid, JigsawOptions(per_sample=per_sample, **puzzle), 0)
    losses = {"localization_weight": 0.7, "label_smoothing": 0.1, "mixup": mixup, "cutmix": 0, "warmup_epochs": 0}
    made = Trainer(
        model.train(),
        Processes(0, 1, torch.device("cpu")),
        policy,
        OptimOptions(epochs=2, accumulation=2, amp=amp, ema=ema, **losses),
        LogOptions(checkpoint_minutes=0),
        steps=4,
        batch_size=BATCH,
        num_classes=5,
        seed=0,
        defense=build_defense(defense, options),
        normalize={"mean": (0.5,) * 3, "std": (0.25,) * 3},
    )
    if (layer := getattr(model, "localization", None)) is not None and layer.layers is not None:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(3))
    return made


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(5, (BATCH,), generator=generator)
    return Batch(images, labels, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def network(kind: str) -> nn.Module:
    return build_model("vit", **SMALL, pos_embed_std=1.0, **MODELS[kind])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_without_clipping_and_noise_it_is_the_gradient_of_the_loss_printed(kind, per_sample):
    """Under the same draws of depth and bottleneck: both draw them for the batch in the same order."""
    found = {}
    for defense, options in (("none", {}), ("dp_sgd", {"clip": float("inf"), "noise_multiplier": 0.0})):
        one = trainer(network(kind), defense, per_sample=per_sample, **options)
        loss = one._train_step(batch())
        found[defense] = (loss, one.sums, gradients(one.model))
    (loss, sums, plain), (same, totals, clipped) = found.values()
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(totals, sums, rtol=1e-5, atol=1e-6)
    assert plain.keys() == clipped.keys()
    for name, value in plain.items():
        torch.testing.assert_close(clipped[name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["localization", "both"])
def test_a_large_clip_trains_the_localization_head_as_no_defence_does(kind):
    found = []
    for defense, options in (("none", {}), ("dp_sgd", {"clip": 1e6, "noise_multiplier": 0.0})):
        one = trainer(network(kind), defense, **options)
        one._train_step(batch())
        found.append(one.model.localization.layers[2].bias.grad)
    assert found[0].abs().min() > 1e-3
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", ["localization", "pca"])
def test_no_image_reaches_the_localization_loss_or_its_head(kind):
    model, mask = network(kind), torch.zeros(1, 16, dtype=torch.bool)
    losses = [Task(model)(batch(seed).images, mask)[1] for seed in (0, 1)]
    assert losses[0].equal(losses[1])
    model.zero_grad()
    Task(model)(batch().images, mask)[0].square().sum().backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    assert reached == set(reached_by_examples(model))


def test_reduced_precision_is_that_of_the_loss():
    losses = [
        trainer(network("both"), defense, amp="bf16", **options)._train_step(batch())
        for defense, options in (("none", {}), ("dp_sgd", {"clip": 1e6, "noise_multiplier": 0.0}))
    ]
    full = trainer(network("both"))._train_step(batch())
    assert abs(losses[0] - losses[1]) < 0.3 * abs(losses[0] - full) + 1e-3 and not losses[1].equal(full)


@pytest.mark.parametrize("kind", MODELS)
def test_one_image_changes_the_sum_by_no_more_than_the_clip(kind):
    """The sum before noise of two steps; the other image is large, so that nothing but the clip bounds it."""
    clip, released = 0.01, []
    for other in (1.0, 50.0, -30.0):
        one = trainer(network(kind), "dp_sgd", clip=clip, noise_multiplier=0.0)
        shown = batch()
        shown.images[2] *= other
        one._train_step(shown)
        released.append(gradients(one.model))
    for one, two in ((0, 1), (0, 2), (1, 2)):
        change = torch.stack([(released[one][name] - released[two][name]).norm() for name in released[one]]).norm()
        assert 0 < change * 2 * BATCH <= 2 * clip * (1 + 1e-4)  # replaced: taken away and another added


@pytest.mark.parametrize("accumulation", [1, 2])
def test_noise_is_added_once_per_update_to_what_images_reach(accumulation):
    seen = {}
    for z in (0.0, 3.0):
        one = trainer(network("localization"), "dp_sgd", clip=0.5, noise_multiplier=z)
        one.options, one.update_size = replace(one.options, accumulation=accumulation), BATCH * accumulation
        one._update = lambda update, one=one, z=z: seen.setdefault(z, []).append(copy.deepcopy(gradients(one.model)))
        for step in range(accumulation):
            one._train_step(batch(step))
            one.step += 1
    (clean,), (noisy,) = seen.values()  # one update each
    reached = reached_by_examples(network("localization"))
    added = torch.cat([(noisy[name] - clean[name]).flatten() for name in reached])
    assert added.std().item() == pytest.approx(3.0 * 0.5 / (BATCH * accumulation), rel=0.02)
    assert all(noisy[name].equal(clean[name]) for name in clean if name not in reached)


REFUSED = [
    ({"mixing": True}, "--optim.mixup 0 --optim.cutmix 0"),
    ({"repeats": 3}, "--augment.repeats 1"),
    ({"repeats": 2, "processes": 2}, "--augment.repeats 1"),
    ({"on_corrupt": "skip"}, "--data.on_corrupt error"),
    ({"compile": True}, "--optim.compile false"),
    ({"grad_checkpointing": True}, "--optim.grad_checkpointing false"),
    ({"amp": "fp16"}, "--optim.amp fp16"),
    ({"kind": "text"}, "--data.text.tokenizer"),
    ({"kind": "text", "tokenizer": "f", "localization": "relative"}, "--model.localization none"),
    ({"kind": "text", "tokenizer": "f", "shrinking_window": True}, "--jigsaw.shrinking_window false"),
]


@pytest.mark.parametrize("recipe, words", REFUSED)
def test_what_breaks_the_guarantee_per_image_is_refused(recipe, words):
    with pytest.raises(UserError, match=words):
        build_defense("dp_sgd", {}).check_training(Recipe(**recipe))
    build_defense("dp_sgd", {"clip": 0.0}).check_training(Recipe(**recipe))  # off


@pytest.mark.parametrize(
    "recipe",
    [
        {"processes": 8, "accumulation": 4, "amp": "bf16", "localization": "nonlinear"},
        {"kind": "text", "tokenizer": "f"},
    ],
)
def test_what_keeps_the_guarantee_is_accepted(recipe):
    build_defense("dp_sgd", {}).check_training(Recipe(**recipe))


@pytest.mark.parametrize("name", DEFENSES)
def test_defences_off_refuse_no_recipe(name):
    kind = DEFENSES[name]
    odd = Recipe(amp="fp16", processes=2, accumulation=2, mixing=True, repeats=3, compile=True, on_corrupt="skip")
    off = kind(**{kind.strength: kind.off}) if kind.strength else kind()
    off.check_training(odd)
    if kind.looks_at_images:
        with pytest.raises(UserError, match="one process without --optim.accumulation"):
            kind().check_training(Recipe(accumulation=2))


def test_an_unbounded_clip_takes_no_noise():
    with pytest.raises(UserError, match="clip must be finite"):
        build_defense("dp_sgd", {"clip": float("inf")})
    assert replace(build_defense("dp_sgd", {}), noise_multiplier=0.0, clip=float("inf")).active
