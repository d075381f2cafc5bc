"""priors.py against values worked out by hand, its promises on flat images, and reference implementations."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from attacks.matching.priors import (
    BatchNormStatistics,
    LayerInputs,
    batch_norm_distance,
    channel_statistics,
    consensus,
    feature_distance,
    feature_targets,
    group,
    l2_norm,
    mean_power,
    median_filter,
    orthogonality,
    patch_border,
    running_statistics,
    shuffled_seams,
    total_variation,
)
from utils.errors import UserError

OF_INVERTING_GRADIENTS = partial(total_variation, border="none", eps=0.0)
ISOTROPIC = {"inner_exp": 2.0, "outer_exp": 0.5}
CASES = {
    "total_variation": total_variation,
    "anisotropic, inner pixels": OF_INVERTING_GRADIENTS,
    "isotropic": partial(total_variation, **ISOTROPIC),
    "isotropic, inner pixels": partial(total_variation, border="none", **ISOTROPIC),
    "opponents": partial(total_variation, double_opponents=True, **ISOTROPIC),
    "steep": partial(total_variation, inner_exp=2.0, outer_exp=1.25),
    "mean_power": mean_power,
    "mean_power 4": partial(mean_power, exponent=4.0),
    "l2_norm": l2_norm,
    "orthogonality": orthogonality,
    "patch_border": partial(patch_border, patch_size=4),
    "patch_border mean_square": partial(patch_border, patch_size=4, form="mean_square"),
    "group": lambda images: group(images, images.detach()),
    "batch_norm_distance": lambda images: batch_norm_distance(
        [channel_statistics(images)], [channel_statistics(images.detach())]
    ),
}


def pictures(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plane(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[None, None]


# Values

STEPS = plane([[0, 1, 1], [0, 1, 1], [2, 1, 1]])  # |dx|: 1 0 / 1 0 / 1 0; |dy|: 0 0 0 / 2 0 0


def test_total_variation_by_hand():
    assert OF_INVERTING_GRADIENTS(STEPS).item() == pytest.approx(3 / 6 + 2 / 6)
    # With zeros beyond the edge: the right column adds 1 + 1 + 1, the last row 2 + 1 + 1, over 9 pixels.
    assert total_variation(STEPS, eps=0.0).item() == pytest.approx((3 + 2 + 3 + 4) / 9)
    inner = [math.hypot(1, 0), 0, math.hypot(1, 2), 0]  # the pixels with both neighbours
    isotropic = total_variation(STEPS, border="none", eps=0.0, **ISOTROPIC)
    assert isotropic.item() == pytest.approx(sum(inner) / 4)
    padded = total_variation(STEPS, eps=0.0, **ISOTROPIC)
    edge = [1, 1, math.hypot(1, 2), math.hypot(0, 1), math.hypot(1, 1)]
    assert padded.item() == pytest.approx((sum(inner) + sum(edge)) / 9)
    squared = total_variation(STEPS, inner_exp=2.0, border="none", eps=0.0)
    assert squared.item() == pytest.approx(3 / 6 + 4 / 6)


def test_only_the_padded_variation_penalises_a_flat_image():
    flat = torch.full((1, 3, 4, 4), 2.0)
    assert OF_INVERTING_GRADIENTS(flat) == 0
    assert total_variation(flat, eps=0.0).item() == pytest.approx(2 * 8 / 16)


def test_double_opponents_add_the_three_differences_of_colours():
    images = pictures(0, 2, 3, 5, 5)
    red, green, blue = images.split(1, dim=1)
    channels = [red, green, blue, red - green, red - blue, green - blue]
    expected = torch.stack([total_variation(channel) for channel in channels]).mean()
    torch.testing.assert_close(total_variation(images, double_opponents=True), expected)
    with pytest.raises(UserError, match="three colour channels, the images have 1"):
        total_variation(STEPS, double_opponents=True)


def test_norms_and_group_by_hand():
    images = plane([[3, 0], [0, -4]])
    assert mean_power(images).item() == pytest.approx((9 + 16) / 4 / 2)
    assert mean_power(images, exponent=4.0).item() == pytest.approx((81 + 256) / 4 / 4)
    assert l2_norm(images).item() == pytest.approx(5)
    assert group(images, images - 1).item() == pytest.approx(2)


def test_orthogonality_counts_every_ordered_pair():
    images = pictures(0, 3, 2, 4, 4)
    expected = sum((images[i] * images[j]).square().mean() for i in range(3) for j in range(3) if i != j)
    torch.testing.assert_close(orthogonality(images), expected)
    assert orthogonality(images[:1]) == 0


def test_patch_border_sees_seams_and_nothing_else():
    smooth_patches = torch.zeros(2, 3, 8, 12, dtype=torch.float64)
    smooth_patches[..., 4:, :] += 1  # one horizontal seam of height 1
    smooth_patches[..., 8:] += 2  # the second of two vertical seams, of height 2
    found = patch_border(smooth_patches, patch_size=4)
    assert found.item() == pytest.approx(math.sqrt(2 * 3 * 12) + 2 * math.sqrt(2 * 3 * 8), abs=1e-5)
    squares = patch_border(smooth_patches, patch_size=4, form="mean_square")
    assert squares.item() == pytest.approx(1 + 4 / 2)
    inside = torch.zeros(1, 1, 8, 8)
    inside[..., 1:3, 5:7] = inside[..., 0, :] = inside[..., 0] = 7.0
    assert patch_border(inside, patch_size=4).item() == pytest.approx(0, abs=1e-5)
    with pytest.raises(UserError, match="8 px patches leave none"):
        patch_border(inside, patch_size=8)


HOLES = torch.tensor([False, False, False, False, True, False])  # the middle of the lower row of 2 x 3 patches


def test_seams_are_the_borders_of_holes():
    right, down = shuffled_seams(HOLES, (2, 3), 4)
    expected = torch.zeros(2, 8, 12, dtype=torch.bool)
    expected[0, 4:, 3] = expected[0, 4:, 7] = expected[1, 3, 4:8] = True
    assert right.equal(expected[0]) and down.equal(expected[1])
    assert not any(seam.any() for seam in shuffled_seams(torch.zeros(6, dtype=torch.bool), (2, 3), 4))


@pytest.mark.parametrize("prior", [total_variation, OF_INVERTING_GRADIENTS, partial(patch_border, patch_size=4)])
def test_what_stands_in_a_hole_does_not_matter_at_its_borders(prior):
    images = pictures(3, 2, 3, 8, 12)
    flat = images.clone()
    flat[..., 4:8, 4:8] = 0.0  # on black ground also a hole at the edge of the picture jumps nowhere
    other = flat.clone()
    other[..., 4:8, 4:8] = 5.0
    seams = shuffled_seams(HOLES, (2, 3), 4)
    bottom = 2 * 3 * 4 * 5 / (2 * 3 * 8 * 12) if prior is total_variation else 0.0  # zeros lie below the picture
    assert prior(other, seams=seams).item() == pytest.approx(prior(flat, seams=seams).item() + bottom)
    assert prior(other) > prior(other, seams=seams) + 0.01
    nowhere = shuffled_seams(torch.zeros(6, dtype=torch.bool), (2, 3), 4)
    assert prior(images, seams=nowhere).equal(prior(images))
    batch, holes = pictures(4, 3, 2, 3, 8, 12), torch.stack([HOLES, ~HOLES, HOLES.roll(1)])
    found = vmap(grad(lambda x, h: prior(x, seams=shuffled_seams(h, (2, 3), 4))))(batch, holes)
    for k in range(3):
        alone = grad(lambda x, h=holes[k]: prior(x, seams=shuffled_seams(h, (2, 3), 4)))(batch[k])
        torch.testing.assert_close(found[k], alone)


def test_unknown_names_are_refused():
    images = pictures(0, 1, 3, 8, 8)
    with pytest.raises(UserError, match="unknown border 'reflect'"):
        total_variation(images, border="reflect")
    with pytest.raises(UserError, match="unknown form 'max'"):
        patch_border(images, patch_size=4, form="max")
    with pytest.raises(UserError, match="unknown form 'l1'"):
        batch_norm_distance([channel_statistics(images)], [channel_statistics(images)], form="l1")


# The promises the loop relies on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_flat_images_have_finite_derivatives(name, dtype):
    for value in (0.0, 0.5):
        images = torch.full((2, 3, 8, 8), value, dtype=dtype)
        slope = grad(CASES[name])
        second = grad(lambda own, slope=slope: (slope(own) * pictures(1, 2, 3, 8, 8, dtype=dtype)).sum())(images)
        assert CASES[name](images).isfinite()
        assert slope(images).isfinite().all()
        assert second.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_vectorised_over_problems_equals_one_by_one(name):
    images = pictures(0, 3, 2, 3, 8, 8)
    values, slopes = vmap(lambda own: (CASES[name](own), grad(CASES[name])(own)))(images)
    for k in range(3):
        torch.testing.assert_close(values[k], CASES[name](images[k]))
        torch.testing.assert_close(slopes[k], grad(CASES[name])(images[k]))


# BatchNorm statistics and features


def small_cnn(seed: int = 0) -> nn.Module:
    """Two BatchNorm layers, registered in the order opposite to the one they are called in."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.BatchNorm2d(4), nn.BatchNorm2d(3)
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.late(self.conv(self.early(images))).relu().mean(dim=(2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net().double().eval()
        net.early.running_mean.normal_()
        net.late.running_var.uniform_(0.5, 2)
    return net


def test_statistics_are_those_of_the_inputs_in_the_order_of_the_calls():
    net, images = small_cnn(), pictures(0, 4, 3, 6, 6)
    with BatchNormStatistics(net) as seen:
        net(images)
        assert seen.names == ["early", "late"]
        (mean, variance), second = seen.values
        net(images)
        assert seen.names == ["early", "late"] and len(seen.values) == 4
        torch.testing.assert_close(seen.values[3], second)
    pixels = images.transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, pixels.mean(dim=1))
    torch.testing.assert_close(variance, pixels.var(dim=1, unbiased=False))
    with torch.no_grad():
        torch.testing.assert_close(second, channel_statistics(net.conv(net.early(images))))


def test_recorders_leave_no_hooks_behind():
    net, images = small_cnn(), pictures(0, 4, 3, 6, 6)
    for _ in range(3):
        with BatchNormStatistics(net) as seen:
            net(images)
    with pytest.raises(RuntimeError), LayerInputs(net, ["head"]):
        raise RuntimeError
    assert len(seen.values) == 2
    net(images)
    assert len(seen.values) == 2
    assert not any(layer._forward_pre_hooks for layer in net.modules())


@pytest.mark.parametrize("form", ["norm", "mse"])
def test_batch_norm_distance(form):
    mine = [(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])), (torch.tensor([1.0]), torch.tensor([5.0]))]
    wanted = [(torch.tensor([4.0, 6.0]), torch.tensor([0.0, 2.0])), (torch.tensor([1.0]), torch.tensor([2.0]))]
    expected = {"norm": 10 * (5 + 2) + 3, "mse": 10 * (25 / 2 + 4 / 2) + 9}[form]
    assert batch_norm_distance(mine, wanted, form=form).item() == pytest.approx(expected, rel=1e-5)
    plain = batch_norm_distance(mine[1:], wanted[1:], form=form, first_scale=1.0)
    assert plain.item() == pytest.approx(3 if form == "norm" else 9, rel=1e-5)
    assert batch_norm_distance(mine, mine, form=form).item() == pytest.approx(0, abs=1e-4)


