"""objectives.py against values worked out by hand, its promises at zero, and the reference implementations."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F  # noqa: N812

from attacks.matching.objectives import COSINES, OBJECTIVES, pos_embed_cosine, select, squared_length, weigh_layers
from utils.errors import UserError

CASES = OBJECTIVES | {
    "local_cosine mean": partial(OBJECTIVES["local_cosine"], reduction="mean"),
    "cosine linear": partial(OBJECTIVES["cosine"], layer_weights="linear"),
    "l2 exp": partial(OBJECTIVES["l2"], layer_weights="exp"),
    "tag equal": partial(OBJECTIVES["tag"], layer_weights="equal", tau=0.25),
    "pos_embed_cosine": pos_embed_cosine,
    "pos_embed_cosine rowwise": partial(pos_embed_cosine, names=("pos_embed", "head"), rowwise=True),
}
IN_THE_REFERENCES = {  # name there -> name here
    "euclidean": "euclidean",
    "cosine-similarity": "cosine",
    "masked-cosine-similarity": "masked_cosine",
    "fast-cosine-similarity": "fast_cosine",
    "angular": "angular",
    "l1": "l1",
    "tag-euclidean": "tag",
}


def gradients(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random gradients of a tiny network, of `shape` many problems."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"pos_embed": (1, 5, 4), "conv": (3, 2, 2), "bias": (3,), "head": (6, 4)}
    return {name: torch.randn(*shape, *own, generator=generator, dtype=dtype) for name, own in shapes.items()}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def second_along(slope, values: dict[str, Tensor], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second derivative times a direction, reverse over reverse as in the attacks."""
    return grad(lambda own: flat(slope(own)) @ flat(direction))(values)


# Values


def test_values_worked_out_by_hand():
    candidate = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[1.0]])}
    target = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([[3.0]])}
    expected = {
        "l2": 9 + 16 + 4,
        "euclidean": 14.5,
        "mean_squared": 12.5 + 4,
        "l1": 4.5,
        "max": 4 + 2,
        "cosine": 1 - 3 / math.sqrt(10 * 25),
        "local_cosine": 1 + 0,
        "out_sim": (1 + 0) / 2,
        "angular": math.acos(3 / math.sqrt(250)) / math.pi,
        "masked_cosine": 1 - 3 / math.sqrt(1 * 25),  # the entry where the target is zero does not exist
        "fast_cosine": 1 - 3 / math.sqrt(250),
        "tag": 0.5 * (29 + 0.1 * (1 * 7 + 0.5 * 2)),
    }
    assert set(expected) == set(OBJECTIVES)
    for name, value in expected.items():
        assert OBJECTIVES[name](candidate, target).item() == pytest.approx(value, rel=1e-6), name
        assert OBJECTIVES[name](candidate, target, scale=3.0).item() == pytest.approx(3 * value, rel=1e-6), name
    assert OBJECTIVES["local_cosine"](candidate, target, reduction="mean").item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", CASES)
def test_equal_gradients_are_at_distance_zero(name):
    one = gradients(0)
    near = 2e-4 if name == "angular" else 1e-12
    assert CASES[name](one, one).item() == pytest.approx(0, abs=near)
    assert CASES[name](one, gradients(1)) > 0.01


def test_cosines_ignore_the_length_of_a_gradient_and_distances_do_not():
    one, other = gradients(0), gradients(1)
    for length in (1e-9, 1e5):
        longer = {name: length * value for name, value in one.items()}
        for name in ("cosine", "local_cosine", "angular", "fast_cosine"):
            torch.testing.assert_close(
                OBJECTIVES[name](longer, other), OBJECTIVES[name](one, other), rtol=1e-12, atol=0
            )
        assert abs(OBJECTIVES["l2"](longer, other) - OBJECTIVES["l2"](one, other)) > 1


