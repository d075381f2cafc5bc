"""Attack on Masked Jigsaw Puzzle position embeddings, by a server that knows MJP is in use. One image.

Notation as in attacks/linear/closed_form.py: token i has gradient g_i, dL/dW = sum_i g_i x_i^T; k of the N patches are
hidden, their position rows are exactly zero, and s, the gradient of the unknown row, is the sum of their g_i.

1. Span. What the visible g_i and s cannot explain of dL/dW has rank k - 1, and its rows B span the differences of the
   hidden patches. With (X0, m) the least-squares solution of the known rows, the visible patches are X0 + C B and the
   hidden ones m + E B, C and E unknown.
2. First block. With h_i the gradient of token i's queries, keys and values, dL/dW_qkv = sum_i h_i LN(z_i)^T. The tokens
   z_i are known up to the span of the hidden ones, and a vector orthogonal to that span and to all visible tokens but
   one selects that token's h_i. The LayerNorm's backward pass then gives q_i = g_i - (what came through attention)
   = g'_i - t_i z_i, with g'_i the gradient behind the attention and t_i a scalar. All g'_i lie in the column space of
   dL/dW_proj, so outside it q_i + t_i z_i = 0: linear equations for C, D - N - 3 of them for a patch's k - 1 unknowns.
   In double precision they give the visible patches exactly; no prior, no label. In single precision the smallest
   singular values of dL/dW_proj drown in rounding, the equations hold up to noise of a size that can be measured, and
3. Prior. C minimises that misfit plus a robust penalty on second differences of the picture, across patch borders too,
   with chroma weighted above luma.
4. Hidden patches. E minimises the same penalty over the whole picture, a Gaussian fitted to the visible patches, and
   the misfit of the gradients of the visible queries (known from step 2), which the attention of block one predicts
   from the keys and values of all tokens. The order of the hidden patches is in no gradient (the loss does not depend
   on it); the penalty puts them where they continue their neighbours. Where the visible patches are exact, a
   Levenberg-Marquardt iteration on the query gradients alone follows; it ends at the exact hidden patches when they
   are few. attacks/linear/jigsaw_solver.py then places them.

Steps 1 and 2 are attacks/linear/mjp_equations.py, the query gradients mjp_queries.py, the prior smoothness.py, and the
search mjp_patches.py. Step 1 follows docs/method.md; steps 2 to 4 are derived for this project.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from attacks.certified import PEAK, Certificate, certify
from attacks.exactness import CERTAIN, MARGIN, OFF, claim, rounding
from attacks.linear.closed_form import check_counts, closed_form, token_gradients
from attacks.linear.jigsaw_solver import place
from attacks.linear.layer_scale import fold_layer_scale
from attacks.linear.mjp_equations import FirstBlock, Span, check_equations
from attacks.linear.mjp_patches import SOLVED, hidden_error, hidden_patches, visible_patches
from attacks.linear.mjp_queries import Queries
from attacks.linear.smoothness import Smoothness
from attacks.linear.softmax_attention import is_softmax, norms_queries
from attacks.threat_model.checks import PATCHES, check_patches, check_rows, check_tokens, checked
from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.leak import Leak, Reconstruction, RefusalError, on_cpu
from attacks.threat_model.uses import MJP
from models.jigsaw import patchify, shuffle_patches, unpatchify
from utils.errors import UserError

FOUND = 100.0  # times the square root of the leak's rounding: the largest misfit of queries that rounding explains
NEWTON_UNKNOWNS = 1000  # more unknowns are not worth a dense normal matrix


def check_mjp_aware(leak: Leak, options: dict, loss: str, attack: str) -> None:
    """Raise UserError unless the equations can determine the visible patches of a step, for an attacker who knows of
    MJP: one image, a position row of its own for every patch, fewer patches than embedding dimensions and, where the
    model hides positions, the equations of the first block."""
    if leak.batch_size != 1:
        raise RefusalError(
            f"attack '{attack}' reconstructs a batch of one image, this gradient is of {leak.batch_size}"
        )
    if leak.attacker_knowledge == "none":
        raise RefusalError(
            f"attack '{attack}' knows of MJP: give --attacker_knowledge method or more, or use 'closed_form'"
        )
    for name in ("pos_embed", PATCHES):
        leak.gradient(name, attack)
    if getattr(leak.model, "pos_embed_rows", None) is not None:
        raise RefusalError(
            f"attack '{attack}' needs a position row for every patch, and this model ties them: token_span"
        )
    check_patches(leak, attack)
    check_rows(leak, attack)
    check_tokens(leak, attack)
    check_counts(leak, attack)
    if not getattr(leak.model, "hides_positions", False):
        return
    leak.gradient("unknown_pos_embed", attack)
    if options["first_block"] and "index_embed" not in leak.gradients:
        try:
            check_equations(leak, attack)
        except UserError as error:
            raise type(error)(
                f"{error}; --attack_options.first_block false leaves the visible patches of a masked step to a prior, "
                f"and 'closed_form' solves steps without a mask"
            ) from error


@checked(check_mjp_aware, uses=(MJP,))
def mjp_aware(
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

    An attacker who knows the method reads the mask off the rows of the PE gradient; others are told it. Patches in
    places the gradient shows (no unknown row, or an index embedding) go where the permutation, if it is told, or else
    the jigsaw solver puts them; without a mask they stay. MJP's permutation is in no gradient: being told it gains
    nothing there. `generator` draws the queries Newton uses.

    diagnostics: patches, hidden, rank (dimension of the hidden differences found), residual (share of dL/dW outside the
    known rows), mask_source, first_block (whether its equations were used), noise (median predicted error of a visible
    pixel before any prior, range 1; NaN without first_block), query_residual (relative misfit of the query gradients,
    NaN if unused), exact and exact_up_to_order (attacks/exactness.py; the order of two or more hidden patches is the
    jigsaw solver's, unless T3 is told it). Hidden patches are left to the prior where the first attention is not a
    plain softmax of queries and keys.
    Raises UserError for more than one image, an attacker without knowledge of MJP, missing gradients (named) and models
    this cannot be done to.

    Args:
        first_block: Use the equations of the first block for the visible patches of a masked step; false leaves them
            to a prior.
        smoothness: Weight of the penalty on second differences, per unit of pixel range 1.
        steps: L-BFGS iterations per stage for the visible patches.
        hidden_steps: L-BFGS iterations for the hidden patches against the query gradients; 0 only extends the picture
            smoothly into the holes.
        newton_steps: Iterations of Levenberg-Marquardt for the hidden patches; 0 for none.
    """
    leak = fold_layer_scale(on_cpu(leak))
    told = leak.mask is not None and leak.attacker_knowledge in ("mask", "permutation")
    hidden = leak.mask.flatten().cpu() if told else hidden_rows(leak).cpu()
    source = {"mask_source": "told" if told else "rows"}
    rows, _ = token_gradients(leak)
    shows_order = "index_embed" in leak.gradients or not leak.model.hides_positions
    if shows_order or hidden.sum() <= 1:
        found = _in_shown_places(leak, hidden, shows_order, generator)
        return replace(found, diagnostics=found.diagnostics | source)
    unknown = leak.gradient("unknown_pos_embed", "mjp_aware")
    span = Span.of(leak, rows, hidden, unknown.double().cpu().reshape(1, -1))
    penalty = Smoothness(leak)
    equations = FirstBlock.of(leak, span) if first_block else None
    visible = visible_patches(span, penalty, equations, smoothness, steps)
    attention = leak.model.blocks[0].attn
    predicted = equations is not None and is_softmax(leak.model.blocks[0]) and not norms_queries(attention)
    queries = Queries(equations, visible) if predicted and hidden_steps else None
    eps = rounding(leak.gradients[name] for name in ("pos_embed", PATCHES))
    certain = queries is not None and bool(equations.certain.all())
    if not certain or int(hidden.sum()) * len(span.basis) > NEWTON_UNKNOWNS:
        newton_steps = 0
    patches, misfit = hidden_patches(
        span, penalty, visible, queries, smoothness / 5, hidden_steps, newton_steps, generator
    )
    solved = certain and len(span.basis) == int(hidden.sum()) - 1 and misfit < min(SOLVED, FOUND * eps**0.5)
    error = hidden_error(queries, patches[hidden], span.basis) if solved else math.inf
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
        **claim(patches=solved and MARGIN * error * max(leak.std) < CERTAIN, places=False),
    }
    return Reconstruction(image, diagnostics | source, certificate=_certificate(equations, patches, hidden))


