"""Attack on ViTs whose position-embedding gradient is withheld, fixed, tied, or not there. One image.

What remains are two subspaces. With g_i the gradient of token z_i = W x_i + b + e_i,

1. dL/dW = sum_i g_i x_i^T, and dL/db = s = sum_i g_i. The rows of dL/dW span the patches; outside s they span their
   differences, and dL/dW^T s / |s|^2 is a point m of their affine hull. So x_i = m + B^T c_i, B (r, P) known, r = N - 1
   or less. Where N > P the rows span everything and this says nothing.
2. The gradient of the first block's query, key and value weights is sum_i h_i LN(z_i)^T; its rows, cleared of the
   LayerNorm's bias by the gradient of their own bias, span the centred tokens: a known subspace S of dimension N + 1.

The position embeddings e_i are weights, known to the server whatever is shared of their gradient, and they tell the
tokens apart: the centred W (m + B^T c_i) + b + e_i must lie in S, D - N - 2 linear equations for the r unknowns of
each patch. They determine as many of them as the affine rank of the embedding table, all if it is N - 1 and D >= N + r
+ 2: a learned table, or a random one, protects nothing by being withheld or fixed. A table of sines of row and column
has the rank rows + columns - 2, one that squares of patches share that of its rows less one, none at all 0. What the
equations leave free is, where asked for, first chosen by a prior on pictures and then by matching the gradient in those
coordinates.

Without a bias of the patch projection the patches are known to lie in the rows' span, r = N, and the rank of the table
itself counts. A LayerNorm in front of the blocks (CLIP's norm_pre: scale p, shift v) makes the token p * C u / sigma +
v of u = W x + b + e, with C removing the mean: times the unknown sigma, C (p * C u) + sigma C v lies in S. A first
block without a bias of queries, keys and values leaves the shift v1 of its LayerNorm, of scale p1, in the rows: C z +
sigma' v1 / p1 lies in their span over p1. Each such shift takes one equation of a patch.

Source: derived for this project; docs/method.md. APRIL (Lu et al., CVPR 2022) proposes withholding and fixed tables as
defences against attacks on the position embedding.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.certified import PEAK, certify
from attacks.exactness import CERTAIN, OFF, beyond_rank, claim, is_exact, rounding
from attacks.label_recovery import first_labels
from attacks.linear.mjp_patches import minimise
from attacks.linear.smoothness import SHARP, Smoothness
from attacks.threat_model.checks import (
    PATCHES,
    check_dropout,
    check_embedding,
    check_tokens,
    checked,
    prefix_tokens,
)
from attacks.threat_model.knowledge import known_mask, pixel_bounds
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError, on_cpu
from attacks.threat_model.local_step import classes_of, client_model, training_loss
from attacks.threat_model.uses import LABELS, MJP
from models.jigsaw import unpatchify
from models.position import patch_rows
from utils.progress import tell

BIAS = "patch_embed.proj.bias"
QKV, QKV_BIAS = "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"
# By rounding of the leak: singular values below this share of the largest are rounding. Half precision: the rounding.
FLOOR = {torch.finfo(torch.float32).eps: 1e-6, torch.finfo(torch.float64).eps: 1e-13}
SPREAD = 0.25  # standard deviation of natural pixels (range 1)


class Counts(NamedTuple):
    """Of a patch, by shapes and weights alone: coordinates (r), equations, determined (coordinates the equations
    determine), rank (of the position table, affine where the patch projection has a bias)."""

    coordinates: int
    equations: int
    determined: int
    rank: int


def count_unknowns(model: nn.Module) -> Counts:
    """Count what the equations of an image know of each of its patches, for a model whose first block is recognised."""
    biased = model.patch_embed.proj.bias is not None
    number, (dim, *kernel) = model.grid[0] * model.grid[1], model.patch_embed.proj.weight.shape
    coordinates = min(number - biased, math.prod(kernel))
    rank = 0
    if model.pos_embed is not None:
        table = patch_rows(model).detach().double()
        rank = int(torch.linalg.matrix_rank(table - table.mean(dim=0) if biased else table, rtol=1e-6))
    equations = max(0, dim - number - prefix_tokens(model) - 1 - len(_shifts(model)))
    return Counts(coordinates, equations, min(coordinates, rank, equations), rank)


def check_token_span(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the equations can be set up and, without `underdetermined`, can determine an image."""
    model, block = leak.model, check_embedding(leak, attack)
    leak.gradient(QKV, attack)
    for name, layer in ((BIAS, model.patch_embed.proj), (QKV_BIAS, block.attn.qkv)):
        if layer.bias is not None:
            leak.gradient(name, attack)
    if block.norm1.weight is not None and not bool(block.norm1.weight.all()):
        raise RefusalError(
            f"attack '{attack}' needs a first LayerNorm that passes every channel on: a weight of it is 0"
        )
    check_tokens(leak, attack)
    check_dropout(leak, attack, seed_helps=False)
    counts = count_unknowns(model)
    if counts.determined < counts.coordinates and not options["underdetermined"]:
        number, dim = model.grid[0] * model.grid[1], len(model.patch_embed.proj.weight)
        raise RefusalError(
            f"attack '{attack}' cannot determine the image, as its equations determine {counts.determined} of the "
            f"{counts.coordinates} coordinates of a patch: {number} patches of {dim} dimensions leave "
            f"{counts.equations} equations, and the position table has rank {counts.rank}; "
            f"--attack_options.underdetermined true leaves the others to a prior"
        )


