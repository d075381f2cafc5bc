"""Put shuffled patches back by how well their borders continue each other.

Gradients of a masked jigsaw do not depend on the order of the hidden patches, so their order can only come from the
picture. Every pair of patches gets a cost of standing side by side; holes are filled from the rim inward, each layer by
linear assignment, and the filling is improved until no re-assignment and no swap of two patches lowers the total cost.

Costs: linear extrapolation across the border; Mahalanobis gradient compatibility (Gallagher, "Jigsaw puzzles with
pieces of unknown orientation", CVPR 2012).
"""

import scipy
import torch
from torch import Tensor

from attacks.threat_model.leak import RefusalError
from utils.errors import look_up

RIDGE = 1e-4  # variance added to the colour gradients inside a patch, in squared pixel units; flat patches have none
SIDES = ((0, -1), (0, 1), (-1, 0), (1, 0))  # left, right, above, below


def extrapolation(edge: Tensor, inner: Tensor, other: Tensor, beyond: Tensor) -> Tensor:
    """Return (M, M) cost that patch b follows patch a: squared error of continuing each patch's last two rows linearly.

    edge, inner (M, P, C): the touching row of every a and the one before it; other, beyond: those of every b.
    """
    step = other[None] - edge[:, None]
    return ((step - (edge - inner)[:, None]) ** 2 + (step - (beyond - other)[None]) ** 2).sum(dim=(2, 3))


def mgc(edge: Tensor, inner: Tensor, other: Tensor, beyond: Tensor) -> Tensor:
    """Return the cost of `extrapolation` with the step across the border measured against mean and covariance of the
    steps just inside."""
    step = other[None] - edge[:, None]

    def distance(inside: Tensor, dim: int) -> Tensor:
        mean = inside.mean(dim=1, keepdim=True)
        centred = inside - mean
        covariance = centred.transpose(1, 2) @ centred / inside.shape[1]
        precision = torch.linalg.inv(covariance + RIDGE * torch.eye(inside.shape[2], dtype=inside.dtype))
        error = step - mean.unsqueeze(dim)
        return ((error @ precision.unsqueeze(dim)) * error).sum(dim=(2, 3))

    return distance(edge - inner, 1) + distance(beyond - other, 0)


COMPATIBILITIES = {"extrapolation": extrapolation, "mgc": mgc}


def place(
    patches: Tensor, holes: Tensor, grid: tuple[int, int], patch_size: int, *, compatibility: str = "mgc"
) -> Tensor:
    """Solve the puzzle; return (N,) int64 `source`: place i of the solved puzzle holds patch source[i], its own where
    there is no hole.

    patches (N, C*P*P), pixel values of range 1, those of the holes in any order; holes (N,) bool. The order given does
    not matter. Raises UserError when every place is a hole: nothing holds the puzzle in place then.
    """
    if holes.all():
        raise RefusalError("every patch is a hole: a jigsaw needs patches whose place is known")
    return _Puzzle(_costs(patches, patch_size, compatibility), holes, grid).solve()


def place_all(
    patches: Tensor, grid: tuple[int, int], patch_size: int, *, compatibility: str = "mgc", tries: int = 5
) -> Tensor:
    """Solve the puzzle where no place is known; as `place`. The puzzle is filled from every patch in the first corner,
    and the `tries` cheapest fillings are improved."""
    costs, number = _costs(patches, patch_size, compatibility), len(patches)
    first = torch.arange(number) == 0
    filled = []
    for corner in range(number):
        puzzle = _Puzzle(costs, ~first, grid)
        puzzle.source[0] = corner
        puzzle.pieces = [piece for piece in range(number) if piece != corner]
        filled.append((puzzle.fill(), corner, puzzle))
    ended = [(puzzle.improve(), corner, puzzle) for _, corner, puzzle in sorted(filled)[:tries]]
    return min(ended)[2].source


def _costs(patches: Tensor, patch_size: int, compatibility: str) -> tuple[Tensor, ...]:
    """Return for each of SIDES the (N, N) cost that patch b stands on that side of patch a."""
    cost = look_up(COMPATIBILITIES, compatibility, "compatibility")
    cells = patches.double().unflatten(1, (-1, patch_size, patch_size)).permute(0, 2, 3, 1)  # (N, row, column, C)
    right = cost(cells[:, :, -1], cells[:, :, -2], cells[:, :, 0], cells[:, :, 1])
    down = cost(cells[:, -1], cells[:, -2], cells[:, 0], cells[:, 1])
    return right.T, right, down.T, down


