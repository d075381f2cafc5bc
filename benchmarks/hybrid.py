"""The hybrid attack and its linear systems beside the way of the original, and their growth with the image.

    python -m benchmarks.hybrid [--rounds 5] [--sides 32,48,64,96,128] [--json FILE]

The original, written anew here from its description: systems as dense float64 matrices, solved by LAPACK's SVD; a
correction copies the matrix, evaluates objective and misfit under one autograd graph, and steps Adam. Its loops in
Python that fill the matrices are left out, in its favour. Ours and theirs take turns in one process on one thread; a
ratio is the median over rounds of theirs / ours in time of the processor. `whole attack` adds up: the original's solve
and 10,000 of its iterations against a run of ours of that many; PSNR of both is equal
(tests/attacks/recursive/test_hybrid.py).
"""

import copy
import time

import numpy as np
import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from attacks.recursive.hybrid import WEIGHTS, descend, hybrid
from attacks.recursive.layers import chain, nearest_solution
from attacks.recursive.recursion import Equations
from attacks.recursive.rgap import rgap
from attacks.threat_model.leak import Leak
from benchmarks.interleaved_timing import Table, benchmark_parser, interleave
from models import build_model
from utils.errors import run_command

ITERATIONS = 10000  # of the paper, on the image


def photograph(side: int) -> Tensor:
    """Return an embedded photograph (1, 3, side, side) in [-0.5, 0.5], float64."""
    picture = resize(data.astronaut()[:256, 128:384] / 255, (side, side), anti_aliasing=True)
    return torch.from_numpy(picture).permute(2, 0, 1)[None] - 0.5


def leak_of(name: str, side: int = 32, dtype: torch.dtype = torch.float32) -> Leak:
    model, label = build_model(name, num_classes=10, seed=10, image_size=side).to(dtype), torch.tensor([4])
    loss = cross_entropy(model(photograph(side).to(dtype)), label)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return Leak(model, dict(zip(names, gradients, strict=True)), (3, side, side), 1, label)


def first_equations(leak: Leak, image: Tensor) -> Equations:
    """Return the equations of the layer next to the image, made from the image itself."""
    layer = chain(leak.model, leak.image_shape, "hybrid")[0]
    model = copy.deepcopy(leak.model).double()
    z = model.body[0](image)
    z.retain_grad()
    cross_entropy(model.head(model.fc(model.body[1:](z))), leak.labels).backward()
    gradient = model.body[0].weight.grad
    return Equations(layer, z.detach()[0], z.grad[0], gradient, True, torch.finfo(torch.float64).eps)


def original_correction(leak: Leak, equations: Equations, iterations: int) -> None:
    """Run Adam on the original's objective for the image, with a dense matrix that is copied in every iteration."""
    cosine, variation, misfit = WEIGHTS[0]
    system, right = (torch.from_numpy(part) for part in dense(equations))
    model, shared = leak.model, [value.detach() for value in leak.gradients.values()]
    x = torch.zeros(system.shape[1], 1).requires_grad_()
    optimizer = torch.optim.Adam([x])
    for _ in range(iterations):
        optimizer.zero_grad()
        image = x.reshape(1, *leak.image_shape)
        loss = cross_entropy(model(image), leak.labels)
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        pairs = zip(found, shared, strict=True)
        distance = sum(1 - cosine_similarity(a.flatten(), b.flatten(), 0, 1e-10) for a, b in pairs)
        across, down = (image[..., 1:] - image[..., :-1]).abs(), (image[..., 1:, :] - image[..., :-1, :]).abs()
        left = copy.deepcopy(system).matmul(x.double()) - copy.deepcopy(right)
        (cosine * distance + variation * (across.mean() + down.mean()) + misfit * left.square().sum()).backward()
        optimizer.step()


def dense(equations: Equations) -> tuple[np.ndarray, np.ndarray]:
    system, right = equations.system(balance=False)
    return system.toarray(), right[:, None]


