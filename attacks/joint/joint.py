"""Attack on whole batches, and on whole images masked by MJP, by one eigenvalue problem. No label, no prior, no start.

The backward pass through a LayerNorm leaves one unknown number t for each token and LayerNorm, and nothing else: with z
what enters the first block and u what leaves its attention, relations between the gradients of the first block's layers
give the matrices S1 = A^T T A and S2 = A^T T' A, T and T' diagonal, the rows of A the tokens in a basis that the
gradients give away. The eigenvectors v of S1 v = mu S2 v are the columns of A^-1. So all patches of all images come
back at once, with the row of the position table that was added to each and what attention returned to it, which tells
the images apart.

    joint_rows      row spaces of gradients and their ranks
    joint_block     the relations of a block
    joint_forms     S1 and S2 of a batch          joint_masked    of one image masked by MJP
    joint_diagonal  their tokens, with errors     joint_polish    each token solved from there
    joint_search    both in turn for all tokens   joint_images    places and images
    joint_equal     equal patches in float32      joint_rounded   a masked image in float32
    joint_bounds    what it needs                 joint_dependent tokens that can be mixtures

What it needs is 2 B (N + 1) <= D - 1 for B images of N patches behind D dimensions; one masked image with learned
positions only that k <= D - N - 4 of its patches are hidden. Equal patches count once. How well the equations hold is
seen without the truth: S1 and S2 come out symmetric only if they do.

Source: derived for this project; docs/method.md.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attacks.certified import PEAK, Certificate
from attacks.exactness import MISFIT, OFF, beyond_rank, claim, is_exact, rounding
from attacks.joint.block import PATCHES, Block, Places
from attacks.joint.bounds import check_joint, masked_alone
from attacks.joint.dependent import off
from attacks.joint.diagonal import Tokens
from attacks.joint.forms import Forms, batch_forms, merged_forms
from attacks.joint.images import Assembly, assemble
from attacks.joint.masked import masked_tokens
from attacks.joint.polish import polished
from attacks.joint.rounded import rounded_tokens
from attacks.joint.search import NEGLIGIBLE, added_rows, batch_tokens, token_solver
from attacks.linear.closed_form import closed_form
from attacks.linear.layer_scale import fold_layer_scale
from attacks.linear.mjp_equations import CERTAIN
from attacks.linear.patch_order import order_all_by_borders, order_by_borders
from attacks.linear.row_spaces import Rows, rows_of, with_bias
from attacks.threat_model.checks import checked
from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.uses import MJP
from models.jigsaw import unpatchify
from models.position import RotaryAttention

QKV = "blocks.0.attn.qkv"


@checked(check_joint, uses=(MJP,))
def joint(leak: Leak, *, generator: torch.Generator, polish: bool = True) -> Reconstruction:
    """Reconstruct a batch of images from the first blocks' gradients of a ViT, in float64 on the CPU.

    Patches are placed by the row of the position table that their tokens carry; those that share a row go where they
    continue their neighbours, and so do all where no place is known, but for batches behind rotary positions. The order
    of the images is in no gradient.
    Where rounding is that of single precision, forms of several blocks are used, and what is found is taken out of them
    before they are used again; one masked image starts from the visible patches of `mjp_aware` there.
    `generator` draws the equations of the MLP that the polish uses, and starts.

    diagnostics: patches (of the batch); tokens: how many are distinct; found: distinct ones of a predicted error below
    0.001 of the pixel range; images: how many different ones were assembled; hidden; asymmetry and link: relative
    misfits of the equations; resolved: share of the tokens that stand above rounding in the gradients of the first MLP,
    where nearly equal ones do not; noise, noise_median: largest and median predicted error of a pixel (range 1);
    arrangement: relative misfit of attention in the assembled images, NaN where it was not asked; exact: all tokens are
    found and stand in places the gradient tells; exact_up_to_order: but for the order of those that share a position
    (attacks/exactness.py).
    Raises UserError for other models, missing gradients, and more tokens than the equations can tell apart.

    Args:
        polish: Solve the equations of every token from where the eigenvectors put it.
    """
    leak = fold_layer_scale(leak)
    alone = masked_alone(leak)
    if alone and not getattr(leak.model, "hides_positions", False):
        return _unmasked(leak, generator)
    places = Places.of(leak)
    if alone:
        mask = (leak.mask if leak.attacker_knowledge in ("mask", "permutation") else hidden_rows(leak)).flatten().cpu()
        if int(mask.sum()) < 2:
            return _unmasked(leak, generator)
        rounded = polish and not _span(leak).clean
        tokens, forms = rounded_tokens(leak, generator) if rounded else masked_tokens(leak)
        rows = torch.cat([places.kinds[~mask], torch.full((forms.tokens,), len(places.rows) - 1)])
        if polish and not rounded:
            tokens = _polished(leak, tokens, forms, rows, places, generator)
    else:
        forms = forms_of(leak, places)
        tokens, rows, places = batch_tokens(leak, forms, places, generator, polish)
    turned = isinstance(leak.model.blocks[0].attn, RotaryAttention)
    assembly = _in_any_order(leak, tokens) if turned else assemble(leak, tokens, rows, places)
    images = unpatchify(tokens.patches[assembly.chosen], leak.model.patch_size, leak.model.grid)
    placed = False
    if places is not None:  # of every image, which places have a row that others have too
        shared = [torch.bincount(kinds)[kinds] > 1 for kinds in assembly.kinds]
        placed = not any(bool(one.any()) for one in shared)
        for image in (place for place, one in enumerate(shared) if bool(one.any()) and not bool(one.all())):
            images[image] = order_by_borders(leak, images[image][None], shared[image], assembly.kinds[image])[0]
    elif not turned or len(images) == 1:  # else nothing says which patches share an image
        images = torch.cat([order_all_by_borders(leak, image[None]) for image in images])
    span = _span(leak)
    far = off(leak, span, places, len(tokens.patches), shown(forms.block))
    if span.clean and _whole(leak, tokens, assembly):
        far = OFF  # attention agrees with all images: equal patches of several were told apart behind it
    diagnostics = _diagnostics(leak, tokens, forms, assembly, placed, far)
    certificate = _certificate(leak, tokens, assembly, diagnostics["exact_up_to_order"], far)
    return Reconstruction(images, diagnostics, certificate=certificate)


def _certificate(leak: Leak, tokens: Tokens, assembly: Assembly, whole: bool, far: float) -> Certificate | None:
    """Return how far each patch can be off: `far` times its predicted error, and PEAK times that for one value of it;
    None where there is more than rounding in the gradient.

    Unless the equations say that the images are whole, a token counts once, and no place of it is claimed, except those
    of the visible patches of one masked image: they come in order.
    """
    misfit, eps = _misfit(leak)
    if misfit > MISFIT * eps or leak.local is not None:
        return None
    chosen = assembly.chosen  # (B, N)
    radius = PEAK * far * max(leak.std) * tokens.error[chosen]
    group = torch.arange(len(chosen))[:, None] * (chosen.shape[1] + 1) + assembly.kinds
    if not whole:
        seen = torch.zeros(len(tokens.patches), dtype=torch.bool)
        for place, token in enumerate(chosen.flatten().tolist()):
            if seen[token]:
                radius.view(-1)[place] = torch.inf
            seen[token] = True
        group = group if masked_alone(leak) else torch.zeros_like(group)
    return Certificate(tokens.patches[chosen], radius, group)


def forms_of(leak: Leak, places: Places | None) -> Forms:
    """Return the two forms of the first block where only double precision rounds, else one of each of several blocks,
    all but the last."""
    span = _span(leak)
    several = not span.clean and len(leak.model.blocks) > 2
    return merged_forms(leak, places, span) if several else batch_forms(leak, places, span)


def _span(leak: Leak) -> Rows:
    """Return the row space of the patch projection's gradient: [x; 1] of all patches. Equal ones are so to the last bit
    there, whatever their places, so that a faint direction is that of a patch of its own."""
    number = leak.batch_size * leak.model.grid[0] * leak.model.grid[1]
    return rows_of(with_bias(leak, PATCHES), number, leak.gradients[f"{PATCHES}.weight"].dtype, faint=True)


def _polished(
    leak: Leak, tokens: Tokens, forms: Forms, rows: Tensor, places: Places, generator: torch.Generator
) -> Tokens:
    """Return the tokens of one masked image with the hidden ones solved, those that need it."""
    fixed = len(tokens.patches) - forms.tokens
    unsure = tokens.error * max(leak.std) > NEGLIGIBLE
    unsure[:fixed] = False
    if not bool(unsure.any()):
        return tokens
    solver = token_solver(forms, tokens.mixed[fixed:], generator)
    return polished(tokens, unsure, added_rows(leak, rows, places), solver)[0]


def _diagnostics(leak: Leak, tokens: Tokens, forms: Forms, assembly: Assembly, placed: bool, far: float) -> dict:
    """Return what is said of the result; placed: whether every place has a row of its own; far: how many times its
    predicted error a token can be off."""
    errors = tokens.error * max(leak.std)
    found, misfit, eps = int((errors < CERTAIN).sum()), *_misfit(leak)
    worst = far * float(errors.max())
    holds = is_exact(rank=found, unknowns=len(errors), misfit=misfit, error=worst, eps=eps)
    whole = _whole(leak, tokens, assembly) and leak.local is None
    return {
        "patches": assembly.chosen.numel(),
        "tokens": len(tokens.patches),
        "found": found,
        "images": assembly.images,
        "hidden": forms.tokens if masked_alone(leak) else 0,
        "asymmetry": forms.asymmetry,
        "link": forms.link,
        "resolved": min(1.0, shown(forms.block) / (len(errors) + leak.batch_size * leak.model.num_prefix_tokens)),
        "noise": float(errors.max()),
        "noise_median": float(errors.median()),
        "arrangement": assembly.misfit,
        **claim(patches=whole and holds, places=placed),
    }


def _whole(leak: Leak, tokens: Tokens, assembly: Assembly) -> bool:
    """Return whether attention agrees with all images, and every token stands in one of them."""
    return assembly.solved and assembly.used == len(tokens.patches) and assembly.images in (1, leak.batch_size)


def shown(block: Block) -> int:
    """Return how many of the tokens that leave a block's attention both layers of its MLP show above rounding."""
    return min(block.passed.above, block.active.above)


