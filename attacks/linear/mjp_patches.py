"""Which patches, among those the gradients of MJP allow, make a picture: L-BFGS and Levenberg-Marquardt.

`visible_patches` and `hidden_patches` weigh the equations of attacks/linear/mjp_equations.py and mjp_queries.py, by the
noise they have, against the prior of attacks/linear/smoothness.py.
"""

import math
from functools import partial

import scipy
import torch
from torch import Tensor

from attacks.linear.mjp_equations import FirstBlock, Span
from attacks.linear.mjp_queries import Queries
from attacks.linear.smoothness import SHARP, Smoothness
from utils.progress import tell

INDEPENDENT = 0.01  # share of the query gradients' errors counted as independent of each other
SOLVED = 1e-4  # relative misfit of the query gradients below which the hidden patches count as found
FAR = 3.0  # times the largest visible pixel, beyond which Newton has left for good
EASED = 12  # its steps at each weight of the prior before the last, which is 0


def visible_patches(
    span: Span, penalty: Smoothness, equations: FirstBlock | None, smoothness: float, steps: int
) -> Tensor:
    """Return (U, P): the visible patches by equations and prior; by the equations alone where they are certain."""
    base, basis, shown = span.base[~span.hidden], span.basis, ~span.hidden
    if not len(basis) or not len(base):
        return base
    if equations is not None and equations.certain.all():
        return base + equations.solution @ basis
    weights, curvature = penalty.weights(span.hidden), penalty.curvature(basis)

    def roughness(coordinates: Tensor, eps: float) -> Tensor:
        patches = torch.zeros(span.base.shape, dtype=base.dtype)
        return penalty(patches.index_put((shown,), base + coordinates @ basis), weights, eps)

    def metric(ratio: Tensor, eps: float) -> Tensor:
        precision = ratio.square() / equations.noise
        return precision[:, None, None] * equations.metric + smoothness / (5 * eps) * curvature

    def objective(coordinates: Tensor, ratio: Tensor | None = None, eps: float = SHARP) -> Tensor:
        return equations.misfit(coordinates, ratio) + smoothness * roughness(coordinates, eps)

    smooth = torch.zeros(len(base), len(basis), dtype=base.dtype)
    stages = (f"visible patches, part {part} of {3 if equations is None else 9}, step" for part in range(1, 10))
    for eps in (100 * SHARP, 10 * SHARP, SHARP):  # nearly quadratic first: the robust penalty is slow from far away
        goal = partial(roughness, eps=eps)
        smooth = minimise(goal, smooth, steps // 2, curvature / eps, next(stages))
    if equations is None:
        return base + smooth @ basis
    # With t_i left free the equations have local minima where a patch is far off. Small masks are best entered from
    # the prior alone, large ones from the equations at their own t_i; the objective tells which it was.
    stiff = torch.zeros_like(smooth)
    for eps in (100 * SHARP, 10 * SHARP):
        goal = partial(objective, ratio=equations.ratio, eps=eps)
        stiff = minimise(goal, stiff, steps // 2, metric(equations.ratio, eps), next(stages))
    ends = []
    for found in (smooth, stiff):
        found = minimise(objective, found, steps, metric(equations.ratio, SHARP), next(stages))
        ratio = equations.ratios(found)
        ends.append(minimise(partial(objective, ratio=ratio), found, steps, metric(ratio, SHARP), next(stages)))
    found = min(ends, key=lambda end: float(objective(end)))
    return base + torch.where(equations.certain[:, None], equations.solution, found) @ basis


def hidden_patches(
    span: Span,
    penalty: Smoothness,
    visible: Tensor,
    queries: Queries | None,
    smoothness: float,
    steps: int,
    newton_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """Return ((N, P) all patches given the visible ones (U, P), relative misfit of the query gradients or NaN)."""
    hidden, dtype = span.hidden, visible.dtype
    patches = torch.zeros(span.base.shape, dtype=dtype)
    patches[~hidden] = visible
    point = span.base[hidden][:1]
    if not len(span.basis) or not len(visible):
        patches[hidden] = point
        return patches, math.nan
    # Coordinates in which the visible patches are standard normal around `mean`, within the hidden patches' hull.
    cloud = (visible - point) @ span.basis.T
    spread = torch.atleast_2d(torch.cov(cloud.T, correction=0)) if len(visible) > 1 else torch.eye(len(span.basis))
    jitter = 1e-10 * spread.diagonal().mean() * torch.eye(len(spread), dtype=dtype)
    basis = torch.linalg.cholesky(spread + jitter).T @ span.basis
    mean = point + cloud.mean(dim=0) @ span.basis
    weights, curvature = penalty.weights(torch.zeros_like(hidden)), penalty.curvature(basis)
    unit = torch.eye(len(basis), dtype=dtype)[None]

    def prior(value: Tensor, eps: float) -> Tensor:
        whole = patches.index_put((hidden,), mean + value @ basis)
        return smoothness * penalty(whole, weights, eps) + value.square().sum() / 2

    found = torch.zeros(int(hidden.sum()), len(basis), dtype=dtype)
    for eps in (100 * SHARP, 10 * SHARP):
        goal, stage = partial(prior, eps=eps), "hidden patches by the prior, step"
        found = minimise(goal, found, 60, unit + smoothness / eps * curvature, stage)
    misfit = math.nan
    if queries is not None:
        # Their errors come from the visible patches: correlated, of unknown size, which is profiled out.
        count = INDEPENDENT * queries.targets.numel()

        def objective(value: Tensor) -> Tensor:
            return count / 2 * queries.residual(mean + value @ basis).square().mean().log() + prior(value, 10 * SHARP)

        metric = unit + smoothness / (10 * SHARP) * curvature
        found = minimise(objective, found, steps, metric, "hidden patches by the queries, step")
        placed, misfit = found @ basis, _misfit(queries, mean + found @ basis)
        for eased in (False, True) if newton_steps else ():
            solved = _newton(queries, mean, basis, found, newton_steps, eased, generator)
            error = _misfit(queries, mean + solved @ basis)
            near = (mean + solved @ basis).abs().max() < FAR * visible.abs().max()
            if error < SOLVED or (near and (error < misfit or not eased)):
                # Newton does not look at the picture: its patches go where those nearest to them were.
                apart = torch.cdist(placed, solved @ basis).square().numpy()
                found, misfit = solved[scipy.optimize.linear_sum_assignment(apart)[1]], error
            if misfit < SOLVED:
                break
    patches[hidden] = mean + found @ basis
    return patches, misfit


def _misfit(queries: Queries, patches: Tensor) -> float:
    return float(queries.residual(patches).square().mean().sqrt())


def hidden_error(queries: Queries, patches: Tensor, basis: Tensor) -> float:
    """Return the predicted root mean square error (normalised) of hidden patches (k, P) in the directions of `basis`
    (r, P): how far Newton would still go, and what the misfit it would leave hides. Infinite without equations left."""
    wanted = _wanted(queries, len(patches) * len(basis))
    chosen = torch.linspace(0, queries.targets.shape[1] - 1, wanted).round().long()
    residual, jacobian = queries.residual(patches, chosen, basis)
    left, values, axes = torch.linalg.svd(jacobian, full_matrices=False)
    freedom = len(jacobian) - jacobian.shape[1]
    if freedom <= 0 or not float(values[-1]) > 0:
        return math.inf
    inside = left.T @ residual.flatten()
    rest = (residual.square().sum() - inside.square().sum()).clamp_min(0) / freedom
    square = (inside / values).square().sum() + rest * values.reciprocal().square().sum()
    return float((square / patches.numel()).sqrt())


def _wanted(queries: Queries, unknowns: int) -> int:
    """Return how many queries make four equations per unknown, eight at least where there are as many."""
    heads, number, width = queries.targets.shape
    return min(number, max(8, math.ceil(4 * unknowns / (heads * width))))


def minimise(objective, start: Tensor, steps: int, curvature: Tensor, stage: str = "patches, step") -> Tensor:
    """Minimise `objective` of the shape of `start` (M, r) by L-BFGS, in coordinates where `curvature` (1 or M, r, r) is
    one. stage: what it is, for whoever listens to the progress."""
    curvature = curvature.expand(len(start), -1, -1)
    ridge = 1e-9 * curvature.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    factor = torch.linalg.cholesky(curvature + ridge * torch.eye(curvature.shape[-1], dtype=start.dtype)).mT

    def unfold(values: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, values[..., None], upper=True)[..., 0]

    values = (factor @ start[..., None])[..., 0].requires_grad_()
    optimizer = torch.optim.LBFGS(
        [values],
        max_iter=steps,
        max_eval=2 * steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=1e-12,
    )

    def closure() -> Tensor:
        tell(stage, optimizer.state[values].get("n_iter", 0), steps)
        optimizer.zero_grad()
        loss = objective(unfold(values))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return unfold(values.detach())


def _newton(
    queries: Queries, mean: Tensor, basis: Tensor, start: Tensor, steps: int, eased: bool, generator: torch.Generator
) -> Tensor:
    """Apply Levenberg-Marquardt to as many randomly chosen queries as make four equations per unknown.

    eased: let the standard normal prior of the coordinates go by and by. Without it the first steps can leave the pixel
    range and end in a local minimum far outside; with it they can end in one inside that the others jump over.
    """
    chosen = torch.randperm(queries.targets.shape[1], generator=generator)[: _wanted(queries, start.numel())]
    found = start
    residual, jacobian = queries.residual(mean + found @ basis, chosen, basis)
    first = residual.square().sum() / start.numel()
    for share in (*(10.0**-power for power in range(9 * eased)), 0.0):
        prior, damping = share * first, 1e-3
        cost = residual.square().sum() + prior * found.square().sum()
        for step in range(EASED if share else steps):
            tell("hidden patches by Newton, step", step, EASED if share else steps)
            normal = jacobian.T @ jacobian
            normal.diagonal().add_(prior)
            slope = jacobian.T @ residual.flatten() + prior * found.flatten()
            for _ in range(8):
                damped = normal + torch.diag(damping * normal.diagonal() + 1e-14 * normal.diagonal().max())
                trial = found - torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(damped)).view_as(found)
                reached = queries.residual(mean + trial @ basis, chosen).square().sum() + prior * trial.square().sum()
                if reached < cost:
                    break
                damping *= 6
            else:
                break
            found, damping = trial, max(damping / 4, 1e-14)
            residual, jacobian = queries.residual(mean + found @ basis, chosen, basis)
            gain, cost = 1 - reached / cost, reached
            if gain < (1e-2 if share else 1e-4):
                break
    return found