@checked(check_token_span, uses=lambda options: (LABELS, MJP) if options["match_steps"] else (MJP,))
def token_span(
    leak: Leak,
    *,
    generator: torch.Generator,
    smoothness: float = 20.0,
    prior_steps: int = 100,
    match_steps: int = 300,
    restarts: int = 1,
    labels: str = "bias_corrected",
    underdetermined: bool = False,
) -> Reconstruction:
    """Reconstruct one image from a ViT's patch-embedding and first-block gradients, in float64 on the CPU.

    diagnostics: patches, span (r), determined (coordinates the equations determine to better than the spread of natural
    patches), noise (predicted error of a pixel before any prior, range 1), objective (relative squared error of the
    gradient, mean over tensors; NaN without matching), exact (attacks/exactness.py).
    Raises UserError by `check_token_span`, and for gradients of zero.

    Args:
        smoothness: Weight of the penalty on second differences, per unit of pixel range 1, against the misfit of the
            equations over its variance. Where the equations leave no error worth the name, prior and matching are
            skipped.
        prior_steps: L-BFGS iterations per stage with that penalty.
        match_steps: L-BFGS iterations of gradient matching in the coordinates c_i; 0 for none.
        restarts: Starts of the matching, the first from the prior, others from noise; the lowest objective wins.
        labels: Rule of attacks/label_rules.py where the leak does not tell the label.
        underdetermined: Also take models whose equations cannot determine the image, and leave to prior and matching
            what they leave open.
    """
    leak = on_cpu(leak)
    spans, objective = Spans(leak), math.nan
    found = spans.solution
    if not spans.certain:
        if prior_steps:
            found = _smooth(leak, spans, found, smoothness, prior_steps)
        if match_steps:
            found, objective = _match(leak, spans, found, match_steps, restarts, labels, generator)
    diagnostics = {
        "patches": len(found),
        "span": len(spans.basis),
        "determined": spans.determined,
        "noise": spans.error,
        "objective": objective,
        **claim(patches=spans.exact, places=True),
    }
    patches = spans.point + found @ spans.basis
    image = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
    radius = torch.full((len(found),), OFF * PEAK * spans.error, dtype=torch.float64)
    return Reconstruction(image, diagnostics, certificate=certify(patches, radius) if spans.exact else None)