@pytest.mark.parametrize("weights", ["equal", "exp"])
def test_a_known_length_of_the_target_changes_nothing(weights):
    one, other = gradients(0), gradients(1)
    square = squared_length(other, weights)
    for name in COSINES:
        plain, known = (
            grad(lambda x, k=k, name=name: OBJECTIVES[name](x, other, layer_weights=weights, **k))(one)
            for k in ({}, {"target_square": square})
        )
        assert flat(plain).equal(flat(known)) and flat(plain).norm() > 0
        assert OBJECTIVES[name](one, other, target_square=2 * square) != OBJECTIVES[name](one, other)


def test_short_gradients_keep_their_direction_in_single_precision():
    """Converged networks give tiny gradients: their cosine and its derivative have to survive float32."""
    one, other = gradients(0, dtype=torch.float32), gradients(1, dtype=torch.float32)
    short = {name: 1e-9 * value for name, value in one.items()}
    torch.testing.assert_close(OBJECTIVES["cosine"](short, other), OBJECTIVES["cosine"](one, other))
    slopes = [flat(grad(OBJECTIVES["cosine"])(values, other)) for values in (short, one)]
    torch.testing.assert_close(slopes[0] * 1e-9, slopes[1])


def test_layer_weights():
    names = ["a", "b", "c", "d"]
    assert list(weigh_layers(names, "equal").values()) == [1, 1, 1, 1]
    assert list(weigh_layers(names, "linear").values()) == [1, 0.75, 0.5, 0.25]
    decay = torch.softmax(torch.arange(4.0, 0.0, -1, dtype=torch.float64), 0)
    assert list(weigh_layers(names, "exp").values()) == pytest.approx((decay / decay[0]).tolist())
    with pytest.raises(UserError, match="unknown layer_weights 'linaer': did you mean 'linear'"):
        OBJECTIVES["l2"](gradients(0), gradients(1), layer_weights="linaer")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_weight_of_zero_leaves_a_tensor_out(name):
    one, other = gradients(0), gradients(1)
    weights = {"pos_embed": 0.0, "conv": 1.0, "bias": torch.ones(()), "head": torch.zeros(())}
    kept = {key: other[key] for key in ("conv", "bias")}
    options = {} if name != "tag" else {"tau": 0.0}  # its weights concern the absolute part alone
    if name == "tag":
        kept = other
    weighted = OBJECTIVES[name](one, other, layer_weights=weights, **options)
    torch.testing.assert_close(weighted, OBJECTIVES[name](one, kept, layer_weights="equal", **options))


def test_pruned_entries_do_not_count_for_the_masked_cosine():
    one, other = gradients(0), gradients(1)
    pruned = {name: torch.where(value.abs() > 0.7, value, 0) for name, value in one.items()}
    assert OBJECTIVES["masked_cosine"](one, pruned).item() == pytest.approx(0, abs=1e-12)
    assert OBJECTIVES["cosine"](one, pruned) > 0.01
    torch.testing.assert_close(
        OBJECTIVES["masked_cosine"](other, one, threshold=0.7), OBJECTIVES["masked_cosine"](other, pruned)
    )


def test_fast_cosine_pulls_straight_at_the_target():
    one, other = gradients(0), gradients(1)
    slope = flat(grad(OBJECTIVES["fast_cosine"])(one, other))
    torch.testing.assert_close(slope, -flat(other) / flat(other).norm() / flat(one).norm())


def test_tensors_without_a_target_direction_are_left_out_of_the_local_cosine():
    one, other = gradients(0), gradients(1)
    blank = other | {"conv": torch.zeros_like(other["conv"])}
    kept = {name: value for name, value in other.items() if name != "conv"}
    for reduction in ("sum", "mean"):
        local = partial(OBJECTIVES["local_cosine"], reduction=reduction)
        torch.testing.assert_close(local(one, blank), local(one, kept))
    with pytest.raises(UserError, match="unknown reduction 'max'"):
        OBJECTIVES["local_cosine"](one, other, reduction="max")


# APRIL's term