def test_statistics_inside_vectorised_derivatives():
    """As an attack uses them: recorded in a functional call, returned as aux, compared with what the layers keep."""
    net, images = small_cnn(), pictures(0, 3, 4, 3, 6, 6)
    weights = {name: value.detach() for name, value in net.named_parameters()}
    with BatchNormStatistics(net) as seen:

        def loss(weights: dict[str, Tensor], images: Tensor) -> tuple[Tensor, list]:
            logits = functional_call(net, weights, (images,))
            statistics = list(seen.values)
            seen.values.clear()
            return logits.logsumexp(dim=1).mean(), statistics

        def total(images: Tensor) -> Tensor:
            gradients, statistics = grad(loss, has_aux=True)(weights, images)
            prior = batch_norm_distance(statistics, running_statistics(net, seen.names))
            return prior + gradients["head.weight"].square().sum()

        together = vmap(grad(total))(images)
        assert not seen.values
        for k in range(3):
            torch.testing.assert_close(together[k], grad(total)(images[k]))
    assert together.isfinite().all()


def test_running_statistics_are_found_by_name():
    net = small_cnn()
    (mean, _), (_, variance) = running_statistics(net, ["early", "late"])
    assert mean is net.early.running_mean and variance is net.late.running_var
    net.late.running_mean = None
    with pytest.raises(UserError, match="'late' keeps no running statistics"):
        running_statistics(net, ["early", "late"])


