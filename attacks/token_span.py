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
equations leave free is first chosen by a prior on pictures and then by matching the gradient in those coordinates.

Source: derived for this project; docs/method.md. APRIL (Lu et al., CVPR 2022) proposes withholding and fixed tables as
defences against attacks on the position embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attacks.leak import Leak, Reconstruction
from attacks.local_step import classes_of, client_model, training_loss
from attacks.mjp_equations import CERTAIN
from attacks.mjp_patches import minimise
from attacks.smoothness import SHARP, Smoothness
from attacks.start import first_labels, known_puzzle, pixel_box
from models.jigsaw import unpatchify
from models.position import patch_rows
from utils.errors import UserError

WEIGHT, BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
QKV, QKV_BIAS = "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-13}  # singular values below this share of the largest are rounding
SPREAD = 0.25  # standard deviation of natural pixels (range 1)


def token_span(
    leak: Leak,
    *,
    generator: torch.Generator,
    smoothness: float = 20.0,
    prior_steps: int = 100,
    match_steps: int = 300,
    restarts: int = 1,
    labels: str = "bias_corrected",
) -> Reconstruction:
    """Reconstruct one image from a ViT's patch-embedding and first-block gradients, in float64 on the CPU.

    smoothness: weight of the penalty on second differences, per unit of pixel range 1, against the misfit of the
    equations over its variance. prior_steps: L-BFGS iterations per stage of that; match_steps: L-BFGS iterations of
    gradient matching in the coordinates c_i, 0 for none; restarts: its starts, the first from the prior, others from
    noise, of which the lowest objective wins. labels: the rule where the leak does not tell. Where the equations leave
    no error worth the name, prior and matching are skipped.
    diagnostics: patches, span (r), determined (coordinates the equations determine to better than the spread of natural
    patches), noise (predicted error of a pixel before any prior, range 1), objective (relative squared error of the
    gradient, mean over tensors; NaN without matching), exact (the equations determine the image).
    Raises UserError for models and leaks without these gradients, and for more than one image.
    """
    if leak.batch_size != 1 or leak.local is not None:
        raise UserError("attack 'token_span' solves for one image behind one gradient: use batch_size 1, local_steps 1")
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
        "exact": spans.certain,
    }
    patches = spans.point + found @ spans.basis
    return Reconstruction(unpatchify(patches[None], leak.model.patch_size, leak.model.grid), diagnostics)


