"""Polish tokens: solve the equations of each from where the diagonalisation put it, and take what a claim holds for.

A solution is claimed only where its misfit is at rounding and its predicted error is small; otherwise the token stays
what it was.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attacks.joint.diagonal import Tokens
from attacks.joint.token_solver import FITS, TokenSolver

SAME = 10.0  # times the predicted errors within which two tokens are one


def polished(tokens: Tokens, chosen: Tensor, positions: Tensor, solver: TokenSolver) -> tuple[Tokens, Tensor]:
    """Return (the tokens with the chosen ones (n,) bool solved where a claim holds, which ones are (n,)); positions
    (n, D): what is added.

    A solution that another token has already is none: two starts can end in the same token.
    """
    patches, mixed, error = tokens.patches.clone(), tokens.mixed.clone(), tokens.error.clone()
    sure, solved = ~chosen, torch.zeros_like(chosen)
    for place in tokens.error.argsort().tolist():
        if not chosen[place]:
            continue
        start = solver.start(patches[place][None], mixed[place][None])[0]
        unknowns, misfit, predicted = solver.solve(start, positions[place])
        found = solver.patches(unknowns)
        moved = float((found - patches[place]).square().mean().sqrt())  # the two estimates have to agree
        agree = moved < SAME * float(error[place]) and predicted < float(error[place])
        if misfit > FITS[solver.clean] or not agree:
            continue
        apart = (patches[sure] - found).square().mean(dim=1).sqrt()
        near = apart < SAME * (predicted + error[sure]) + 1e-6 * float(found.square().mean().sqrt())
        if not bool((near & (positions[sure] == positions[place]).all(dim=1)).any()):
            patches[place], mixed[place], error[place] = found, solver.mixed(unknowns), predicted
            sure[place] = solved[place] = True
    return replace(tokens, patches=patches, mixed=mixed, error=error), solved


def more(found: Tokens, begun: Tokens, positions: Tensor, solver: TokenSolver) -> tuple[Tokens, Tensor]:
    """Return (the found tokens and those of the begun that are solved and new, which are (n,) bool); positions (D,), or
    (., D) of both in turn: what is added."""
    tried = found.joined(replace(begun, error=torch.full_like(begun.error, torch.inf)))
    chosen = torch.arange(len(tried.patches)) >= len(found.patches)
    ended, solved = polished(tried, chosen, positions.expand(len(chosen), -1), solver)
    return found.joined(ended.at(solved)), solved[len(found.patches) :]


def unsure(patches: Tensor, solver: TokenSolver, places: Tensor | None = None) -> Tokens:
    """Return tokens of patches (n, P), with what is added to them (n, D), of whose error nothing is known."""
    error = torch.full((len(patches),), torch.inf, dtype=patches.dtype)
    return Tokens(patches, solver.mean.expand(len(patches), -1), places, error)