def test_feature_targets_are_the_features_of_a_single_image():
    net, image, label = small_cnn(), pictures(0, 1, 3, 6, 6), torch.tensor([2])
    with LayerInputs(net, ["head"]) as seen:
        loss = nn.functional.cross_entropy(net(image), label)
    weight, bias = torch.autograd.grad(loss, (net.head.weight, net.head.bias))
    targets = feature_targets(weight, bias, label)
    torch.testing.assert_close(targets, seen.values[0].detach())
    assert feature_distance(seen.values[0] + 0.5, targets).item() == pytest.approx(0.25)
    with pytest.raises(UserError, match="bias gradient of class 2, which is zero"):
        feature_targets(weight, torch.where(bias < 0, 0, bias), label)
    with pytest.raises(UserError, match="needs the gradients of the classifier's weight and bias"):
        feature_targets(weight, None, label)


# What the loop does to several candidates, or between steps


def test_consensus_of_moved_copies_is_the_first_of_them():
    first = pictures(0, 2, 1, 2, 3, 8, 6)  # two victims with a batch of two
    moved = torch.cat([first, first.roll((3, -2), dims=(-2, -1)), first.roll(5, dims=-1)], dim=1)
    torch.testing.assert_close(consensus(moved), first[:, 0])
    each = torch.cat([first, first.roll(1, dims=-1), 3 * first], dim=1)
    torch.testing.assert_close(consensus(each), 5 / 3 * first[:, 0])


