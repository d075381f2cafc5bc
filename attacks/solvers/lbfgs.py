"""L-BFGS for many independent problems in lock-step, the optimizer of DLG and iDLG.

The iterates are those of torch.optim.LBFGS without line search: a fixed step and one gradient per iteration, so all
problems of a batch stay at the same iteration and none waits for another. torch visits the stored pairs one by one,
four small operations each; here the two-loop recursion is replaced by the compact form of the same matrix: two passes
over the stacked pairs of all problems.

Source: Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices", 1994, theorem 2.2.
"""

import torch
from torch import Tensor, nn

# torch's thresholds: a pair is stored above this s.y; a problem moves above this descent and this largest |gradient|.
CURVATURE, DESCENT, GRADIENT = 1e-10, 1e-9, 1e-7


class LBFGS:
    """V minimisations of `size` variables each. Rows never mix: what a problem does depends neither on V nor on others.

    x moves by `lr` times the quasi-Newton direction; the first step has an L1 norm of at most `lr`. Pairs without
    positive curvature are not stored, and of more than `history` the oldest goes. A problem at a stationary point, or
    whose gradient is not finite, stays where it is. Memory: 2 * (history + 1) * size numbers per problem.
    """

    def __init__(
        self,
        problems: int,
        size: int,
        *,
        lr: float = 1.0,
        history: int = 100,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        like = {"dtype": dtype, "device": device}
        self.lr, self.history = lr, history
        self.started = torch.zeros(problems, 1, dtype=torch.bool, device=device)
        self.last_step = torch.zeros(problems, size, **like)
        self.last_gradient = torch.zeros(problems, size, **like)
        # Rings of `history` steps and changes of the gradient, and one free slot, `head`, where the next pair is tried.
        self.pairs = torch.zeros(problems, 2, history + 1, size, **like)
        self.head = torch.zeros(problems, dtype=torch.int64, device=device)
        # S^T Y and Y^T Y of the stored pairs, oldest first; of S^T Y only the upper triangle is right, and needed.
        self.grams = torch.eye(history, **like).repeat(problems, 2, 1, 1)
        self.scale = torch.ones(problems, 1, **like)
        self.rows = torch.arange(problems, device=device)
        self.ages = torch.arange(1, history + 1, device=device)

    @torch.no_grad()
    def step(self, x: Tensor, gradient: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the next iterates (V, size), given the current ones, x, and the gradients (V, size) of the objectives
        there.

        active (V,) bool: the problems that take part; the others keep x and their state, and may resume later.
        """
        size = gradient.abs()
        total, largest = size.sum(dim=1, keepdim=True), size.amax(dim=1, keepdim=True)
        live = total.isfinite() if active is None else total.isfinite() & active[:, None]
        gradient = torch.where(live, gradient, self.last_gradient)
        direction = self._direction(gradient, *self._store(gradient))
        slope = (gradient * direction).sum(dim=1, keepdim=True)
        moves = live & (largest > GRADIENT) & (slope <= -DESCENT) & slope.isfinite()
        rate = torch.where(self.started, self.lr, self.lr / total.clamp_min(1))
        step = torch.where(moves, rate * direction, 0)
        self.last_step = torch.where(live, step, self.last_step)
        self.last_gradient, self.started = gradient, self.started | live
        return x + step

    def _store(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the last pair where its curvature is positive. Returns [S | Y]^T gradient (V, 2, history), oldest first,
        and the slots (V, history) in that order. One pass over the pairs gives these products and the new pair's."""
        change = gradient - self.last_gradient
        self.pairs[self.rows, 0, self.head], self.pairs[self.rows, 1, self.head] = self.last_step, change
        # Vectors times matrix: matrix times vectors is an order of magnitude slower on a CPU.
        products = torch.stack([gradient, change], dim=1) @ self.pairs.flatten(1, 2).mT
        products = products.unflatten(2, (2, -1))  # (V, gradient or change, step or change, slot)
        curvature, square = products[self.rows, 1, :, self.head].split(1, dim=1)
        accepted = curvature > CURVATURE
        self.scale = torch.where(accepted, curvature / square, self.scale)
        self.head = (self.head + accepted[:, 0]) % (self.history + 1)
        slots = (self.head[:, None] + self.ages) % (self.history + 1)
        products = products.gather(3, slots[:, None, None].expand(-1, 2, 2, -1))
        shifted = nn.functional.pad(self.grams[..., 1:, 1:], (0, 1, 0, 1))
        shifted[..., -1, :] = shifted[..., -1] = products[:, 1]
        self.grams = torch.where(accepted[..., None, None], shifted, self.grams)
        return products[:, 0], slots

    def _direction(self, gradient: Tensor, products: Tensor, slots: Tensor) -> Tensor:
        """Return -H gradient (V, size). With R and D the upper triangle and the diagonal of S^T Y, c the scale, H is
        c I + [S | c Y] [[R^-T (D + c Y^T Y) R^-1, -R^-T], [-R^-1, 0]] [S | c Y]^T."""
        upper, gram = self.grams.unbind(1)
        scale = self.scale[..., None]
        by_step, by_change = products[..., None].unbind(1)
        inner = torch.linalg.solve_triangular(upper, by_step, upper=True)
        outer = upper.diagonal(dim1=1, dim2=2)[..., None] * inner + scale * (gram @ inner - by_change)
        outer = torch.linalg.solve_triangular(upper.mT, outer, upper=False)
        weights = torch.cat([outer, -scale * inner], dim=2).mT  # (V, 2, history)
        weights = torch.zeros_like(self.pairs[..., 0]).scatter_(2, slots[:, None].expand(-1, 2, -1), weights)
        weighted = torch.baddbmm(scale * gradient[:, None], weights.flatten(1)[:, None], self.pairs.flatten(1, 2))
        return -weighted[:, 0]
