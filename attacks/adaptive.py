"""Adaptive attack on Masked Jigsaw Puzzle position embeddings, by a server that knows MJP is in use. One image.

Notation as in attacks/closed_form.py: token i has gradient g_i, dL/dW = sum_i g_i x_i^T; k of the N patches are hidden,
their position rows are exactly zero and s, the gradient of the unknown row, is the sum of their g_i.

1. Span. What the visible g_i and s cannot explain of dL/dW has rank k - 1, and its rows B span the differences of the
   hidden patches. With (X0, m) the least-squares solution of the known rows, the visible patches are X0 + C B and the
   hidden ones m + E B, C and E unknown.
2. First block. With h_i the gradient of token i's queries, keys and values, dL/dW_qkv = sum_i h_i LN(z_i)^T. The tokens
   z_i are known up to the span of the hidden ones, and a vector orthogonal to that span and to all visible tokens but
   one selects that token's h_i. The LayerNorm's backward pass then gives q_i = g_i - (what came through attention)
   = g'_i - t_i z_i, with g'_i the gradient behind the attention and t_i a scalar. All g'_i lie in the column space of
   dL/dW_proj, so outside it q_i + t_i z_i = 0: linear equations for C, D - N - 2 of them for k unknowns of each patch.
   In double precision they give the visible patches exactly; no prior, no label. In single precision the smallest
   singular values of dL/dW_proj drown in rounding, the equations hold up to noise of a size that can be measured, and
3. Prior. C minimises that misfit plus a robust penalty on second differences of the picture, across patch borders too,
   with chroma weighted above luma.
4. Hidden patches. E minimises the same penalty over the whole picture, a Gaussian fitted to the visible patches, and
   the misfit of the gradients of the visible queries (known from step 2), which the attention of block one predicts
   from the keys and values of all tokens. The order of the hidden patches is in no gradient (the loss does not depend
   on it); the penalty puts them where they continue their neighbours. Where the visible patches are exact, a
   Levenberg-Marquardt iteration on the query gradients alone follows; it ends at the exact hidden patches when they
   are few. attacks/jigsaw_solver.py then places them.

Step 1 follows docs/method.md; steps 2 to 4 are derived for this project.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attacks.closed_form import closed_form, token_gradients
from attacks.jigsaw_solver import place
from attacks.leak import Leak, Reconstruction
from models.jigsaw import patchify, shuffle_patches, unpatchify
from utils.errors import UserError

NEEDED = ("pos_embed", "patch_embed.proj.weight")
BLOCK = "blocks.0."
FIRST_BLOCK = tuple(BLOCK + name for name in ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"))
SHARP = 0.0025  # second differences below this (pixel range 1) count quadratically, above it linearly
NOISE = 1.5  # singular values up to this multiple of the largest one that can only be noise are treated as noise
CERTAIN = 1e-3  # predicted error of a pixel (range 1) below which the linear equations need no prior
SOLVED = 1e-4  # relative misfit of the query gradients below which the hidden patches count as found
INDEPENDENT = 0.01  # share of the query gradients' errors counted as independent of each other
NEWTON_UNKNOWNS = 1000  # more unknowns are not worth a dense normal matrix


def adaptive(
    leak: Leak,
    *,
    generator: torch.Generator,
    first_block: bool = True,
    smoothness: float = 20.0,
    steps: int = 100,
    hidden_steps: int = 120,
    newton_steps: int = 100,
) -> Reconstruction:
    """Reconstruct one image from a leak of a ViT with learned position embeddings, hidden patches at their own places.

    Tier T1 reads the mask off the rows of the PE gradient, T2 and T3 are told it. Patches in places the gradient shows
    (no unknown row, or an index embedding) go where T3's permutation or else the jigsaw solver puts them; without a
    mask they stay. MJP's permutation is in no gradient: T3 gains nothing over T2 there. `generator` draws the queries
    Newton uses.

    first_block: use the equations of the first block, where the model and the leak have them. smoothness: weight of the
    penalty on second differences, per unit of pixel range 1. steps: L-BFGS iterations per stage for the visible
    patches; hidden_steps: for the hidden ones against the query gradients, 0 only extends the picture smoothly into the
    holes; newton_steps: of Levenberg-Marquardt, 0 for none.
    diagnostics: patches, hidden, rank (dimension of the hidden differences found), residual (share of dL/dW outside the
    known rows), mask_source, first_block (whether its equations were used), noise (median predicted error of a visible
    pixel before any prior, range 1; NaN without first_block), query_residual (relative misfit of the query gradients,
    NaN if unused), exact (its equations determine the image, up to the order of hidden patches).
    Raises UserError for more than one image, tier T0, missing gradients (named) and models this cannot be done to.
    """
    if leak.batch_size != 1:
        raise UserError(f"attack 'adaptive' reconstructs a batch of one image, this gradient is of {leak.batch_size}")
    if leak.tier == "T0":
        raise UserError("attack 'adaptive' knows of MJP: give it tier T1 to T3, or use 'closed_form' for tier T0")
    for name in NEEDED:
        leak.gradient(name, "adaptive")
    if getattr(leak.model, "pos_embed_rows", None) is not None:
        raise UserError("attack 'adaptive' needs a position row for every patch, and this model ties them: token_span")
    told = leak.mask is not None and leak.tier in ("T2", "T3")
    hidden = leak.mask.flatten().cpu() if told else hidden_rows(leak)
    source = {"mask_source": "told" if told else "rows"}
    if not isinstance(getattr(leak.model.patch_embed, "norm", nn.Identity()), nn.Identity):
        raise UserError("attack 'adaptive' needs position embeddings added right after the patch projection")
    rows, _ = token_gradients(leak)
    shows_order = "index_embed" in leak.gradients or not leak.model.hides_positions
    if shows_order or hidden.sum() <= 1:
        result = closed_form(leak, generator=generator)
        image = result.images
        if shows_order and result.diagnostics["exact"]:
            permutation = leak.source.flatten().cpu() if leak.tier == "T3" and leak.source is not None else None
            # Shown patch i is original patch permutation[i].
            order = _solve_order(leak, image, hidden) if permutation is None else permutation.argsort()
            image = _reorder(leak, image, order)
        return Reconstruction(image, result.diagnostics | source)
    unknown = leak.gradient("unknown_pos_embed", "adaptive")
    span = Span.of(leak, rows, hidden, unknown.double().cpu().reshape(1, -1))
    penalty = Smoothness(leak)
    equations = FirstBlock.of(leak, span) if first_block else None
    visible = _visible_patches(span, penalty, equations, smoothness, steps)
    queries = None if equations is None or not hidden_steps else Queries(equations, visible)
    certain = queries is not None and bool(equations.certain.all())
    if not certain or int(hidden.sum()) * len(span.basis) > NEWTON_UNKNOWNS:
        newton_steps = 0
    patches, misfit = _hidden_patches(
        span, penalty, visible, queries, smoothness / 5, hidden_steps, newton_steps, generator
    )
    image = unpatchify(patches[None], leak.model.patch_size, leak.model.grid)
    if newton_steps and misfit < SOLVED:
        image = _reorder(leak, image, _solve_order(leak, image, hidden))
    diagnostics = {
        "patches": len(hidden),
        "hidden": int(hidden.sum()),
        "rank": len(span.basis),
        "residual": span.residual,
        "first_block": equations is not None,
        "noise": float(equations.error.median()) if equations is not None else math.nan,
        "query_residual": misfit,
        "exact": certain and misfit < SOLVED,
    }
    return Reconstruction(image, diagnostics | source)


def hidden_rows(leak: Leak) -> Tensor:
    """(N,) bool: rows of the PE gradient that are zero or, where a defence left none so, as large as its noise.

    The loss does not change when a constant is added to a token, every LayerNorm subtracts it: rows sum to zero, and
    what their sums differ by measures the noise.
    """
    rows = leak.gradient("pos_embed", "adaptive")[0, -leak.model.grid[0] * leak.model.grid[1] :].double().cpu()
    zero = rows.eq(0).all(dim=1)
    if zero.any() or not leak.model.hides_positions:
        return zero
    power = rows.sum(dim=1).square().mean()  # D times the noise variance, the expected square of a row of noise alone
    return rows.square().sum(dim=1) < power * (1 + 6 * math.sqrt(2 / rows.shape[1]))


def _solve_order(leak: Leak, image: Tensor, hidden: Tensor) -> Tensor:
    """(N,): where the hidden patches of the image belong, by the jigsaw solver."""
    if hidden.all() or not hidden.any():
        return torch.arange(len(hidden))
    patches = patchify(_pixels(leak, image), leak.model.patch_size)[0]
    return place(patches, hidden, leak.model.grid, leak.model.patch_size)


def _reorder(leak: Leak, image: Tensor, source: Tensor) -> Tensor:
    return shuffle_patches(image, source[None], leak.model.patch_size)


def _pixels(leak: Leak, images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    return images * std + mean


def _centre(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Span:
    """What the patch-embedding gradient says: patches are `base` (N, P), one row for each, plus a combination of the
    rows of `basis` (r, P), r < k. rows (N, D): gradients of the visible tokens, zero for hidden ones."""

    rows: Tensor
    hidden: Tensor
    base: Tensor
    basis: Tensor
    residual: float

    @classmethod
    def of(cls, leak: Leak, rows: Tensor, hidden: Tensor, unknown: Tensor) -> "Span":
        weight = leak.gradient("patch_embed.proj.weight", "adaptive").double().cpu().flatten(1)  # (D, P)
        known = torch.cat([rows[~hidden], unknown])
        count, dim = int(hidden.sum()), known.shape[1]
        if len(hidden) >= dim:
            size = f"{len(hidden)} patches and {dim} embedding dimensions"
            raise UserError(f"attack 'adaptive' needs fewer patches than embedding dimensions, this model has {size}")
        if not weight.any() or not known.any():
            raise UserError("the gradients are zero everywhere: nothing can be reconstructed from them")
        solution = torch.linalg.lstsq(known.T, weight, driver="gelsd").solution
        left = torch.linalg.qr(known.T).Q
        rest = weight - left @ (left.T @ weight)
        _, values, directions = torch.linalg.svd(rest, full_matrices=False)
        floor = values[count - 1] if count - 1 < len(values) else 0
        rank = min(count - 1, int((values > NOISE * floor).sum()))
        base = torch.empty(len(hidden), weight.shape[1], dtype=weight.dtype)
        base[~hidden], base[hidden] = solution[:-1], solution[-1]
        return cls(rows, hidden, base, directions[:rank], float(rest.norm() / weight.norm()))


class Smoothness:
    """Robust penalty on the second differences of a picture made of patches: sum of sqrt(d^2 + eps^2).

    Measured against first differences, the same weight for chroma, and a quadratic: see docs/results.md. In pixel
    units (range 1), in luma and two chroma channels, the latter weighted by CHROMA because natural chroma varies less.
    """

    CHROMA = 5.0
    WEIGHTS = (1.0, 1.0, 3.0)  # horizontal, vertical, mixed

    def __init__(self, leak: Leak):
        self.patch, self.grid, channels = leak.model.patch_size, leak.model.grid, leak.image_shape[0]
        colours = torch.eye(channels, dtype=torch.float64)
        if channels == 3:
            colours = nn.functional.normalize(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]).double(), dim=1)
            colours[1:] *= self.CHROMA
        self.colours = colours * torch.tensor(leak.std, dtype=torch.float64)

    @staticmethod
    def differences(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        across, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
        return (
            across[..., 1:] - across[..., :-1],
            down[..., 1:, :] - down[..., :-1, :],
            across[..., 1:, :] - across[..., :-1, :],
        )

    def weights(self, absent: Tensor) -> tuple[Tensor, ...]:
        """Per second difference its weight, 0 where it touches a patch that is `absent` (N,) bool."""
        gaps = absent.view(1, *self.grid).double().repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        windows = ((1, 3), (3, 1), (2, 2))
        return tuple(
            weight * (1 - nn.functional.max_pool2d(gaps, window, 1))
            for weight, window in zip(self.WEIGHTS, windows, strict=True)
        )

    def __call__(self, patches: Tensor, weights: tuple[Tensor, ...], eps: float) -> Tensor:
        image = torch.einsum("ij,jhw->ihw", self.colours, unpatchify(patches[None], self.patch, self.grid)[0])
        parts = zip(self.differences(image), weights, strict=True)
        return sum((weight * (part.square() + eps**2).sqrt()).sum() for part, weight in parts)

    def curvature(self, basis: Tensor) -> Tensor:
        """(r, r): the quadratic form of one patch on black, in coordinates of the basis; a preconditioner."""
        patches = basis.view(len(basis), -1, self.patch, self.patch)
        parts = self.differences(nn.functional.pad(torch.einsum("ij,kjhw->kihw", self.colours, patches), (2, 2, 2, 2)))
        flat = [part.flatten(1) * math.sqrt(weight) for part, weight in zip(parts, self.WEIGHTS, strict=True)]
        return sum(part @ part.T for part in flat)


class FirstBlock:
    """Equations of the first block for the coordinates C (U, r) of the visible patches; see step 2 of the module."""

    def __init__(self, leak: Leak, span: Span):
        parameters = {name: value.detach().double().cpu() for name, value in leak.model.named_parameters()}
        gradient = {name: leak.gradient(name, "adaptive").double().cpu() for name in (*FIRST_BLOCK, "pos_embed")}
        hidden, block = span.hidden, leak.model.blocks[0]
        self.heads, self.eps = block.attn.num_heads, block.norm1.eps
        self.scale, self.bias = parameters[BLOCK + "norm1.weight"], parameters[BLOCK + "norm1.bias"]
        self.qkv, self.qkv_bias = parameters[BLOCK + "attn.qkv.weight"], parameters[BLOCK + "attn.qkv.bias"]
        self.proj = parameters[BLOCK + "attn.proj.weight"]
        self.embed, self.span = parameters["patch_embed.proj.weight"].flatten(1), span
        places = parameters["pos_embed"][0, 1:].clone()
        places[hidden] = parameters["unknown_pos_embed"].flatten()
        self.offset = places + parameters["patch_embed.proj.bias"]
        token = _centre(parameters["cls_token"][0] + parameters["pos_embed"][0, :1])
        tokens = _centre(span.base @ self.embed.T + self.offset)
        directions = _centre(span.basis @ self.embed.T)
        self.tokens, self.directions = torch.cat([token, tokens[~hidden]]), directions  # class token first
        number = len(self.tokens)
        # Columns: vectors that see one visible token each, no other, and nothing of the hidden ones.
        selectors = torch.linalg.pinv(torch.cat([self.tokens, tokens[hidden][:1], directions]))[:, :number]
        qkv = gradient[BLOCK + "attn.qkv.weight"] - gradient[BLOCK + "attn.qkv.bias"][:, None] * self.bias
        self.through = ((qkv / self.scale) @ selectors).T  # (1 + U, 3 D): h_i over the standard deviation of token i
        rows = torch.cat([gradient["pos_embed"][0, :1], span.rows[~hidden]])
        self.known = rows - _centre(self.through @ self.qkv * self.scale)  # q_i
        # Project onto what dL/dW_proj cannot reach; singular values beyond the number of tokens are noise alone.
        left, values, _ = torch.linalg.svd(gradient[BLOCK + "attn.proj.weight"])
        rank = min(len(hidden) + 1, int((values > NOISE * values[len(hidden) + 1]).sum()))
        ones = torch.ones(len(left), 1, dtype=left.dtype)
        reach = torch.linalg.qr(torch.cat([left[:, :rank], ones], dim=1)).Q
        outside = [part - (part @ reach) @ reach.T for part in (self.tokens, self.known, directions)]
        self.start, self.target, self.slope = outside[0][1:], outside[1][1:], outside[2]
        # t_i and the noise from what no choice of C can change.
        fixed = torch.linalg.qr(self.slope.T).Q
        start, target = (part - (part @ fixed) @ fixed.T for part in (self.start, self.target))
        self.ratio = -(start * target).sum(1) / start.square().sum(1)
        self.freedom = len(left) - rank - 1 - len(directions) - 1
        self.class_ratio = -(outside[0][0] @ outside[1][0]) / outside[0][0].square().sum()
        tiny = torch.finfo(left.dtype).tiny
        misfit = (target + self.ratio[:, None] * start).square().sum(1)
        self.noise = (misfit / max(self.freedom, 1)).clamp_min(tiny)
        self.metric = self.slope @ self.slope.T
        # Error of a pixel (range 1) that this noise means for each visible patch.
        pixel = torch.tensor(leak.std, dtype=torch.float64).square().mean() / span.base.shape[1]
        spread = torch.linalg.pinv(self.metric, hermitian=True).trace() * pixel
        self.error = (self.noise / self.ratio.square().clamp_min(tiny) * spread).sqrt()
        self.certain = self.error < CERTAIN

    @classmethod
    def of(cls, leak: Leak, span: Span) -> "FirstBlock | None":
        """The equations, or None where model or leak do not have them or they are fewer than the unknowns."""
        model, block = leak.model, leak.model.blocks[0]
        plain = [getattr(model, "norm_pre", None), getattr(block, "ls1", None)]
        plain += [getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm")]
        known = all(name in leak.gradients for name in FIRST_BLOCK) and model.num_prefix_tokens == 1
        known &= all(module is None or isinstance(module, nn.Identity) for module in plain)
        norm = getattr(block, "norm1", None)
        known &= isinstance(norm, nn.LayerNorm) and norm.weight is not None and bool(norm.weight.all())
        known &= not bool(span.hidden.all())
        if not known or len(span.hidden) + 2 >= span.rows.shape[1] or not len(span.basis):
            return None
        equations = cls(leak, span)
        return equations if equations.freedom >= 1 else None

    @cached_property
    def solution(self) -> Tensor:
        """C (U, r) by the equations alone, one small least-squares problem per patch."""
        wanted = -(self.target / self.ratio[:, None] + self.start)
        return torch.linalg.lstsq(self.slope.T, wanted.T, driver="gelsd").solution.T

    def ratios(self, coordinates: Tensor) -> Tensor:
        """(U,): the best t_i for these patches."""
        tokens = self.start + coordinates @ self.slope
        return -(tokens * self.target).sum(1) / tokens.square().sum(1)

    def misfit(self, coordinates: Tensor, ratio: Tensor | None) -> Tensor:
        """Half the squared misfit over its variance; with `ratio` None at the best t_i, else a quadratic in C."""
        tokens = self.start + coordinates @ self.slope
        ratio = self.ratios(coordinates) if ratio is None else ratio
        return ((self.target + ratio[:, None] * tokens).square().sum(1) / self.noise).sum() / 2


def _minimise(objective, start: Tensor, steps: int, curvature: Tensor) -> Tensor:
    """L-BFGS on `objective` of the shape of `start` (M, r), in coordinates where `curvature` (1 or M, r, r) is one."""
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
        optimizer.zero_grad()
        loss = objective(unfold(values))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return unfold(values.detach())


def _visible_patches(
    span: Span, penalty: Smoothness, equations: FirstBlock | None, smoothness: float, steps: int
) -> Tensor:
    """(U, P): the visible patches by equations and prior; by the equations alone where they are certain."""
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
    for eps in (100 * SHARP, 10 * SHARP, SHARP):  # nearly quadratic first: the robust penalty is slow from far away
        smooth = _minimise(lambda value, eps=eps: roughness(value, eps), smooth, steps // 2, curvature / eps)
    if equations is None:
        return base + smooth @ basis
    # With t_i left free the equations have local minima where a patch is far off. Small masks are best entered from
    # the prior alone, large ones from the equations at their own t_i; the objective tells which it was.
    stiff = torch.zeros_like(smooth)
    for eps in (100 * SHARP, 10 * SHARP):
        goal = partial(objective, ratio=equations.ratio, eps=eps)
        stiff = _minimise(goal, stiff, steps // 2, metric(equations.ratio, eps))
    ends = []
    for found in (smooth, stiff):
        found = _minimise(objective, found, steps, metric(equations.ratio, SHARP))
        ratio = equations.ratios(found)
        ends.append(_minimise(partial(objective, ratio=ratio), found, steps, metric(ratio, SHARP)))
    found = min(ends, key=lambda end: float(objective(end)))
    return base + torch.where(equations.certain[:, None], equations.solution, found) @ basis


class Queries:
    """Gradients of the visible tokens' queries in the first block, as a function of the hidden patches.

    The attention of a visible query reads keys and values of every token: with its output gradient known and the
    visible tokens known, the keys and values of the hidden ones are the only unknowns.
    """

    def __init__(self, block: FirstBlock, visible: Tensor):
        self.block, hidden = block, block.span.hidden
        offsets = block.offset
        self.offset = offsets[hidden][:1]  # bias and unknown embedding, the same for all
        tokens = _centre(visible @ block.embed.T + offsets[~hidden])
        tokens = torch.cat([block.tokens[:1], tokens])
        fit = (visible - block.span.base[~hidden]) @ block.span.basis.T
        ratio = torch.cat([block.class_ratio[None], torch.where(block.certain, block.ratio, block.ratios(fit))])
        behind = block.known + ratio[:, None] * tokens  # g'_i
        deviation = (tokens.square().mean(1, keepdim=True) + block.eps).sqrt()
        normed = tokens / deviation * block.scale + block.bias
        self.queries, self.keys, self.values = self._split(normed @ block.qkv.T + block.qkv_bias)
        self.targets = self._split(block.through * deviation)[0]
        (self.outputs,) = self._split(behind @ block.proj, 1)
        self.temperature = self.queries.shape[2] ** -0.5
        self.norm = self.targets.square().mean().sqrt()

    def _split(self, rows: Tensor, parts: int = 3) -> list[Tensor]:
        """(M, parts D) -> `parts` tensors (heads, M, D / heads)."""
        return [part.unflatten(1, (self.block.heads, -1)).transpose(0, 1) for part in rows.chunk(parts, dim=1)]

    def residual(self, patches: Tensor, chosen: Tensor | slice = slice(None), basis: Tensor | None = None):
        """(heads, Q, D / heads): relative error of the chosen queries' gradients for hidden patches (k, P).

        With a basis (r, P) of the directions in which patches move, also its Jacobian (elements, k r).
        """
        block = self.block
        tokens = _centre(patches @ block.embed.T + self.offset)
        deviation = (tokens.square().mean(1, keepdim=True) + block.eps).sqrt()
        unit = tokens / deviation
        _, keys, values = self._split((unit * block.scale + block.bias) @ block.qkv.T + block.qkv_bias)
        queries, outputs = self.queries[:, chosen], self.outputs[:, chosen]
        every_key, every_value = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
        attention = (queries @ every_key.mT * self.temperature).softmax(dim=2)
        upstream = outputs @ every_value.mT
        excess = upstream - (attention * upstream).sum(dim=2, keepdim=True)
        gradient = (attention * excess) @ every_key
        residual = (gradient * self.temperature - self.targets[:, chosen]) / self.norm
        if basis is None:
            return residual
        # d gradient = sum_m a_m [dlogit_m (excess_m (k_m - mean k) - gradient) + dupstream_m (k_m - mean k)
        #              + excess_m dk_m], with m the hidden patches.
        moved = _centre(basis @ block.embed.T)
        change = moved[None] - unit[:, None] * (unit @ moved.T / unit.shape[1])[..., None]
        change = (change / deviation[:, None] * block.scale).flatten(0, 1) @ block.qkv[unit.shape[1] :].T
        dkeys, dvalues = (part.unflatten(1, (len(patches), -1)) for part in self._split(change, 2))
        last = slice(-len(patches), None)
        apart = keys[:, None] - (attention @ every_key)[:, :, None]  # (heads, Q, k, D / heads)
        inner = excess[:, :, last, None] * apart - gradient[:, :, None]
        logits = torch.einsum("hqe,hmbe->hqmb", queries, dkeys) * self.temperature
        passed = torch.einsum("hqe,hmbe->hqmb", outputs, dvalues)
        jacobian = torch.einsum("hqmb,hqme->hqemb", logits, inner) + torch.einsum("hqmb,hqme->hqemb", passed, apart)
        jacobian += torch.einsum("hqm,hmbe->hqemb", excess[:, :, last], dkeys)
        jacobian *= attention[:, :, None, last, None] * (self.temperature / self.norm)
        return residual, jacobian.flatten(0, 2).flatten(1)


def _hidden_patches(
    span: Span,
    penalty: Smoothness,
    visible: Tensor,
    queries: Queries | None,
    smoothness: float,
    steps: int,
    newton_steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """((N, P) all patches, relative misfit of the query gradients or NaN)."""
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
        found = _minimise(lambda value, eps=eps: prior(value, eps), found, 60, unit + smoothness / eps * curvature)
    misfit = math.nan
    if queries is not None:
        # Their errors come from the visible patches: correlated, of unknown size, which is profiled out.
        count = INDEPENDENT * queries.targets.numel()

        def objective(value: Tensor) -> Tensor:
            return count / 2 * queries.residual(mean + value @ basis).square().mean().log() + prior(value, 10 * SHARP)

        found = _minimise(objective, found, steps, unit + smoothness / (10 * SHARP) * curvature)
        if newton_steps:
            placed = found @ basis
            found = _newton(queries, mean, basis, found, newton_steps, generator)
            # Newton does not look at the picture: its patches go where those nearest to them were.
            found = found[linear_sum_assignment(torch.cdist(placed, found @ basis).square().numpy())[1]]
        misfit = float(queries.residual(mean + found @ basis).square().mean().sqrt())
    patches[hidden] = mean + found @ basis
    return patches, misfit


def _newton(
    queries: Queries, mean: Tensor, basis: Tensor, start: Tensor, steps: int, generator: torch.Generator
) -> Tensor:
    """Levenberg-Marquardt on as many randomly chosen queries as make four equations per unknown."""
    heads, number, width = queries.targets.shape
    wanted = min(number, max(8, math.ceil(4 * start.numel() / (heads * width))))
    chosen = torch.randperm(number, generator=generator)[:wanted]
    found, damping = start, 1e-3
    residual, jacobian = queries.residual(mean + found @ basis, chosen, basis)
    for _ in range(steps):
        normal, slope, cost = jacobian.T @ jacobian, jacobian.T @ residual.flatten(), residual.square().sum()
        for _ in range(8):
            damped = normal + torch.diag(damping * normal.diagonal() + 1e-14 * normal.diagonal().max())
            trial = found - torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(damped)).view_as(found)
            if queries.residual(mean + trial @ basis, chosen).square().sum() < cost:
                break
            damping *= 6
        else:
            break
        found, damping = trial, max(damping / 4, 1e-14)
        residual, jacobian = queries.residual(mean + found @ basis, chosen, basis)
        if residual.square().sum() > cost * (1 - 1e-4):
            break
    return found