def solve_beside_dense(table: Table, rounds: int) -> float:
    """Solve the 5562 x 3072 system of cnn2_c1; return the milliseconds of the dense solution of cnn2_c2's, 1638 x
    3072."""
    equations = first_equations(leak_of("cnn2_c1"), photograph(32))
    system, right = equations.system(balance=False)
    full, expected = system.toarray(), None

    def by_svd() -> None:
        nonlocal expected
        expected = np.linalg.lstsq(full, right, rcond=None)[0]

    for tolerance in (1e-12, 1e-14):
        found = nearest_solution(system, right, tolerance=tolerance, unique=True)

        def ours(tolerance: float = tolerance) -> None:
            nearest_solution(system, right, tolerance=tolerance, unique=True)

        times = interleave({"ours": ours, "dense": by_svd}, max(1, rounds // 2))
        goal = ">= 65" if tolerance == 1e-12 else ""
        table.add(f"solve at 32 px, tolerance {tolerance:g}", times, "ours", "dense", goal)
        table.note(f"relative difference {np.linalg.norm(found.x - expected) / np.linalg.norm(expected):.1e}")
    small, values = dense(first_equations(leak_of("cnn2_c2"), photograph(32)))
    return interleave({"dense": lambda: np.linalg.lstsq(small, values, rcond=None)}, 1)["dense"][0]


def correction(table: Table, rounds: int) -> float:
    """Run iterations of the correction; return the milliseconds of one of the original's on cnn2_c2."""
    for name, goal in (("cnn3_c1", ">= 25"), ("cnn2_c2", ">= 12")):
        leak = leak_of(name)
        equations, layers = first_equations(leak, photograph(32)), chain(leak.model, leak.image_shape, "hybrid")
        start, options = torch.zeros(leak.image_shape, dtype=torch.float64), {"weights": WEIGHTS[0], "lr": 1e-3}

        def ours(leak=leak, layers=layers, equations=equations, start=start, options=options) -> None:
            descend(leak, layers, equations, start, leak.labels, iterations=100, **options)

        def theirs(leak=leak, equations=equations) -> None:
            original_correction(leak, equations, 10)

        times = interleave({"ours": ours, "original": theirs}, rounds)
        times = {"ours": [t / 100 for t in times["ours"]], "original": [t / 10 for t in times["original"]]}
        table.add(f"correction of {name}", times, "ours", "original", goal)
    return sorted(times["original"])[rounds // 2]


def growth(table: Table, sides: list[int]) -> None:
    """Time and memory of the linear solve, and of R-GAP as a whole on cnn2_c1, against the side of the image."""
    table.note(
        f"{'side':>6}{'equations x unknowns':>24}{'entries':>12}{'MB':>8}{'solve s':>10}{'R-GAP s':>10}{'dB':>8}"
    )
    measured = []
    for side in sides:
        leak = leak_of("cnn2_c1", side, torch.float64)
        system, right = first_equations(leak, photograph(side)).system(balance=True)
        began = time.process_time()
        nearest_solution(system, right, tolerance=1e-14, unique=True)
        middle = time.process_time()
        found = rgap(leak, generator=torch.Generator()).images
        ended = time.process_time()
        size = (system.data.nbytes + system.indices.nbytes + system.indptr.nbytes) / 2**20
        psnr = -10 * float((found - photograph(side)).square().mean().log10())
        shape = f"{system.shape[0]} x {system.shape[1]}"
        seconds = f"{middle - began:>10.2f}{ended - middle:>10.2f}"
        table.note(f"{side:>6}{shape:>24}{system.nnz:>12}{size:>8.1f}{seconds}{psnr:>8.1f}")
        measured.append((side, middle - began, ended - middle))
    logs = np.log(np.array(measured))
    slopes = [np.polyfit(logs[:, 0], logs[:, column], 1)[0] for column in (1, 2)]
    table.note(f"solve grows as side^{slopes[0]:.2f}, R-GAP as side^{slopes[1]:.2f} (goal: at most 3)")


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--sides", default="32,48,64,96,128", help="image sides in pixels (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(given.rounds)
    solve_ms, step_ms = solve_beside_dense(table, given.rounds), correction(table, given.rounds)
    leak = leak_of("cnn2_c2")
    began = time.process_time()
    hybrid(leak, generator=torch.Generator(), iterations=ITERATIONS)
    ours = 1e3 * (time.process_time() - began)
    times = {"ours": [ours], "original": [solve_ms + ITERATIONS * step_ms]}
    table.add("whole attack on cnn2_c2 (original added up)", times, "ours", "original", ">= 15")
    growth(table, [int(side) for side in given.sides.split(",")])
    table.write(given.json)


if __name__ == "__main__":
    run_command(main)