def test_position_embedding_term_leaves_masked_rows_out():
    one, other = gradients(0), gradients(1)
    masked = other["pos_embed"].clone()
    masked[0, [1, 3]] = 0
    rows, targets = one["pos_embed"][0, [0, 2, 4]], other["pos_embed"][0, [0, 2, 4]]
    whole = pos_embed_cosine(one, {"pos_embed": masked})
    torch.testing.assert_close(whole, 1 - F.cosine_similarity(rows.flatten(), targets.flatten(), dim=0))
    each = pos_embed_cosine(one, {"pos_embed": masked}, rowwise=True, scale=2.0)
    torch.testing.assert_close(each, 2 * (1 - F.cosine_similarity(rows, targets, dim=1)).mean())


def test_position_embedding_term_names_the_gradient_it_misses():
    with pytest.raises(UserError, match="needs the gradient of 'unknown_pos_embed'"):
        pos_embed_cosine(gradients(0), gradients(1), names=("pos_embed", "unknown_pos_embed"))


# The promises the loop relies on


@pytest.mark.parametrize("name", CASES)
def test_vectorised_over_problems_equals_one_by_one(name):
    candidates, targets = gradients(0, 3), gradients(1, 3)
    targets["pos_embed"][1, 0, 2] = 0

    def value_and_slope(candidate, target):
        return CASES[name](candidate, target), grad(CASES[name])(candidate, target)

    values, slopes = vmap(value_and_slope)(candidates, targets)
    for k in range(3):
        value, slope = value_and_slope(
            *({key: part[k] for key, part in all_.items()} for all_ in (candidates, targets))
        )
        torch.testing.assert_close(values[k], value)
        torch.testing.assert_close({key: part[k] for key, part in slopes.items()}, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["equal", "zero candidate", "zero target", "zero tensor", "all zero"])
@pytest.mark.parametrize("name", CASES)
def test_finite_up_to_the_second_derivative(name, where, dtype):
    candidate, target = gradients(0, dtype=dtype), gradients(1, dtype=dtype)
    if where == "equal":
        candidate = target
    for values, reason in ((candidate, "zero candidate"), (target, "zero target")):
        if where in (reason, "all zero"):
            values |= {key: torch.zeros_like(value) for key, value in values.items()}
    if where == "zero tensor":
        candidate["head"], target["head"] = torch.zeros_like(candidate["head"]), torch.zeros_like(target["head"])
        candidate["pos_embed"], target["pos_embed"] = candidate["pos_embed"].clone(), target["pos_embed"].clone()
        candidate["pos_embed"][0, 1], target["pos_embed"][0, 1:3] = 0, 0
    slope = partial(grad(CASES[name]), target=target)
    assert CASES[name](candidate, target).isfinite()
    assert flat(slope(candidate)).isfinite().all()
    assert flat(second_along(slope, candidate, gradients(2, dtype=dtype))).isfinite().all()


