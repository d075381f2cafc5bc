"""Schedules and weight decay against the official code's numbers, and when and where the jigsaw fires."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from models import build_model
from models.jigsaw import Jigsaw, patchify, shuffle_patches
from models.official import from_official
from training.masking import MaskPolicy
from training.optim import build_optimizer, build_schedule, localization_weight
from training.options import JigsawOptions, OptimOptions
from training.precision import Precision
from utils.distributed import Processes
from utils.errors import UserError

ALONE = Processes(0, 1, torch.device("cpu"))
PAIR = [Processes(rank, 2, torch.device("cpu")) for rank in (0, 1)]
MJP_SMALL = {
    "deit_s": {},
    "mjp_s_unk": {"unknown": True},
    "mjp_s_idx": {"unknown": True, "index_embed": True},
    "mjp_s_linear": {"unknown": True, "localization": "linear"},
    "mjp_s_nonlinear": {"unknown": True, "localization": "nonlinear"},
    "mjp_s_pca": {"unknown": True, "localization": "pca"},
}


@pytest.mark.parametrize(
    ("name", "epochs", "warmup"), [("base0.01_epochs300_warmup20", 300, 20), ("base0.01_epochs100_warmup5", 100, 5)]
)
def test_localization_weight_equals_the_official_schedule(golden, name, epochs, warmup):
    official = golden("mjp_reference_facts.json")["lambda_dlocr_schedule"][name]
    options = OptimOptions(epochs=epochs, warmup_epochs=warmup)
    own = [localization_weight(epoch, options) for epoch in range(epochs)]
    assert own == pytest.approx(official, rel=1e-12)


def test_localization_weight_rises_linearly_then_falls_to_half():
    weights = [localization_weight(epoch, OptimOptions()) for epoch in range(300)]
    assert weights[0] == 0
    assert weights[10] == pytest.approx(0.01 * 10 / 19)
    assert weights[19] == weights[20] == 0.01
    assert weights[160] == pytest.approx(0.0075)
    assert weights[299] == pytest.approx(0.005, rel=1e-3)
    assert all(later < earlier for earlier, later in zip(weights[20:], weights[21:], strict=False))


@pytest.mark.parametrize(("warmup", "first"), [(0, 0.01), (1, 0.01), (2, 0.0)])
def test_localization_weight_with_hardly_any_warm_up(warmup, first):
    options = OptimOptions(epochs=10, warmup_epochs=warmup)
    assert localization_weight(0, options) == first
    assert localization_weight(warmup, options) == 0.01
    nothing_else = OptimOptions(epochs=2, warmup_epochs=2)  # as many epochs of warm-up as there are epochs
    assert localization_weight(2, nothing_else) == 0.01


def learning_rates(
    kind: str, base: float, updates: int, warmup: int, warmup_lr: float = 5e-7, min_lr: float = 5e-6
) -> Iterator[float]:
    """The rate before the first update, then the rate of every update."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    rates = {"schedule": kind, "warmup_lr": warmup_lr, "min_lr": min_lr}
    schedule = build_schedule(optimizer, OptimOptions(epochs=updates, warmup_epochs=warmup, **rates), 1, 1.0)
    yield optimizer.param_groups[0]["lr"]
    for update in range(updates):
        schedule.step_update(update)
        yield optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
def test_learning_rates_equal_the_official_ones(golden, kind):
    official = golden("mjp_reference_facts.json")["lr_schedule"][kind]
    per_epoch = official["iters_per_epoch"]
    updates, warmup = official["epochs"] * per_epoch, official["warmup_epochs"] * per_epoch
    rates = learning_rates(
        kind, official["base_lr"], updates, warmup, warmup_lr=official["warmup_lr"], min_lr=official["min_lr"]
    )
    # Entry i stands after update i * stride - 1, entry 0 before the first.
    assert list(rates)[:: official["stride"]] == pytest.approx(official["lr_after_update"], rel=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear", "step"])
def test_learning_rates_warm_up_linearly(kind):
    initial, *rates = learning_rates(kind, 1.0, 300, 100, warmup_lr=0.1)
    assert initial == rates[0] == 0.1
    assert rates[50] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.991)
    assert max(rates) <= 1


def test_cosine_counts_from_the_first_update():
    rates = list(learning_rates("cosine", 1.0, 300, 30, min_lr=0.01))[1:]
    for update in (30, 100, 150, 299):
        assert rates[update] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * update / 300)) / 2)


