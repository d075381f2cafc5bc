"""attacks/solvers/lbfgs.py: the iterates of torch.optim.LBFGS for every problem of a batch, whatever its company."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from attacks.solvers.lbfgs import LBFGS
from models import build_model


def bowl(x: Tensor) -> Tensor:
    """A convex quadratic of condition 400."""
    return (torch.linspace(0.05, 20, len(x), dtype=x.dtype) * (x - 1).square()).sum() / 2


def valley(x: Tensor) -> Tensor:
    """Rosenbrock's function along a chain."""
    return (1 - x[:-1]).square().sum() + 10 * (x[1:] - x[:-1].square()).square().sum()


def waves(x: Tensor) -> Tensor:
    """Hills of negative curvature on the way down."""
    return (0.1 * x.square() + 2 * x.cos()).sum() + 0.05 * x.sum().square()


def starts(problems: int, size: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(problems, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def iterates(function: Callable, x: Tensor, number: int, **options) -> Tensor:
    """(number, V, n): the points our optimizer visits."""
    derivative, optimizer = vmap(grad(function)), LBFGS(*x.shape, dtype=x.dtype, **options)
    visited = [x]
    for _ in range(number - 1):
        visited.append(optimizer.step(visited[-1], derivative(visited[-1])))
    return torch.stack(visited)


def torch_iterates(function: Callable, x: Tensor, number: int, **options) -> tuple[Tensor, int]:
    """(the points torch evaluates, (number, n); pairs it tried and does not hold). It evaluates a point again where one
    of its steps of 20 iterations ends early; such repetitions are dropped."""
    variable, visited = x.clone().requires_grad_(), []
    optimizer = torch.optim.LBFGS([variable], **options)

    def closure() -> Tensor:
        if not visited or not visited[-1].equal(variable):
            visited.append(variable.detach().clone())
        optimizer.zero_grad()
        loss = function(variable)
        loss.backward()
        return loss

    while len(visited) < number:
        before = len(visited)
        optimizer.step(closure)
        assert len(visited) > before, "torch has converged"
    state = optimizer.state[variable]
    return torch.stack(visited[:number]), state["n_iter"] - 1 - len(state["old_dirs"])


@pytest.mark.parametrize(
    ("function", "number", "options"),
    [
        (bowl, 33, {}),
        (bowl, 33, {"lr": 0.5}),
        (valley, 35, {}),
        (valley, 35, {"lr": 0.3}),
        (waves, 20, {"lr": 0.4}),
    ],
)
def test_the_iterates_are_torchs(function, number, options):
    x = starts(4) / 2
    ours = iterates(function, x, number, **options)
    for problem in range(len(x)):
        expected, _ = torch_iterates(function, x[problem], number, **options)
        torch.testing.assert_close(ours[:, problem], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("history", [1, 3, 7])
def test_the_oldest_pair_makes_room(history):
    x = starts(3) / 2
    ours = iterates(bowl, x, 30, history=history)
    for problem in range(len(x)):
        expected, _ = torch_iterates(bowl, x[problem], 30, history_size=history)
        torch.testing.assert_close(ours[:, problem], expected, rtol=1e-6, atol=1e-8)
    assert not ours[25:].allclose(iterates(bowl, x, 30)[25:], rtol=1e-3)


def test_pairs_of_negative_curvature_are_refused_problem_by_problem():
    x = starts(4, seed=2) * torch.tensor([[0.1], [0.3], [1.0], [3.0]])  # from the hill-top outwards
    refused = set()
    for history in (4, 100):
        ours = iterates(waves, x, 20, lr=0.4, history=history)
        for problem in range(len(x)):
            expected, number = torch_iterates(waves, x[problem], 20, lr=0.4, history_size=history)
            torch.testing.assert_close(ours[:, problem], expected, rtol=1e-6, atol=1e-8)
            refused.add(number)
    assert {0, 1, 4, 6} < refused  # by the four problems, with room for all pairs


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_a_problem_does_not_depend_on_its_company(dtype, rtol):
    x = starts(5, dtype=dtype) / 2
    together = iterates(valley, x, 15)
    for problem in range(5):
        alone = iterates(valley, x[problem : problem + 1], 15)[:, 0]
        torch.testing.assert_close(together[:, problem], alone, rtol=rtol, atol=rtol)


def test_a_quadratic_is_solved():
    assert iterates(bowl, starts(3), 120)[-1].sub(1).abs().max() < 1e-4  # torch stops there too


def test_a_gradient_that_is_not_finite_stops_its_problem_alone():
    derivative, x = vmap(grad(bowl)), starts(3)
    expected = iterates(bowl, x, 12)
    optimizer, current = LBFGS(*x.shape, dtype=x.dtype), x
    for iteration in range(11):
        gradient = derivative(current)
        if iteration >= 4:
            gradient[1, 3], gradient[2, 0] = torch.nan, torch.inf
        current = optimizer.step(current, gradient)
    assert current[1:].equal(expected[4, 1:])
    torch.testing.assert_close(current[0], expected[-1, 0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rest", [range(4), range(5, 9)])
@pytest.mark.parametrize("reason", ["inactive", "nan", "inf"])
def test_a_problem_rests_and_resumes(rest, reason):
    derivative, x = vmap(grad(valley)), starts(2) / 2
    expected = iterates(valley, x, 16)
    optimizer, current = LBFGS(*x.shape, dtype=x.dtype), x
    for iteration in range(15):
        gradient, active = derivative(current), None
        if iteration in rest and reason == "inactive":
            active = torch.tensor([True, False])
        elif iteration in rest:
            gradient[1, 7] = float(reason)
        current = optimizer.step(current, gradient, active)
    torch.testing.assert_close(current[0], expected[15, 0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(current[1], expected[11, 1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "value", "moves"),
    [
        (200_000, 0.9e-7, False),  # no entry above 1e-7, as steep as it is
        (200_000, 1.1e-7, True),
        (1, 3e-5, False),  # slope above -1e-9
        (1, 4e-5, True),
        (1, 1e30, False),  # a slope beyond float32 would end in infinite pixels
    ],
)
def test_a_problem_moves_above_torchs_thresholds(size, value, moves):
    x = torch.zeros(1, size)
    assert LBFGS(1, size, history=1).step(x, torch.full_like(x, value)).any() == moves


def test_a_stationary_point_is_kept():
    x = torch.stack([torch.ones(40, dtype=torch.float64), starts(1)[0]])
    ours = iterates(bowl, x, 5)
    assert ours[:, 0].eq(1).all()
    assert not ours[1, 1].equal(ours[0, 1])


def test_the_first_step_is_short():
    x = 100 * starts(2)
    assert iterates(bowl, x, 2, lr=0.5).diff(dim=0).abs().sum(dim=2).allclose(torch.tensor(0.5, dtype=x.dtype))


def dlg_objective(reference: dict, dtype: torch.dtype, joint: bool) -> tuple[Callable, Tensor]:
    """(squared distance of gradients as a function of image and, with `joint`, label logits in one vector; start)."""
    model = build_model("lenet", num_classes=100, image_size=32)
    weights = {key.removeprefix("sd/"): torch.tensor(value) for key, value in reference.items() if key[:3] == "sd/"}
    model.load_state_dict({key.replace("fc.0.", "fc."): value for key, value in weights.items()})
    parameters = {key: value.detach() for key, value in model.to(dtype).named_parameters()}
    image = (torch.tensor(reference["image"]).permute(2, 0, 1)[None] / 255).to(dtype)
    label = nn.functional.one_hot(torch.tensor(reference["label"]), 100).to(dtype)

    def loss(parameters: dict, image: Tensor, target: Tensor) -> Tensor:
        return -(target * functional_call(model, parameters, (image,)).log_softmax(dim=1)).sum()

    leaked = grad(loss)(parameters, image, label)

    def objective(x: Tensor) -> Tensor:
        target = x[3072:].softmax(dim=0)[None] if joint else label
        gradient = grad(loss)(parameters, x[:3072].view(1, 3, 32, 32), target)
        return sum((gradient[name] - leaked[name]).square().sum() for name in leaked)

    parts = ["dummy_data_init", "dummy_label_init"][: 1 + joint]
    return objective, torch.cat([torch.tensor(reference[part]).flatten() for part in parts]).to(dtype)


def objectives(function: Callable, x: Tensor, number: int) -> Tensor:
    derivative, optimizer, values = vmap(grad_and_value(function)), LBFGS(1, len(x), dtype=x.dtype), []
    x = x[None]
    for _ in range(number):
        gradient, value = derivative(x)
        values.append(value[0])
        x = optimizer.step(x, gradient)
    return torch.stack(values)


@pytest.mark.parametrize(
    ("key", "dtype", "number", "rtol"),
    [("f64", "float64", 53, 1e-5), ("f32", "float32", 17, 2e-2)],
)
def test_dlg_evaluates_what_the_original_evaluates(golden, key, dtype, number, rtol):
    reference = golden("dlg")
    function, start = dlg_objective(reference, getattr(torch, dtype), joint=True)
    expected = torch.tensor(reference[f"{key}/closures"][:number])
    torch.testing.assert_close(objectives(function, start, number).double(), expected, rtol=rtol, atol=0)


def test_outer_iterations_are_twenty_evaluations(golden):
    reference = golden("dlg")
    for prefix, joint in (("f64", True), ("idlg", False)):
        function, start = dlg_objective(reference, torch.float64, joint)
        values = objectives(function, start, 61)[::20]
        assert (reference[f"{prefix}/evals"][:3] == 20).all()
        for part, ours in (("before", values[:3]), ("after", values[1:])):
            torch.testing.assert_close(ours, torch.tensor(reference[f"{prefix}/{part}"][:3]), rtol=1e-4, atol=0)
