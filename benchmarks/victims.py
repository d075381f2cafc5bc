"""Many independent victims attacked as one problem, on a GPU or a CPU, beside one at a time and beside breaching.

    python -m benchmarks.victims --device cuda [--lenets 64] [--vits 16] [--rounds 5] [--json FILE]

Inverting Gradients (cosine, total variation 0.2, signed Adam, boxed) on LeNets at 32 px and ViT-Ti/16 at 224 px.
Candidates take turns; a turn is a whole attack of --iterations, set-up included for all; times are per image and
iteration, of the wall on a GPU, of the processor on a CPU. Ratios are (time of the peer / time of ours). breaching
takes part where it is installed.
"""

import random
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch.nn.functional import cross_entropy

from attacks.presets.inverting_gradients import inverting_gradients
from attacks.threat_model.leak import Leak
from benchmarks import peers
from benchmarks.interleaved_timing import Table, benchmark_parser, interleave, start_anew
from models import build_model
from utils.errors import run_command

TV = 0.2  # breaching's weight
GOALS = {"lenet": ">= 8", "deit_tiny": ">= 4"}  # beside breaching, on a GPU


def leaks_of(name: str, number: int, side: int, device: torch.device) -> list[Leak]:
    """Return the gradients of `number` clients of one image each, noise of the seed, at the same random weights."""
    model = build_model(name, num_classes=100, **({"image_size": side} if side != 224 else {})).eval().to(device)
    generator, leaks = torch.Generator().manual_seed(0), []
    names, weights = zip(*model.named_parameters(), strict=True)
    for _ in range(number):
        image = torch.randn(1, 3, side, side, generator=generator).to(device)
        label = torch.randint(100, (1,), generator=generator).to(device)
        gradients = torch.autograd.grad(cross_entropy(model(image), label), weights)
        leaks.append(Leak(model, dict(zip(names, gradients, strict=True)), (3, side, side), 1, label))
    return leaks


def ours(leaks: list[Leak], iterations: int) -> Callable[[], object]:
    """Return a function that attacks all of them as one problem."""

    def run() -> object:
        generators = [torch.Generator().manual_seed(k) for k in range(len(leaks))]
        return inverting_gradients(leaks, generator=generators, tv=TV, iterations=iterations)

    return run


def theirs(leak: Leak, iterations: int) -> Callable[[], object]:
    """Return a function that attacks one of them by breaching."""
    generator = torch.Generator()
    return lambda: peers.breaching(leak, generator.manual_seed(0), lambda: None, iterations=iterations, tv=TV)


def compare(table: Table, given, name: str, number: int, side: int) -> None:
    """Add the rows of one model."""
    leaks = leaks_of(name, number, side, torch.device(given.device))
    candidates = {"together": ours(leaks, given.iterations), "alone": ours(leaks[:1], given.iterations)}
    if installed := find_spec("breaching") is not None:
        candidates["breaching"] = theirs(leaks[0], given.iterations)
    times = interleave(candidates, given.rounds, device=given.device)
    images = {"together": number, "alone": 1, "breaching": 1}
    times = {who: [one / (images[who] * given.iterations) for one in own] for who, own in times.items()}
    table.add(f"{number} {name}, together / one at a time", times, "together", "alone")
    if installed:
        goal = GOALS[name] if given.device == "cuda" else ""
        table.add(f"{number} {name}, together / breaching", times, "together", "breaching", goal)
    else:
        table.note("breaching is not installed (pip install breaching): not beside it")


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--lenets", type=int, default=64, help="0 leaves them out (default: %(default)s)")
    parser.add_argument("--vits", type=int, default=16, help="0 leaves them out (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=50, help="of a turn (default: %(default)s)")
    given = parser.parse_args()
    if given.device == "cpu":
        start_anew("benchmarks.victims")
    random.seed(0)
    table = Table(given.rounds, given.device)
    for name, number, side in (("lenet", given.lenets, 32), ("deit_tiny", given.vits, 224)):
        if number:
            compare(table, given, name, number, side)
    table.write(given.json)


if __name__ == "__main__":
    run_command(main)
