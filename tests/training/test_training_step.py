"""What a training step costs beyond the model's own arithmetic: no graph break, no wait for the device, no copy."""

import copy

import pytest
import torch
from torch import Tensor

from data.loaders import Batch
from data.options import DataOptions
from defenses import build_defense
from models import build_model
from models.jigsaw import Jigsaw, shuffle_patches
from models.localization import LOCALIZATION_HEADS, Localization
from models.options import ModelOptions
from models.position import given_mask
from models.task import Task
from options import TrainConfig
from training.masking import MaskPolicy, shuffled_where
from training.options import JigsawOptions, LogOptions, OptimOptions
from training.precision import Precision, choose_kernels
from training.trainer import Trainer
from utils.distributed import Processes
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
MJP = {"unknown": True, "localization": "nonlinear"}
CPU = torch.device("cpu")


def network(**options) -> torch.nn.Module:
    model = build_model("vit", **SMALL, pos_embed_std=1.0, **options)
    if options.get("index_embed"):
        torch.nn.init.normal_(model.index_embed, generator=torch.Generator().manual_seed(1))
    return model


def puzzle(number: int = 1) -> tuple[Tensor, Tensor]:
    return Jigsaw((4, 4), 0.5, "uniform", seed=2).draw(number)


def images(number: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)


def outcome(model, shown: Tensor, mask: Tensor | None, source: Tensor | None) -> list[Tensor]:
    """Logits and the gradient of every parameter that has one."""
    model.zero_grad()
    logits = model(shown, mask, source)
    logits.square().sum().backward()
    return [logits.detach()] + [value.grad for value in model.parameters() if value.grad is not None]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-12)) for a, b in zip(one, other, strict=True))


KINDS_OF_VIT = [{}, {"unknown": True}, {"unknown": True, "index_embed": True}, {"positions": "rotary"}]


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("options", KINDS_OF_VIT)
def test_moving_position_embeddings_is_shuffling_the_image(options, number):
    model, (mask, source) = network(**options).double(), puzzle(number)
    mask = given_mask(model, mask)
    pixels = outcome(model, shuffle_patches(images(), source, 8), mask, None)
    assert distance(pixels, outcome(model, images(), mask, source)) < 1e-12
    assert (
        distance(pixels, outcome(model, images(), None if mask is None else mask[:1], None)) > 1e-6 or mask is not None
    )


@pytest.mark.parametrize(
    "options", [{"unknown": True}, {"unknown": True, "positions": "sinusoidal"}, {"unknown": True, "april": True}]
)
def test_under_one_unknown_row_the_shuffle_changes_nothing(options):
    model, (mask, source) = network(**options).double(), puzzle(3)
    assert not model.order_matters
    pixels = outcome(model, shuffle_patches(images(), source, 8), mask, None)
    assert distance(pixels, outcome(model, images(), mask, None)) < 1e-12


@pytest.mark.parametrize("options", [{}, {"unknown": True, "index_embed": True}, {"positions": "rotary"}])
def test_where_the_order_matters_it_changes_the_output(options):
    model, (mask, source) = network(**options).double(), puzzle(3)
    assert model.order_matters
    mask = given_mask(model, mask)
    pixels = outcome(model, shuffle_patches(images(), source, 8), mask, None)
    assert distance(pixels, outcome(model, images(), mask, None)) > 1e-3


def test_the_cheapest_shuffle_is_chosen_and_pixels_on_demand():
    assert shuffled_where(network(**MJP), "auto", defended=False) == "nothing"
    assert shuffled_where(network(), "auto", defended=False) == "positions"
    assert shuffled_where(network(), "auto", defended=True) == "pixels"
    assert shuffled_where(network(), "pixels", defended=False) == "pixels"
    assert shuffled_where(build_model("lenet"), "auto", defended=False) == "pixels"


@pytest.mark.parametrize("per_sample", [False, True])
def test_policies_draw_the_same_wherever_they_shuffle(per_sample):
    config = JigsawOptions(mask_ratio=0.5, probability=0.5, start_epoch=0, per_sample=per_sample, min_block=2)
    alone = Processes(0, 1, CPU)
    policies = {move: MaskPolicy((4, 4), config, 0) for move in ("pixels", "positions", "nothing")}
    for _ in range(6):
        found = {move: policy(images(), 0, 8, alone, move) for move, policy in policies.items()}
        (pixels, mask, _), (still, same, source), (_, again, none) = found.values()
        assert mask.equal(same) and mask.equal(again) and none is None and still.equal(images())
        assert shuffle_patches(still, source, 8).equal(pixels)