def _certificate(equations: FirstBlock | None, patches: Tensor, hidden: Tensor) -> Certificate | None:
    """Return how far the visible patches that are certain can be off; of the others, (N,) hidden among them, nothing
    is claimed."""
    if equations is None:
        return None
    radius = torch.full((len(hidden),), torch.inf, dtype=torch.float64)
    radius[~hidden] = (OFF * PEAK * equations.error).where(equations.certain, torch.inf)
    return certify(patches, radius, hidden)


def _in_shown_places(leak: Leak, hidden: Tensor, shows_order: bool, generator: torch.Generator) -> Reconstruction:
    """Return the closed form of a leak that shows every patch in its place; where patches were moved there
    (`shows_order`), they go back as the permutation, or else the jigsaw solver, says."""
    result = closed_form(leak, generator=generator)
    if not shows_order or not result.diagnostics["exact"]:
        return result
    told = leak.attacker_knowledge == "permutation" and leak.source is not None
    # Shown patch i is original patch source[i].
    order = leak.source.flatten().cpu().argsort() if told else _solve_order(leak, result.images, hidden)
    claimed = claim(patches=True, places=told or int(hidden.sum()) < 2)
    shown = result.certificate
    certificate = shown and certify(shown.patches[0, order], shown.radius[0, order], None if told else hidden)
    image = _reorder(leak, result.images, order)
    return Reconstruction(image, result.diagnostics | claimed, certificate=certificate)


def _solve_order(leak: Leak, image: Tensor, hidden: Tensor) -> Tensor:
    """Return (N,): where the hidden patches of the image belong, by the jigsaw solver."""
    if hidden.all() or not hidden.any():
        return torch.arange(len(hidden))
    patches = patchify(_pixels(leak, image), leak.model.patch_size)[0]
    return place(patches, hidden, leak.model.grid, leak.model.patch_size)


def _reorder(leak: Leak, image: Tensor, source: Tensor) -> Tensor:
    return shuffle_patches(image, source[None], leak.model.patch_size)


def _pixels(leak: Leak, images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (leak.mean, leak.std))
    return images * std + mean