class _Puzzle:
    """costs: for each of SIDES, (N, N) cost that patch b stands on that side of patch a."""

    def __init__(self, costs: tuple[Tensor, ...], holes: Tensor, grid: tuple[int, int]):
        self.costs, self.grid = costs, grid
        self.holes = holes.nonzero().flatten().tolist()
        self.source = torch.where(holes, -1, torch.arange(len(holes)))  # -1: still empty
        self.pieces = list(self.holes)

    def solve(self) -> Tensor:
        self.fill()
        self.improve()
        return self.source

    def improve(self) -> float:
        """Re-assign and swap pieces while that lowers the total cost; return it."""
        total, previous = self._total(), float("inf")
        while total < previous - 1e-9 * abs(previous) or previous == float("inf"):
            previous = total
            # Holes of one colour of a chessboard touch only the other colour: each assignment is optimal given it.
            for colour in (0, 1):
                self._assign([hole for hole in self.holes if sum(divmod(hole, self.grid[1])) % 2 == colour])
            before = self.source.clone()
            self._assign(self.holes)
            if self._total() > previous:
                self.source = before
            self._swap()
            total = self._total()
        return total

    def _neighbours(self, hole: int):
        row, column = divmod(hole, self.grid[1])
        for side, (down, right) in enumerate(SIDES):
            if 0 <= row + down < self.grid[0] and 0 <= column + right < self.grid[1]:
                yield side, hole + down * self.grid[1] + right

    def _table(self, holes: list[int], pieces: list[int]) -> Tensor:
        """Return (holes, pieces): the cost of a piece in a hole, summed over the neighbours that are filled."""
        table = torch.zeros(len(holes), len(pieces), dtype=torch.float64)
        for line, hole in zip(table, holes, strict=True):
            filled = [(side, int(self.source[cell])) for side, cell in self._neighbours(hole) if self.source[cell] >= 0]
            for side, neighbour in filled:
                line += self.costs[side][pieces, neighbour]
        return table

    def fill(self) -> float:
        """Fill all holes from the rim inward; return the total cost."""
        pieces, empty = list(self.pieces), set(self.holes)
        while empty:
            rim = [hole for hole in sorted(empty) if any(self.source[cell] >= 0 for _, cell in self._neighbours(hole))]
            chosen = scipy.optimize.linear_sum_assignment(self._table(rim, pieces).numpy())[1]
            for hole, column in zip(rim, chosen, strict=True):
                self.source[hole] = pieces[column]
            empty -= set(rim)
            pieces = [piece for piece in pieces if piece not in set(self.source.tolist())]
        return self._total()

    def _assign(self, holes: list[int]) -> None:
        """Re-assign the pieces that lie in `holes`, as if all neighbours stayed where they are."""
        if holes:
            pieces = self.source[holes].tolist()
            chosen = scipy.optimize.linear_sum_assignment(self._table(holes, pieces).numpy())[1]
            self.source[holes] = torch.tensor(pieces)[torch.from_numpy(chosen)]

    def _swap(self) -> None:
        """Swap any two pieces whose exchange lowers the total cost, until there are none."""
        improved = True
        while improved:
            improved = False
            pieces = self.source[self.holes].tolist()
            table = self._table(self.holes, pieces)
            own = table.diagonal()
            # What a swap changes if the two holes do not touch; for those that do it is checked on the total.
            gain = own[:, None] + own[None] - table - table.T
            for first, second in (gain.triu(1) > 1e-9 * own.sum().abs()).nonzero().tolist():
                one, other = self.holes[first], self.holes[second]
                before = self._total()
                self.source[[one, other]] = self.source[[other, one]]
                if self._total() < before * (1 - 1e-12):
                    improved = True
                else:
                    self.source[[one, other]] = self.source[[other, one]]

    def _total(self) -> float:
        cells = self.source.view(self.grid)
        across = self.costs[1][cells[:, :-1], cells[:, 1:]].sum()
        return float(across + self.costs[3][cells[:-1], cells[1:]].sum())