class Spans:
    """What the two subspaces say. point (P,) and basis (r, P): patch i is point + c_i basis. slope (D, r) and target
    (N, D): the equations slope c_i = target_i, of variance noise (N,). solution (N, r): what they determine of c_i, the
    rest 0; error: predicted, of a pixel (range 1); certain: it is negligible; exact: attacks/exactness.py."""

    def __init__(self, leak: Leak):
        model, number = leak.model, leak.model.grid[0] * leak.model.grid[1]
        names = [name for name in (PATCHES, BIAS, QKV, QKV_BIAS) if name in dict(model.named_parameters())]
        gradient = {name: leak.gradient(name, "token_span").double() for name in names}
        self.eps = rounding(gradient.values())
        self.embed = model.patch_embed.proj.weight.detach().double().flatten(1)  # (D, P)
        weight = gradient[PATCHES].flatten(1)
        if not weight.any() or not gradient[QKV].any():
            raise RefusalError("the gradients are zero everywhere: nothing can be reconstructed from them")
        self._read_hull(weight, gradient.get(BIAS), number)
        tokens, tilt = self._read_tokens(leak, gradient)
        ones = torch.ones(1, tokens.shape[1], dtype=tokens.dtype)
        reach = torch.linalg.qr(torch.cat([tokens, ones, *(shift[None] for shift in _shifts(model))]).T).Q

        def uncertainty(rows: Tensor) -> Tensor:
            """Return the variance with which a projected entry of each row is known."""
            return ((rows @ tokens.T) * tilt).square().sum(dim=1)

        def project(rows: Tensor) -> Tensor:
            return rows - (rows @ reach) @ reach.T

        bias = model.patch_embed.proj.bias
        offset = self.embed @ self.point + token_positions(leak, number)
        offset = _normed(model, offset if bias is None else offset + bias.detach().double())
        moved = _normed(model, self.basis @ self.embed.T)  # (r, D): the tokens along the basis
        self.slope, self.target = project(moved).T, -project(offset)
        self._solve(leak, offset, uncertainty(offset), uncertainty(moved), self.slope.shape[0] - reach.shape[1])

    def _read_hull(self, weight: Tensor, total: Tensor | None, number: int) -> None:
        """Read what the patch-embedding gradient (D, P) says: point and basis, and their misfit: what is left of a
        matrix of rank N, in parts of it."""
        floor = FLOOR.get(self.eps, self.eps)
        if total is None:
            self.point, outside, self.full = torch.zeros_like(weight[0]), weight, number
        elif not total.any():
            raise RefusalError(f"the gradient of '{BIAS}' is zero everywhere: nothing can be reconstructed from it")
        else:
            self.point = weight.T @ total / total.square().sum()
            outside = weight - torch.outer(total, total @ weight) / total.square().sum()
            self.full = number - 1
        _, values, right = torch.linalg.svd(outside, full_matrices=False)
        self.full = min(self.full, weight.shape[1])
        self.basis = right[: min(self.full, int((values > floor * values[0]).sum()))]
        self.misfit = beyond_rank(torch.linalg.svdvals(weight), number, weight.shape)

    def _read_tokens(self, leak: Leak, gradient: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (orthonormal basis (T, D) of the space of the T tokens in front of the first attention, how far
        rounding tilts each of its directions (T,))."""
        norm = leak.model.blocks[0].norm1
        number = leak.model.grid[0] * leak.model.grid[1] + prefix_tokens(leak.model)
        cleared = gradient[QKV]
        if norm.bias is not None and QKV_BIAS in gradient:
            cleared = cleared - torch.outer(gradient[QKV_BIAS], norm.bias.detach().double())
        if norm.weight is not None:
            cleared = cleared / norm.weight.detach().double()
        left, values, right = torch.linalg.svd(cleared, full_matrices=False)
        rest = values[number:]
        # Rounding in an entry of the matrix, as what exceeds its rank shows, tilts the weak directions most.
        entries = max(1, (len(left) - number) * len(rest))
        rounded = max(float(rest.square().sum() / entries) ** 0.5, 1e-16 * float(values[0]))
        self.misfit = max(self.misfit, beyond_rank(torch.linalg.svdvals(gradient[QKV]), number, cleared.shape))
        return right[:number], rounded / values[:number].clamp_min(1e-300)

    def _solve(self, leak: Leak, offset: Tensor, known: Tensor, slip: Tensor, equations: int) -> None:
        """Solve for the coordinates and predict their error. known (N,) and slip (r,): variances with which an entry of
        `offset` and of a column of `slope` are known."""
        left, values, right = torch.linalg.svd(self.slope, full_matrices=False)
        std = torch.tensor(leak.std, dtype=torch.float64)
        # Of natural patches: the standard deviation of a coordinate.
        spread = SPREAD * math.sqrt(self.basis.shape[1] / len(self.basis)) / float(std.mean())
        worst = known + slip.sum() * spread**2  # as if all coordinates were large: for what is claimed
        norm = slip.mean().sqrt() * (math.sqrt(len(left)) + math.sqrt(len(values)))
        rest = self.target - (self.target @ left) @ left.T  # what no c_i can change
        variance = rest.square().sum(dim=1) / max(1, equations - len(values))
        self.noise = torch.maximum(variance, (1e-9 * offset).square().mean(dim=1))  # weighs equations against a prior
        errors = (worst.median().sqrt() + norm * spread) / values.clamp_min(1e-300)
        errors = torch.maximum(errors, variance.median().sqrt() / values.clamp_min(1e-300))
        spoken = (errors < 0.2 * spread) & (torch.arange(len(values)) < equations)
        self.determined = int(spoken.sum())
        solved = (self.target @ left)[:, spoken] / values[spoken]
        self.solution = solved @ right[spoken]
        # A patch outside the hull would show in what is left over, as an error e of its pixels does: |W e|.
        away = variance.median() * len(self.embed) / self.embed.square().sum()
        entry = errors.clamp_max(spread).square().sum() / self.basis.shape[1] + away
        self.error = float((entry * std.square().mean()).sqrt())
        self.certain = self.error < CERTAIN and self.determined == len(self.basis)
        self.exact = self.certain and is_exact(
            rank=self.determined, unknowns=self.full, misfit=self.misfit, error=self.error, eps=self.eps
        )


def _normed(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the differences of tokens (M, D) behind the LayerNorm in front of the blocks, if there is one, times the
    deviation it divides by; what it shifts by is in `_shifts`."""
    norm = getattr(model, "norm_pre", None)
    if not isinstance(norm, nn.LayerNorm):
        return rows
    centred = rows - rows.mean(dim=1, keepdim=True)
    return centred if norm.weight is None else centred * norm.weight.detach().double()


def _shifts(model: nn.Module) -> list[Tensor]:
    """Return the directions (D,) in which a token moves by an unknown amount: shifts of LayerNorms that stay in the
    equations."""
    first, found = model.blocks[0].norm1, []
    before = getattr(model, "norm_pre", None)
    if isinstance(before, nn.LayerNorm) and before.bias is not None:
        found.append(before.bias.detach().double())
    if model.blocks[0].attn.qkv.bias is None and first.bias is not None:
        shift = first.bias.detach().double()
        found.append(shift if first.weight is None else shift / first.weight.detach().double())
    # A constant one is removed as every mean is.
    return [shift for shift in found if bool(shift.any()) and float(shift.std()) > 0]


def token_positions(leak: Leak, number: int) -> Tensor:
    """Return (N, D): what is added to each patch token, hidden ones (where the leak shows them) with the unknown
    embedding."""
    model = leak.model
    if model.pos_embed is None:
        return torch.zeros(number, len(model.patch_embed.proj.weight), dtype=torch.float64)
    places = patch_rows(model).detach().double()
    mask = known_mask(leak).get("mask")
    if mask is not None:
        places = torch.where(mask[0][:, None], model.unknown_pos_embed.detach().double()[0], places)
    index = getattr(model, "index_embed", None)
    return places if index is None else places + index.detach().double()[0, -number:]


def _smooth(leak: Leak, spans: Spans, start: Tensor, smoothness: float, steps: int) -> Tensor:
    """Return (N, r): the coordinates by the equations, each as far as its noise allows, and a prior on the assembled
    picture."""
    penalty, square = Smoothness(leak), spans.slope.T @ spans.slope
    weights = penalty.weights(torch.zeros(len(start), dtype=torch.bool))
    curvature, precision = penalty.curvature(spans.basis), 1 / spans.noise

    def objective(value: Tensor, eps: float) -> Tensor:
        misfit = (value @ spans.slope.T - spans.target).square().sum(dim=1) @ precision / 2
        return misfit + smoothness * penalty(spans.point + value @ spans.basis, weights, eps)

    found = start
    for eps in (100 * SHARP, 10 * SHARP, SHARP):
        metric = precision[:, None, None] * square + smoothness / (5 * eps) * curvature
        found = minimise(lambda value, eps=eps: objective(value, eps), found, steps, metric)
    return found


def _match(
    leak: Leak, spans: Spans, start: Tensor, steps: int, restarts: int, labels: str, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Move the coordinates until the gradient is the leaked one; (coordinates, objective) of the best start."""
    model = client_model(leak.model, training=leak.training, dtype=torch.float64).requires_grad_()
    goal = {name: value.double() for name, value in leak.gradients.items() if value.any()}
    parameters, sizes = dict(model.named_parameters()), {name: value.square().sum() for name, value in goal.items()}
    classes = classes_of(leak.model, leak.image_shape)
    targets = first_labels(leak, labels, classes, 1, generator)[0].double()
    mask = known_mask(leak).get("mask")
    low, high = pixel_bounds(leak, start)

    def objective(values: Tensor) -> Tensor:
        patches = spans.point + values @ spans.basis
        image = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
        loss = training_loss(model, {}, image, targets, mask)
        found = torch.autograd.grad(loss, [parameters[name] for name in goal], create_graph=True)
        parts = [(one - goal[name]).square().sum() / sizes[name] for name, one in zip(goal, found, strict=True)]
        outside = (image - high).clamp_min(0).square().mean() + (low - image).clamp_min(0).square().mean()
        return sum(parts) / len(parts) + outside

    best, score = start, math.inf
    spread = SPREAD * math.sqrt(spans.basis.shape[1] / len(spans.basis)) / float(torch.tensor(leak.std).mean())
    # The prior makes patches alike where the equations are silent: a little noise sets them apart.
    blur = spread * spans.error / (SPREAD + spans.error)
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for restart in range(restarts):
            noise = torch.randn(start.shape, generator=generator).to(start)
            values = (noise * spread if restart else start + 0.1 * blur * noise).requires_grad_()
            optimizer = torch.optim.LBFGS(
                [values],
                max_iter=steps,
                max_eval=2 * steps,
                history_size=50,
                line_search_fn="strong_wolfe",
                tolerance_grad=0,
                tolerance_change=1e-16,
            )

            stage = f"L-BFGS of start {restart + 1}, step"

            def closure(values=values, optimizer=optimizer, stage=stage) -> Tensor:
                tell(stage, optimizer.state[values].get("n_iter", 0), steps)
                optimizer.zero_grad()
                loss = objective(values)
                loss.backward(inputs=[values])
                return loss

            optimizer.step(closure)
            value = float(objective(values).detach())
            if value < score:
                best, score = values.detach(), value
    return best, score