def _misfit(leak: Leak) -> tuple[float, float]:
    """Return (how far the gradients of the patch projection and of the first queries, keys and values are from the rank
    of the tokens they read, relative; their rounding): noise, quantisation and pruning exceed that rank."""
    number = leak.batch_size * leak.model.grid[0] * leak.model.grid[1]
    misfits, shared = [], []
    for layer, tokens in ((PATCHES, number), (QKV, number + leak.model.num_prefix_tokens)):
        weight = leak.gradient(f"{layer}.weight", "joint").double().cpu().flatten(1)
        misfits.append(beyond_rank(torch.linalg.svdvals(weight), tokens, weight.shape))
        shared.append(weight)
    return max(misfits), rounding(shared)


def _in_any_order(leak: Leak, tokens: Tokens) -> Assembly:
    """Return the tokens one after another: nothing says where they stand."""
    number = leak.batch_size * leak.model.grid[0] * leak.model.grid[1]
    chosen: Tensor = torch.arange(number) % len(tokens.patches)
    chosen = chosen.view(leak.batch_size, -1)
    return Assembly(chosen, torch.zeros_like(chosen), leak.batch_size, torch.nan)


def _unmasked(leak: Leak, generator: torch.Generator) -> Reconstruction:
    """Return the closed form: one image whose position rows all have gradients of their own."""
    result = closed_form(leak, generator=generator)
    told = ("patches", "hidden", "rank", "residual", "exact", "exact_up_to_order")
    return replace(result, diagnostics={key: result.diagnostics[key] for key in told})