@pytest.mark.parametrize("name", ["l2", "cosine", "local_cosine", "angular", "tag"])
def test_second_derivative_is_right(name):
    """Along a direction, against a difference of first derivatives."""
    candidate, target, direction = gradients(0), gradients(1), gradients(2)
    slope = partial(grad(OBJECTIVES[name]), target=target)
    second = second_along(slope, candidate, direction)
    ahead, behind = (
        flat(slope({key: value + step * direction[key] for key, value in candidate.items()})) for step in (1e-6, -1e-6)
    )
    torch.testing.assert_close(flat(second), (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-7)


# Which tensors to match


def test_select():
    shared = {name: torch.full((2,), value) for name, value in zip("abcde", (3.0, 1.0, 9.0, -4.0, 3.0), strict=True)}
    assert select(shared, "all") == list("abcde")
    assert select(shared, "first2") == ["a", "b"]
    assert select(shared, "last3") == ["c", "d", "e"]
    assert select(shared, "top1") == ["c"]
    assert select(shared, "top3") == ["a", "c", "d"]  # in order of registration; of equal norms the first
    with pytest.raises(UserError, match="'top6' asks for 6 of 5"):
        select(shared, "top6")
    for rule in ("top", "top0", "first-2", "random8", ""):
        with pytest.raises(UserError, match=f"unknown rule to select layers '{rule}'"):
            select(shared, rule)


def test_only_the_tensors_of_the_target_are_compared():
    one, other = gradients(0), gradients(1)
    chosen = select(other, "last2")
    few = {name: other[name] for name in chosen}
    for objective in OBJECTIVES.values():
        torch.testing.assert_close(objective(one, few), objective({name: one[name] for name in chosen}, few))


# The reference implementations


def tensors(arrays: dict, prefix: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {key[len(prefix) :]: torch.tensor(arrays[key]).to(dtype) for key in arrays if key.startswith(prefix)}


@pytest.mark.parametrize("theirs, ours", IN_THE_REFERENCES.items())
def test_golden_values_and_derivatives(golden, theirs, ours):
    arrays, values = golden("attack_objectives"), golden("attack_objectives.json")["objectives"]
    candidate, target = tensors(arrays, "g/"), tensors(arrays, "h/")
    assert OBJECTIVES[ours](candidate, target).item() == pytest.approx(values[theirs], rel=1e-10)
    assert OBJECTIVES[ours](candidate, target, scale=2.5).item() == pytest.approx(
        values[f"{theirs}_scale2.5"], rel=1e-10
    )
    single = OBJECTIVES[ours](tensors(arrays, "g/", torch.float32), tensors(arrays, "h/", torch.float32))
    assert single.item() == pytest.approx(values[f"{theirs}_f32"], rel=1e-5)
    slope = grad(OBJECTIVES[ours])(candidate, target)
    torch.testing.assert_close(slope, tensors(arrays, f"dobj/{theirs}/"), rtol=1e-9, atol=1e-15)


def test_golden_values_of_the_tag_schemes_and_the_angle_of_equal_gradients(golden):
    arrays, values = golden("attack_objectives"), golden("attack_objectives.json")["objectives"]
    candidate, target = tensors(arrays, "g/"), tensors(arrays, "h/")
    for theirs, ours in {"linear": "linear", "exp": "exp", "none": "equal"}.items():
        found = OBJECTIVES["tag"](candidate, target, layer_weights=ours, tau=0.25)
        assert found.item() == pytest.approx(values[f"tag-euclidean_scheme-{theirs}_tag0.25"], rel=1e-10)
    angle = OBJECTIVES["angular"](candidate, candidate)
    assert angle.item() == pytest.approx(values["angular_identical"], rel=1e-8)


@pytest.mark.parametrize("scheme", ["equal", "linear", "exp"])
def test_golden_costs_of_inverting_gradients(golden, scheme):
    arrays, costs = golden("attack_objectives"), golden("attack_objectives.json")["inversefed_costs"]
    candidate, target = tensors(arrays, "g/"), tensors(arrays, "h/")
    shift = sum(1 - weight for weight in weigh_layers(target, scheme).values())  # its simlocal: 1 - w cos
    for theirs, (ours, factor, constant) in {
        "l2": ("l2", 1, 0),
        "l1": ("l1", 2, 0),
        "max": ("max", 1, 0),
        "sim": ("cosine", 1, 0),
        "simlocal": ("local_cosine", 1, shift),
    }.items():
        found = OBJECTIVES[ours](candidate, target, layer_weights=scheme, scale=factor) + constant
        assert found.item() == pytest.approx(costs[f"{theirs}_{scheme}"], rel=1e-10)


def test_golden_cost_of_selected_layers(golden):
    arrays, costs = golden("attack_objectives"), golden("attack_objectives.json")["inversefed_costs"]
    candidate, target = tensors(arrays, "g/"), tensors(arrays, "h/")
    for theirs, rule in {"topk-1": "top4", "first4": "first4"}.items():
        chosen = {name: target[name] for name in select(target, rule)}
        found = OBJECTIVES["cosine"](candidate, chosen)
        assert found.item() == pytest.approx(costs[f"sim_equal_{theirs}"], rel=1e-10)


def small_net(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The network of the reference: a convolution, sigmoid, pooling and a linear layer."""
    maps = F.conv2d(images, weights["conv.weight"], weights["conv.bias"], padding=1).sigmoid()
    return F.linear(F.avg_pool2d(maps, 2).flatten(1), weights["fc.weight"], weights["fc.bias"])


def small_loss(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(small_net(weights, images), labels)


@pytest.fixture
def attacked(golden) -> tuple[dict, dict[str, Tensor], Tensor, Tensor]:
    """(reference arrays, weights, candidate images, labels)."""
    arrays = golden("attack_objectives")
    return arrays, tensors(arrays, "net/"), torch.tensor(arrays["cand"]), torch.tensor(arrays["true_labels"])


@pytest.mark.parametrize("theirs, ours", IN_THE_REFERENCES.items())
def test_golden_derivative_by_the_image(golden, attacked, theirs, ours):
    arrays, weights, images, labels = attacked
    target = tensors(arrays, "net_truegrad/")

    def total(images: Tensor) -> Tensor:
        return OBJECTIVES[ours](grad(small_loss)(weights, images, labels), target)

    value = golden("attack_objectives.json")["full_objectives"][theirs]["value"]
    assert total(images).item() == pytest.approx(value, rel=1e-10)
    torch.testing.assert_close(grad(total)(images)[:1], torch.tensor(arrays[f"dcand/{theirs}"]), rtol=1e-7, atol=1e-14)


def test_golden_victim_and_task_loss(golden, attacked):
    arrays, weights, images, labels = attacked
    target, values = tensors(arrays, "net_truegrad/"), golden("attack_objectives.json")["full_objectives"]
    true_images = torch.tensor(arrays["img"][:2])
    torch.testing.assert_close(grad(small_loss)(weights, true_images, labels), target, rtol=1e-12, atol=1e-14)
    loss = small_loss(weights, images, labels)
    assert loss.item() == pytest.approx(values["cosine-similarity"]["task_loss"], rel=1e-10)
    regularised = OBJECTIVES["cosine"](grad(small_loss)(weights, images, labels), target) + 0.3 * loss
    assert regularised.item() == pytest.approx(values["cosine-similarity_taskreg0.3"]["value"], rel=1e-10)


@pytest.mark.parametrize("theirs, ours", {"pearlmutter-loss": "euclidean", "pearlmutter-cosine": "cosine"}.items())
def test_golden_finite_differences(attacked, theirs, ours):
    """d objective / dx = d^2 loss / dx dtheta v, v = d objective / dg, by a step of 1e-3 / |g| along v."""
    arrays, weights, images, labels = attacked
    candidate = grad(small_loss)(weights, images, labels)
    along = grad(OBJECTIVES[ours])(candidate, tensors(arrays, "net_truegrad/"))
    step = 1e-3 / flat(candidate).norm()
    by_image = grad(small_loss, argnums=1)
    moved = {name: value + step * along[name] for name, value in weights.items()}
    found = (by_image(moved, images, labels) - by_image(weights, images, labels)) / step
    torch.testing.assert_close(found[:1], torch.tensor(arrays[f"dcand/{theirs}"]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("ours", ["euclidean", "cosine"])
def test_golden_weight_updates(golden, attacked, ours):
    """Two local steps on one image each, unrolled inside the graph."""
    arrays, weights, images, labels = attacked
    shared = dict(zip(weights, tensors(arrays, "fedavg_update/").values(), strict=True))

    def update(images: Tensor) -> dict[str, Tensor]:
        current = weights
        for k in range(2):
            change = grad(small_loss)(current, images[k : k + 1], labels[k : k + 1])
            current = {name: value - 0.05 * change[name] for name, value in current.items()}
        return {name: value - weights[name] for name, value in current.items()}

    def total(images: Tensor) -> Tensor:
        return OBJECTIVES[ours](update(images), shared)

    torch.testing.assert_close(update(torch.tensor(arrays["img"][:2])), shared, rtol=1e-10, atol=1e-14)
    value = golden("attack_objectives.json")["full_objectives"][f"{ours}_fedavg2"]["value"]
    assert total(images).item() == pytest.approx(value, rel=1e-10)
    if ours == "euclidean":
        reference = torch.tensor(arrays["dcand/euclidean_fedavg2"])
        torch.testing.assert_close(grad(total)(images)[:1], reference, rtol=1e-7, atol=1e-14)