class Spans:
    """What the two subspaces say. point (P,) and basis (r, P): patch i is point + c_i basis. slope (D, r) and target
    (N, D): the equations slope c_i = target_i, of variance noise (N,)."""

    def __init__(self, leak: Leak):
        model = leak.model
        block = model.blocks[0] if hasattr(model, "blocks") else None
        if not isinstance(getattr(block, "norm1", None), nn.LayerNorm) or not bool(block.norm1.weight.all()):
            raise UserError("attack 'token_span' needs a ViT with a LayerNorm in front of its first attention")
        gradient = {name: leak.gradient(name, "token_span").double().cpu() for name in (WEIGHT, BIAS, QKV, QKV_BIAS)}
        floor = FLOOR.get(leak.gradients[WEIGHT].dtype, 1e-3)  # half precision
        number = model.grid[0] * model.grid[1]
        weight, total = gradient[WEIGHT].flatten(1), gradient[BIAS]  # (D, P), (D,)
        if not weight.any() or not total.any():
            raise UserError("the gradients are zero everywhere: nothing can be reconstructed from them")
        self.point = weight.T @ total / total.square().sum()
        outside = weight - torch.outer(total, total @ weight) / total.square().sum()
        self.basis = span_of_rows(outside, number - 1, floor)

        scale, shift = (value.detach().double().cpu() for value in (block.norm1.weight, block.norm1.bias))
        cleared = (gradient[QKV] - torch.outer(gradient[QKV_BIAS], shift)) / scale
        number_of_tokens = number + model.num_prefix_tokens
        left, values, right = torch.linalg.svd(cleared, full_matrices=False)
        tokens, rest = right[:number_of_tokens], values[number_of_tokens:]
        ones = torch.ones(1, tokens.shape[1], dtype=tokens.dtype)
        reach = torch.linalg.qr(torch.cat([tokens, ones]).T).Q
        # Rounding in an entry of the matrix, as what exceeds its rank shows, tilts the weak directions of S most.
        entries = max(1, (len(left) - number_of_tokens) * len(rest))
        rounding = max(float(rest.square().sum() / entries) ** 0.5, 1e-16 * float(values[0]))
        tilt = rounding / values[:number_of_tokens].clamp_min(1e-300)

        def uncertainty(rows: Tensor) -> Tensor:
            """Variance with which a projected entry of each row is known."""
            return ((rows @ tokens.T) * tilt).square().sum(dim=1)

        embed = model.patch_embed.proj.weight.detach().double().cpu().flatten(1)
        offset = (
            model.patch_embed.proj.bias.detach().double().cpu() + embed @ self.point + token_positions(leak, number)
        )

        def project(rows: Tensor) -> Tensor:
            return rows - (rows @ reach) @ reach.T

        self.slope, self.target = project(self.basis @ embed.T).T, -project(offset)
        left, values, right = torch.linalg.svd(self.slope, full_matrices=False)
        # Of natural patches: the standard deviation of a coordinate.
        spread = SPREAD * math.sqrt(self.basis.shape[1] / len(self.basis)) / float(torch.tensor(leak.std).mean())
        slip = uncertainty(self.basis @ embed.T)
        worst = uncertainty(offset) + slip.sum() * spread**2  # as if all coordinates were large: for what is claimed
        norm = slip.mean().sqrt() * (math.sqrt(len(left)) + math.sqrt(len(values)))
        errors = (worst.median().sqrt() + norm * spread) / values.clamp_min(1e-300)
        misfit = self.target - (self.target @ left) @ left.T  # what no c_i can change: for the weight of the equations
        freedom = max(1, embed.shape[0] - reach.shape[1] - len(values))
        self.noise = torch.maximum(misfit.square().sum(dim=1) / freedom, (1e-9 * offset).square().mean(dim=1))
        spoken = (errors < 0.2 * spread) & (torch.arange(len(values)) < embed.shape[0] - reach.shape[1])
        self.determined = int(spoken.sum())
        solved = (self.target @ left)[:, spoken] / values[spoken]
        self.solution = solved @ right[spoken]
        pixels = torch.tensor(leak.std, dtype=torch.float64).square().mean() / self.basis.shape[1]
        self.error = float((errors.clamp_max(spread).square().sum() * pixels).sqrt())
        self.certain = self.error < CERTAIN


def span_of_rows(matrix: Tensor, rank: int, floor: float) -> Tensor:
    """Orthonormal basis of the rows, at most `rank` of them."""
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return right[: min(rank, int((values > floor * values[0]).sum()))]


def token_positions(leak: Leak, number: int) -> Tensor:
    """(N, D): what is added to each patch token, hidden ones (where the leak shows them) with the unknown embedding."""
    model = leak.model
    if model.pos_embed is None:
        return torch.zeros(number, model.embed_dim, dtype=torch.float64)
    places = patch_rows(model).detach().double().cpu()
    mask = known_puzzle(leak).get("mask")
    if mask is not None:
        places = torch.where(mask[0].cpu()[:, None], model.unknown_pos_embed.detach().double().cpu()[0], places)
    index = getattr(model, "index_embed", None)
    return places if index is None else places + index.detach().double().cpu()[0, -number:]


def _smooth(leak: Leak, spans: Spans, start: Tensor, smoothness: float, steps: int) -> Tensor:
    """(N, r): coordinates by the equations, each as far as its noise allows, and a prior on the assembled picture."""
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
    model = client_model(leak.model, training=leak.training, dtype=torch.float64).cpu().requires_grad_()
    goal = {name: value.double().cpu() for name, value in leak.gradients.items() if value.any()}
    parameters, sizes = dict(model.named_parameters()), {name: value.square().sum() for name, value in goal.items()}
    classes = classes_of(leak.model, leak.image_shape)
    targets = first_labels(leak, labels, classes, 1, generator)[0].double()
    mask = known_puzzle(leak).get("mask")
    low, high = pixel_box(leak, start)

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

            def closure(values=values, optimizer=optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = objective(values)
                loss.backward(inputs=[values])
                return loss

            optimizer.step(closure)
            value = float(objective(values).detach())
            if value < score:
                best, score = values.detach(), value
    return best, score
