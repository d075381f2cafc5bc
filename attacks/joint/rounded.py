"""One image masked by MJP whose gradient is rounded to single precision: start from `adaptive`, and solve each token.

Rounding drowns the relations that the pencil of the hidden tokens divides by. What is left is a start: `adaptive` knows
each visible patch to some 40 dB, and its place. The equations of one token (joint_polish) lead from there to the patch
itself, in the small space that attacks/linear/mjp_equations.py says it lies in, x = base + c basis. A hidden patch has
the same space for all, with the unknown row for its place; it is started from where `adaptive` has it, and then from
draws of the Gaussian that the visible patches have in that space. Whatever is not solved stays as `adaptive` has it.
"""

from dataclasses import replace

import scipy
import torch
from torch import Tensor

from attacks.joint.block import Block, affine
from attacks.joint.diagonal import Tokens
from attacks.joint.polish import TokenSolver, outputs_of, polished, spectral_outputs
from attacks.linear.closed_form import token_gradients
from attacks.linear.mjp_aware import adaptive
from attacks.linear.mjp_equations import CERTAIN, Span
from attacks.threat_model.leak import Leak, Reconstruction
from models.jigsaw import patchify, unpatchify

DRAWS = 8  # random starts for each hidden patch that is not solved yet
ENOUGH = 10  # solved tokens that say how far what attention returns spreads


def rounded_image(leak: Leak, hidden: Tensor, generator: torch.Generator) -> Reconstruction:
    """Return what `adaptive` reconstructs of one image with hidden patches (N,) bool, each patch solved that can be.

    diagnostics: as those of `joint`; asymmetry and link are NaN (nothing was diagonalised), noise is infinite unless
    all patches are solved.
    """
    image = adaptive(leak, generator=generator).images.double().cpu()
    patches = patchify(image, leak.model.patch_size)[0]  # (N, P)
    rows, _ = token_gradients(leak)
    unknown = leak.gradient("unknown_pos_embed", "joint").double().cpu().reshape(1, -1)
    span = Span.of(leak, rows, hidden, unknown)
    block = Block(leak, 0, len(hidden) + 1, len(hidden) + 1)
    hull = span.base[hidden][0], span.basis
    outputs = spectral_outputs(block, float(torch.cat([rows[~hidden], unknown]).norm()))
    solver = TokenSolver(block, hull, outputs, False, generator)
    # The solver has one origin: what a visible patch's own adds to its token goes to its position.
    shift = span.base - hull[0]  # (N, P), zero for hidden patches
    positions = _rows_added(leak, hidden) + shift @ affine(leak.model.patch_embed.proj)[:, :-1].T  # (N, D)
    start = _unsure(patches - shift, leak.model.embed_dim)
    tokens, solved = polished(start, ~hidden, positions, solver)
    if int(solved.sum()) >= ENOUGH:
        solver = TokenSolver(block, hull, outputs_of(_spanned(solver), tokens.mixed[solved]), False, generator)
        tokens, solved = polished(replace(tokens, error=start.error), ~hidden, positions, solver)
    found = _hidden(tokens, hidden, solved, positions, solver, generator)
    patches = torch.where(solved[:, None], tokens.patches + shift, patches)
    errors = tokens.error.where(solved, torch.inf)
    places = hidden.nonzero()[:, 0]
    apart = torch.cdist(found.patches, patches[places], compute_mode="donot_use_mm_for_euclid_dist").square()
    which, place = (torch.from_numpy(index) for index in scipy.optimize.linear_sum_assignment(apart.numpy()))
    patches[places[place]], errors[places[place]] = found.patches[which], found.error[which]
    return Reconstruction(
        unpatchify(patches[None], leak.model.patch_size, leak.model.grid), _told(leak, errors, hidden)
    )


def _hidden(
    tokens: Tokens, hidden: Tensor, solved: Tensor, positions: Tensor, solver: TokenSolver, generator: torch.Generator
) -> Tokens:
    """Return the hidden patches that were solved, from those of tokens and, where enough of the visible ones are solved
    (N,) bool, from draws."""
    count, place = int(hidden.sum()), positions[hidden][:1]
    begun, own = tokens.at(hidden), place.expand(count, -1)
    ended, good = polished(begun, torch.ones(count, dtype=torch.bool), own, solver)
    found = ended.at(good)
    if int(solved.sum()) < ENOUGH:
        return found
    cloud = (tokens.patches[solved] - solver.point) @ solver.basis.T  # (U, r)
    spread = torch.linalg.svd(cloud - cloud.mean(dim=0), full_matrices=False)
    for _ in range(DRAWS):
        left = count - len(found.patches)
        if not left:
            break
        drawn = torch.randn(left, len(spread.S), generator=generator, dtype=cloud.dtype)
        coordinates = cloud.mean(dim=0) + drawn * spread.S / max(1, len(cloud) - 1) ** 0.5 @ spread.Vh
        tried = found.joined(_unsure(solver.point + coordinates @ solver.basis, len(solver.mean)))
        chosen = torch.arange(len(tried.patches)) >= len(found.patches)
        ended, good = polished(tried, chosen, place.expand(len(chosen), -1), solver)
        found = found.joined(ended.at(good))
    return found


def _unsure(patches: Tensor, width: int) -> Tokens:
    """Return tokens of patches (n, P) of whose error nothing is known."""
    error = torch.full((len(patches),), torch.inf, dtype=patches.dtype)
    return Tokens(patches, patches.new_zeros(len(patches), width), None, error)


def _rows_added(leak: Leak, hidden: Tensor) -> Tensor:
    """Return the row (N, D) of the position table at every place, the unknown one at hidden places (N,) bool."""
    table = leak.model.pos_embed.detach().double().cpu()[0, -len(hidden) :]
    return torch.where(hidden[:, None], leak.model.unknown_pos_embed.detach().double().cpu()[0], table)


def _spanned(solver: TokenSolver) -> Tensor:
    """Return rows (s + 1, D + 1) that span [o; 1]."""
    directions = torch.nn.functional.pad(solver.mixes / solver.scale[:, None], (0, 1))
    return torch.cat([directions, torch.nn.functional.pad(solver.mean[None], (0, 1), value=1.0)])


def _told(leak: Leak, errors: Tensor, hidden: Tensor) -> dict:
    """Return the diagnostics; errors (N,): predicted, of a pixel, normalised."""
    errors = errors * max(leak.std)
    return {
        "patches": len(errors),
        "tokens": len(errors),
        "found": int((errors < CERTAIN).sum()),
        "images": 1,
        "hidden": int(hidden.sum()),
        "asymmetry": torch.nan,
        "link": torch.nan,
        "noise": float(errors.max()),
        "noise_median": float(errors.median()),
        "arrangement": torch.nan,
        "exact": False,
    }
