"""One image masked by MJP whose gradient is rounded to single precision: visible tokens first, then the hidden ones.

Rounding drowns the relations that the pencil of the hidden tokens divides by in double precision. `mjp_aware` still
knows each visible patch to some 40 dB, and its place. The equations of one token (attacks/joint/token_solver.py) lead
from there to the patch itself, in the small space that attacks/linear/mjp_equations.py says it lies in, x = base + c
basis, and to what attention returned to it. With those the merged forms of attacks/joint/rounded_forms.py are about the
hidden tokens alone. These are solved the same way, and what is solved is taken out of the forms, in turn.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from attacks.joint.block import PATCHES, Block, affine, prefix_tokens
from attacks.joint.diagonal import Tokens, tokens_of
from attacks.joint.forms import Forms
from attacks.joint.masked import masked_equations
from attacks.joint.polish import more, polished, unsure
from attacks.joint.rounded_forms import Known, rounded_forms
from attacks.joint.token_solver import TokenSolver, spectral_outputs
from attacks.linear.mjp_equations import FirstBlock, centre
from attacks.linear.mjp_patches import visible_patches
from attacks.linear.smoothness import Smoothness
from attacks.threat_model.knowledge import pixel_bounds
from attacks.threat_model.leak import Leak

ROUNDS = 7
DRAWS = 12  # random starts for each hidden patch that the forms do not lead to, at most
ENOUGH = 10  # tokens, or more, that say how far what attention returns spreads
SMOOTHNESS, STEPS = 20.0, 60  # of the start: weight of the prior, iterations


def rounded_tokens(leak: Leak, generator: torch.Generator) -> tuple[Tokens, Forms]:
    """Return (the tokens of one masked image, visible ones in the order of their places and then the distinct hidden
    ones, of infinite error where they are not solved; the forms of the hidden ones).

    Raises UserError where the equations are fewer than the unknowns.
    """
    equations = masked_equations(leak)
    visible, solver = _visible(leak, equations, generator)
    hidden = equations.span.hidden
    forms = rounded_forms(leak, _known(leak, equations, visible, solver), int(hidden.sum()))
    place = _rows_added(leak, hidden)[hidden][:1]
    found = _hidden(forms, solver, place, visible.patches[visible.error < torch.inf], generator)
    return visible.joined(found), forms


def _visible(leak: Leak, equations: FirstBlock, generator: torch.Generator) -> tuple[Tokens, TokenSolver]:
    """Return (the visible tokens, in order; the equations of a hidden token)."""
    solver, shift, positions = masked_solver(leak, equations, generator)
    positions = positions[~equations.span.hidden]
    start = visible_patches(equations.span, Smoothness(leak), equations, SMOOTHNESS, STEPS) - shift
    # The spectrum of a gradient says little about one token; what attention returned to those that fit best says more.
    solver = solver.spread(_fitting(start, positions, solver), generator)
    tokens, _ = polished(unsure(start, solver), torch.ones(len(start), dtype=torch.bool), positions, solver)
    return replace(tokens, patches=tokens.patches + shift), solver


def masked_solver(leak: Leak, equations: FirstBlock, generator: torch.Generator) -> tuple[TokenSolver, Tensor, Tensor]:
    """Return (the equations of any patch of one masked image, in the hull of the hidden ones; how far the visible ones
    (U, P) lie outside it; what is added (N, D) to the patch of every place, and to a visible one without that part)."""
    span, hidden = equations.span, equations.span.hidden
    # Patches at their own places are distinct tokens, and the span says how many of the hidden ones are.
    distinct = int((~hidden).sum()) + 1 + len(span.basis) + 1
    block = Block(leak, 0, len(hidden) + 1, len(hidden) + 1, distinct)
    unknown = leak.gradient("unknown_pos_embed", "joint").double().cpu().reshape(1, -1)
    hull = span.base[hidden][0], span.basis
    outputs = spectral_outputs(block, float(torch.cat([span.rows[~hidden], unknown]).norm()))
    # The solver has one origin: what a visible patch's own base adds to its token goes to its position.
    shift = span.base[~hidden] - hull[0]  # (U, P)
    positions = _rows_added(leak, hidden)
    positions[~hidden] += shift @ affine(leak.model.get_submodule(PATCHES))[:, :-1].T
    # The hull itself is off by more than the noise of the equations: with all of them errors were predicted too small.
    return TokenSolver(block, hull, outputs, False, generator, again=False), shift, positions


def _fitting(patches: Tensor, positions: Tensor, solver: TokenSolver) -> Tensor:
    """Return what attention returned (V, D) to the half of the tokens whose equations fit best from patches (U, P);
    positions (U, D): what is added. Where o is thought wider or narrower than it is, no token fits to rounding yet."""
    starts = solver.start(patches, solver.mean.expand(len(patches), -1))
    ends = [solver.solve(start, position)[:2] for start, position in zip(starts, positions, strict=True)]
    best = torch.tensor([misfit for _, misfit in ends]).argsort()[: max(ENOUGH, len(ends) // 2)]
    return torch.stack([solver.mixed(ends[place][0]) for place in best.tolist()])


def _known(leak: Leak, equations: FirstBlock, visible: Tokens, solver: TokenSolver) -> Known:
    """Return the class token and the visible ones as the forms need them."""
    hidden = equations.span.hidden
    prefix, _ = prefix_tokens(leak)
    embedded = nn.functional.pad(visible.patches, (0, 1), value=1.0) @ solver.embed.T
    entering = centre(torch.cat([prefix, embedded + _rows_added(leak, hidden)[~hidden]]))
    gradient = torch.cat([leak.gradient("pos_embed", "joint").double().cpu()[0, :1], equations.span.rows[~hidden]])
    return Known(entering, gradient, visible.patches, torch.cat([solver.returned(prefix[0])[None], visible.mixed]))


def _hidden(forms: Forms, solver: TokenSolver, position: Tensor, visible: Tensor, generator: torch.Generator) -> Tokens:
    """Return the hidden tokens, all at one position (1, D), solved ones first: those of the forms, and while some are
    not solved, of draws from the Gaussian that the visible patches (U, P) have."""
    found, left = unsure(visible[:0], solver), unsure(solver.point.expand(forms.tokens, -1), solver)
    for _ in range(ROUNDS if len(forms.matrices) > 1 else 0):
        embedded = nn.functional.pad(found.patches, (0, 1), value=1.0) @ solver.embed.T
        left = tokens_of(forms, centre(embedded + position) if len(found.patches) else None, every=True)
        before = len(found.patches)
        found, solved = more(found, left, position, solver)
        left = left.at(~solved)
        if len(found.patches) in (before, forms.tokens):
            break
    cloud = (visible - solver.point) @ solver.basis.T  # (U, r)
    spread = torch.linalg.svd(cloud - cloud.mean(dim=0), full_matrices=False)
    for _ in range(DRAWS):
        number = forms.tokens - len(found.patches)
        if not number:
            break
        drawn = torch.randn(number, len(spread.S), generator=generator, dtype=cloud.dtype)
        coordinates = cloud.mean(dim=0) + drawn * spread.S / max(1, len(cloud) - 1) ** 0.5 @ spread.Vh
        found, solved = more(found, unsure(solver.point + coordinates @ solver.basis, solver), position, solver)
        left = left.at(torch.arange(number) < number - int(solved.sum()))
        if not bool(solved.any()):  # every start leads to a token, mostly to one of the few that draw the others in
            break
    low, high = (
        bound.flatten().repeat_interleave(left.patches.shape[1] // len(bound))
        for bound in pixel_bounds(solver.leak, left.patches)
    )
    return found.joined(unsure(left.patches.clamp(low, high), solver))


def _rows_added(leak: Leak, hidden: Tensor) -> Tensor:
    """Return the row (N, D) of the position table at every place, the unknown one at hidden places (N,) bool."""
    table = leak.model.pos_embed.detach().double().cpu()[0, -len(hidden) :]
    return torch.where(hidden[:, None], leak.model.unknown_pos_embed.detach().double().cpu()[0], table)