def test_linear_falls_to_a_hundredth_from_the_end_of_the_warm_up():
    rates = list(learning_rates("linear", 1.0, 300, 100, min_lr=0.5))[1:]
    assert rates[100] == pytest.approx(1)
    assert rates[200] == pytest.approx(1 - 0.99 / 2)
    assert rates[299] == pytest.approx(0.01 + 0.99 / 200)


def test_step_divides_by_ten_at_each_third_of_the_updates():
    rates = list(learning_rates("step", 1.0, 300, 30))[1:]
    assert rates[30] == rates[99] == 1
    assert rates[100] == rates[199] == pytest.approx(0.1)
    assert rates[200] == rates[299] == pytest.approx(0.01)


def decayed(model: nn.Module, decay_pos_embed: bool) -> dict[float, set[str]]:
    """Names of the parameters by their weight decay."""
    optimizer = build_optimizer(model, OptimOptions(betas=(0.9, 0.99), decay_pos_embed=decay_pos_embed), 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[float, set[str]] = {}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.99), 1e-8)
        groups.setdefault(group["weight_decay"], set()).update(names[id(item)] for item in group["params"])
    assert sum(len(group) for group in groups.values()) == len(names)
    return groups


@pytest.mark.parametrize("name", MJP_SMALL)
def test_weight_decay_falls_on_the_official_parameters(golden, name):
    official = golden("mjp_reference_facts.json")["models"][name]

    def own_names(names: list[str]) -> set[str]:
        return set(from_official({key: torch.empty(official["names_shapes"][key]) for key in names}))

    with torch.device("meta"):
        model = build_model("deit_small", **MJP_SMALL[name])
    assert decayed(model, decay_pos_embed=name != "deit_s") == {
        0.05: own_names(official["weight_decay_names"]),
        0.0: own_names(official["no_weight_decay_names"]),
    }


@pytest.mark.parametrize("decay_pos_embed", [False, True])
def test_position_embeddings_are_decayed_together_or_not_at_all(decay_pos_embed):
    with torch.device("meta"):
        model = build_model("deit_tiny", unknown=True, index_embed=True)
    groups = decayed(model, decay_pos_embed)
    assert {"pos_embed", "unknown_pos_embed", "index_embed"} <= groups[0.05 if decay_pos_embed else 0.0]
    assert "cls_token" in groups[0.0]


@pytest.mark.parametrize("name", ["vit", "swin_tiny", "resnet50"])
@pytest.mark.parametrize("decay_pos_embed", [False, True])
def test_biases_and_norms_are_never_decayed(name, decay_pos_embed):
    with torch.device("meta"):
        model = build_model(name, image_size=32)
    groups = decayed(model, decay_pos_embed)
    vectors = {key for key, parameter in model.named_parameters() if parameter.ndim == 1}
    assert vectors <= groups[0.0]
    assert len(groups[0.05]) > 10


@pytest.mark.parametrize("name", ["vit", "swin_tiny"])
def test_position_embeddings_are_decayed_only_when_asked_to(name):
    with torch.device("meta"):
        model = build_model(name, image_size=32, unknown=True, localization="nonlinear")
    tables = {"pos_embed", "unknown_pos_embed"}
    without, with_tables = decayed(model, decay_pos_embed=False), decayed(model, decay_pos_embed=True)
    assert tables <= without[0.0]
    assert with_tables[0.05] - without[0.05] == tables
    for groups in (without, with_tables):
        assert {"patch_embed.proj.weight", "localization.layers.0.weight"} <= groups[0.05]
        assert {"patch_embed.proj.bias", "localization.layers.0.bias", "norm.weight", "norm.bias"} <= groups[0.0]


def policy(**changes) -> MaskPolicy:
    options = {"mask_ratio": 0.5, "probability": 1.0, "start_epoch": 0, "mask_sampler": "uniform"}
    return MaskPolicy((4, 4), JigsawOptions(min_block=2, max_block=8, **options | changes), 3)


def batch(number: int = 4) -> Tensor:
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_the_jigsaw_fires_at_the_stated_rate(probability):
    mask_policy, images, steps = policy(probability=probability), batch(1), 1000
    fired = 0
    for _ in range(steps):
        shown, mask, _ = mask_policy(images, 0, 4, ALONE)
        assert int(mask.sum()) in (0, 8)
        assert mask.any() or shown is images
        fired += bool(mask.any())
    assert abs(fired - probability * steps) <= 4 * math.sqrt(steps * probability * (1 - probability))