def trainer(model, device: torch.device = CPU, move: str = "auto", **options) -> Trainer:
    puzzle = JigsawOptions(mask_ratio=0.5, probability=0.7, start_epoch=0, move=move)
    return Trainer(
        model.to(device),
        Processes(0, 1, device),
        MaskPolicy(model.grid, puzzle, 0),
        OptimOptions(epochs=2, warmup_epochs=0, **options),
        LogOptions(checkpoint_minutes=0),
        steps=4,
        batch_size=4,
        num_classes=5,
        seed=0,
        defense=build_defense("none", {}),
        normalize={"mean": (0.5,) * 3, "std": (0.25,) * 3},
    )


def batch(step: int) -> Batch:
    labels = torch.arange(4) % 5
    return Batch(images(4, torch.float32) + step, labels, torch.arange(4), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("options", [{}, MJP])
def test_steps_are_those_of_shuffled_pixels(options):
    found = []
    for move in ("auto", "pixels"):
        one = trainer(network(**options), move=move)
        stats = one.train_epoch(map(batch, range(4)), save=lambda: None)
        assert 0 < stats["masked"] < 0.5
        found.append([value.detach() for value in one.model.parameters()])
    assert distance(*found) < 1e-4  # AdamW divides by tiny second moments, which magnifies rounding


def test_a_checkpoint_is_due_inside_an_epoch_and_not_at_its_end():
    """The end of an epoch saves by itself, after the validation."""
    one, saved = trainer(network()), []
    one.check_every, one.checkpoint_seconds = 1, 1e-9
    one.train_epoch(map(batch, range(4)), save=lambda: saved.append(one.step))
    assert saved == [1, 2, 3]


def test_an_epoch_ends_at_the_start_of_the_next():
    one = trainer(network())
    for epoch in range(2):
        one.train_epoch(map(batch, range(4)), save=lambda: None)
        assert (one.epoch, one.step) == (epoch + 1, 0) and not one.sums.any()


def test_no_step_waits_for_the_device():
    """Tensors of the meta device have no values: whatever asks for one, or copies one to the host, fails."""
    one = trainer(network(unknown=True), torch.device("meta"), fused=False)
    for step in range(4):
        assert one._train_step(batch(step)).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        one.sums.tolist()


@pytest.mark.parametrize("kind", LOCALIZATION_HEADS)
def test_no_localization_head_waits_for_the_device(kind):
    head, (mask, _) = Localization(kind, 24, (4, 4)).to("meta"), puzzle(3)
    head(torch.empty(16, 24, device="meta", requires_grad=True), mask.to("meta")).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_no_step_waits_for_a_gpu():
    one = trainer(network(**MJP), torch.device("cuda", 0), ema=0.99)
    one._train_step(batch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        one._train_step(batch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["none", *LOCALIZATION_HEADS])
def test_a_masked_step_compiles_to_one_graph(kind):
    mask, source = puzzle()
    for options, moved in (({"unknown": True, "localization": kind}, None), ({}, source)):
        task = Task(network(**options))
        found = torch._dynamo.explain(task)(images(dtype=torch.float32), mask, moved)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
        torch._dynamo.reset()


def test_kernels_change_results_by_rounding_alone():
    model = network()
    other = copy.deepcopy(model)
    choose_kernels(other, "plain", channels_last=True)
    assert all(block.attn.fused_attn for block in model.blocks) and not any(b.attn.fused_attn for b in other.blocks)
    shown = images(dtype=torch.float32)
    torch.testing.assert_close(other(shown.contiguous(memory_format=torch.channels_last)), model(shown))


def test_kernels_that_do_not_apply_are_refused():
    for model in (build_model("lenet"), network(positions="rotary")):
        with pytest.raises(UserError, match="--optim.attention plain"):
            choose_kernels(model, "plain", channels_last=False)
    with pytest.raises(UserError, match="--optim.grad_checkpointing: this model has no blocks"):
        trainer(build_model("lenet", num_classes=5), grad_checkpointing=True)
    with pytest.raises(UserError, match="--optim.channels_last"):
        TrainConfig(
            output="run",
            data=DataOptions(kind="text"),
            model=ModelOptions(name="text_small"),
            optim=OptimOptions(mixup=0, cutmix=0, channels_last=True),
        )


def test_precision_of_products_is_measured_and_restored():
    before = torch.get_float32_matmul_precision()
    for matmul in ("highest", "high"):
        precision = Precision("none", matmul, CPU)
        with precision.products():
            assert torch.get_float32_matmul_precision() == matmul
        assert torch.get_float32_matmul_precision() == before
        assert precision.error() < 1e-5