def test_diverged_restarts_take_no_part_in_the_consensus():
    images = pictures(0, 1, 3, 1, 3, 8, 8)
    images[0, 1:] = images[0, 2]
    images[0, 0, 0, 1, 2, 3] = math.nan
    torch.testing.assert_close(consensus(images), images[:, 2])


def test_median_filter_removes_specks_and_keeps_steps():
    step = plane([[0, 0, 1, 1]] * 5)
    torch.testing.assert_close(median_filter(step), step)
    speck = step.clone()
    speck[..., 2, 1] = 9.0
    torch.testing.assert_close(median_filter(speck), step)
    assert median_filter(plane([[5, 1, 1], [1, 2, 3], [1, 3, 4]]))[0, 0, 0, 0] == 2  # 2 2 2 2 1 1 1 1 5: edges reflect


# The reference implementations

VARIATIONS = {
    "tv_default": (0.1, {}),
    "tv_aniso_inner1_outer1": (1.0, {}),
    "tv_iso_inner2_outer0.5": (1.0, ISOTROPIC),
    "tv_double_opponents": (1.0, {"double_opponents": True}),
    "tv_modern": (0.1, {"double_opponents": True, **ISOTROPIC}),
    "tv_eps1e-3": (1.0, {"eps": 1e-3, **ISOTROPIC}),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_golden_total_variation(golden, name):
    arrays, values = golden("attack_objectives"), golden("attack_objectives.json")["regularisers"]
    images, (scale, options) = torch.tensor(arrays["img"]), VARIATIONS[name]

    def prior(images: Tensor) -> Tensor:
        return scale * total_variation(images, **options)

    assert prior(images).item() == pytest.approx(values[name], rel=1e-10)
    assert prior(images[:1]).item() == pytest.approx(values[f"{name}_first"], rel=1e-10)
    torch.testing.assert_close(grad(prior)(images)[:1], torch.tensor(arrays[f"dreg/{name}"]), rtol=1e-9, atol=1e-15)


def test_golden_priors(golden):
    arrays, values = golden("attack_objectives"), golden("attack_objectives.json")["regularisers"]
    images = torch.tensor(arrays["img"])
    found = {
        "inversefed_tv": OF_INVERTING_GRADIENTS(images),
        "inversefed_tv_first": OF_INVERTING_GRADIENTS(images[:1]),
        "norm2": mean_power(images),
        "norm_default": 0.1 * mean_power(images),
        "norm4": mean_power(images, exponent=4.0),
        "orthogonality": orthogonality(images),
        "orthogonality_single_image": orthogonality(images[:1]),
    }
    for name, value in found.items():
        assert value.item() == pytest.approx(values[name], rel=1e-10), name
    slope = grad(orthogonality)(images)[:1]  # of three images the first is stored
    torch.testing.assert_close(slope, torch.tensor(arrays["dreg/orthogonality"]), rtol=1e-9, atol=1e-15)


def test_golden_deep_inversion(golden):
    arrays, values = golden("attack_objectives"), golden("attack_objectives.json")["regularisers"]
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    net.double().load_state_dict({key[3:]: torch.tensor(arrays[key]) for key in arrays if key.startswith("bn/")})
    with BatchNormStatistics(net.eval()) as seen:
        net(torch.tensor(arrays["img"]))
    targets = running_statistics(net, seen.names)
    total = 0.1 * batch_norm_distance(seen.values, targets)
    assert total.item() == pytest.approx(values["deep_inversion_default"], rel=1e-10)
    for mine, target, value in zip(seen.values, targets, values["deep_inversion_per_layer"], strict=True):
        assert batch_norm_distance([mine], [target], first_scale=1.0).item() == pytest.approx(value, rel=1e-10)