def test_the_jigsaw_waits_for_its_first_epoch():
    mask_policy, images = policy(start_epoch=20), batch()
    for epoch in range(20):
        shown, mask, _ = mask_policy(images, epoch, 4, ALONE)
        assert shown is images
        assert (mask.shape, mask.dtype) == ((1, 16), torch.bool)
        assert not mask.any()
    assert mask_policy(images, 20, 4, ALONE)[1].any()
    untouched = policy(start_epoch=20)(images, 20, 4, ALONE)
    assert policy(start_epoch=0)(images, 20, 4, ALONE)[0].equal(untouched[0])


def test_ratio_zero_turns_the_jigsaw_off():
    mask_policy, images = policy(mask_ratio=0.0), batch()
    before = mask_policy.jigsaw.state_dict()
    for epoch in range(50):
        shown, mask, _ = mask_policy(images, epoch, 4, ALONE)
        assert shown is images
        assert not mask.any()
    assert mask_policy.jigsaw.state_dict() == before


def test_one_mask_serves_the_global_batch():
    images = batch()
    shown, mask, _ = policy()(images, 0, 4, ALONE)
    jigsaw = Jigsaw((4, 4), 0.5, "uniform", 2, 8, seed=3)
    jigsaw.rng.random()  # the coin
    expected_mask, source = jigsaw.draw()
    assert mask.equal(expected_mask)
    assert shown.equal(shuffle_patches(images, source, 4))
    assert not shown.equal(images)
    for processes in PAIR:
        part, part_mask, _ = policy()(images[processes.rank :: 2], 0, 4, processes)
        assert part_mask.equal(mask)
        assert part.equal(shown[processes.rank :: 2])


def test_a_mask_per_sample_is_the_same_however_the_batch_is_spread():
    images, alone = batch(), policy(per_sample=True)
    parts = [policy(per_sample=True) for _ in PAIR]
    for step in range(3):
        shown, mask, _ = alone(images, 0, 4, ALONE)
        assert mask.shape == (4, 16)
        assert len({tuple(row) for row in mask.tolist()}) > 1
        for processes in PAIR:
            part, part_mask, _ = parts[processes.rank](images[processes.rank :: 2], 0, 4, processes)
            assert part_mask.equal(mask[processes.rank :: 2]), step
            assert part.equal(shown[processes.rank :: 2]), step


def test_pixel_patch_shuffle_moves_pixels_and_masks_nothing():
    images = batch()
    shown, mask, _ = policy(shuffle="pps")(images, 0, 4, ALONE)
    assert (mask.shape, mask.any().item()) == ((1, 16), False)
    assert not shown.equal(images)
    assert shown.flatten(2).sort().values.equal(images.flatten(2).sort().values)
    before, after = (patchify(x, 4).sort(dim=2).values for x in (images, shown))
    for image in range(4):
        assert sorted(before[image].tolist()) == sorted(after[image].tolist())


@pytest.mark.parametrize(("amp", "dtype"), [("none", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_of_the_forward_pass(amp, dtype):
    precision = Precision(amp, "highest", torch.device("cpu"))
    with precision.forward():
        assert nn.Linear(4, 2)(torch.ones(1, 4)).dtype == dtype
    assert not precision.scaler.is_enabled()


def test_half_precision_needs_a_gpu():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Precision("fp16", "highest", torch.device("cpu"))


@pytest.mark.parametrize(("epoch", "rate"), [(19, None), (20, 5e-4), (29, 5e-4), (30, 5e-5), (65, 5e-6), (95, 5e-7)])
def test_official_steps_of_thirty_epochs_in_a_run_of_300(epoch, rate):
    """Three decays by epoch 95: the official scheduler counts epochs from the start, warm-up included."""
    official = Path(__file__).parents[2] / "configs/train/official.yaml"
    options = OptimOptions(**yaml.safe_load(official.read_text())["optim"] | {"schedule": "step"})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-4)
    schedule = build_schedule(optimizer, options, 10, 1.0)
    schedule.step_update(10 * epoch)
    expected = 5e-7 + (5e-4 - 5e-7) * 190 / 200 if rate is None else rate
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


def test_sgd_moves_with_nesterov_momentum_and_decays_what_adamw_decays():
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(model, OptimOptions(optimizer="sgd", momentum=0.8, weight_decay=0.1), 0.5)
    weight, velocity = model.weight.detach().clone(), torch.zeros(1, 2)
    for step in range(1, 4):
        model.weight.grad, model.bias.grad = torch.full((1, 2), float(step)), torch.zeros(1)
        optimizer.step()
        direction = step + 0.1 * weight
        velocity = 0.8 * velocity + direction
        weight = weight - 0.5 * (direction + 0.8 * velocity)
    torch.testing.assert_close(model.weight.detach(), weight)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
