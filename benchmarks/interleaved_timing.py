"""Candidates that take turns: what a comparison on a busy machine needs, and the table it ends in."""

import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from utils.errors import UserError
from utils.machine import processor
from utils.tool_parser import ToolParser

ENVIRONMENT = {  # read once, before the first line of a process
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}


def start_anew(module: str) -> None:
    """Run `python -m module` again with a malloc that keeps large blocks, unless this process has it; on one thread.

    Otherwise every large tensor is given back to the system, and the page faults of getting it again are timed too.
    """
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | ENVIRONMENT)
    torch.set_num_threads(1)


def clock(device: str = "cpu") -> float:
    """Return seconds: of this process on the processor, which others disturb less than the wall clock; of the wall with
    a GPU, once that is idle."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    candidates: dict[str, Callable], rounds: int, *, repeat: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return milliseconds of a call by round; the order rotates from round to round, and each has run once before."""
    times, names = {name: [] for name in candidates}, list(candidates)
    for candidate in candidates.values():
        candidate()
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            began = clock(device)
            for _ in range(repeat):
                candidates[name]()
            times[name].append(1e3 * (clock(device) - began) / repeat)
    return times


class Stop(Exception):  # noqa: N818, not an error
    """Ends an attack that nobody waits for."""


class Loop(threading.Thread):
    """An iterative attack in its own thread that only runs while `advance` lets it.

    attack(tick) calls tick() once per iteration and works on `images` images; a turn is `steps` iterations.
    """

    def __init__(self, attack: Callable, *, steps: int, images: int = 1):
        super().__init__(daemon=True)
        self.attack, self.steps, self.images = attack, steps, images
        self.left, self.result, self.error, self.ended = 0, None, None, False
        self.granted, self.returned = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self.granted.acquire()
        try:
            self.result = self.attack(self.tick)
        except Stop:
            pass
        except BaseException as error:  # raised where the loop is advanced
            self.error = error
        self.ended = True
        self.returned.release()

    def tick(self) -> None:
        if self.left == 0:
            self.returned.release()
            self.granted.acquire()
            if self.left == 0:
                raise Stop
        self.left -= 1

    def advance(self, iterations: float) -> float:
        """Run so many iterations, or to the end; 0 ends the attack. Returns seconds of CPU time. Raises UserError for
        an attack that has ended, for which one would wait for ever."""
        if self.ended:
            raise UserError("an attack had ended before its last turn: ask for other --rounds")
        self.left, start = iterations, time.process_time()
        self.granted.release()
        self.returned.acquire()
        if self.error:
            raise self.error
        return time.process_time() - start

    def finish(self):
        """Return what the attack returns after its remaining iterations, if any."""
        if not self.ended:
            self.advance(math.inf)
        return self.result


def take_turns(loops: dict[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds per image and iteration of each loop, by round; the order rotates from round to round. Raises
    UserError where an attack ends inside a turn, which would count as a quick one."""
    times, names = {name: [] for name in loops}, list(loops)
    for loop in loops.values():
        loop.advance(loop.steps)  # set-up, compilation, warm-up
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            loop = loops[name]
            times[name].append(1e3 * loop.advance(loop.steps) / (loop.steps * loop.images))
            if loop.left:
                raise UserError(f"'{name}' ended {loop.left} iterations before its turn did: ask for other --rounds")
    return times


def stop(loops: dict[str, Loop]) -> None:
    for loop in loops.values():
        if loop.is_alive():
            loop.advance(0)


class Table:
    """Rows and notes, printed as they come and kept."""

    def __init__(self, rounds: int, device: str = "cpu"):
        self.rows: list[dict] = []
        self.notes: list[str] = []
        name = processor() if device == "cpu" else torch.cuda.get_device_name()
        threads = f", {torch.get_num_threads()} thread" if device == "cpu" else ""
        self.setting = f"torch {torch.__version__}, {name}{threads}, {rounds} rounds, load {os.getloadavg()[0]:.1f}"
        print(
            f"{self.setting}\n\n{'':<44}{'ours ms':>10}{'peer ms':>10}{'ratio':>9}   {'quartiles':<17} goal", flush=True
        )

    def add(self, what: str, times: dict, ours: str, peer: str, goal: str = "", *, overhead: bool = False) -> float:
        """Add a row. ratio: of times in the same round, peer / ours, or ours / peer for an overhead; the median over
        rounds."""
        ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
        ratios = sorted(1 / ratio for ratio in ratios) if overhead else sorted(ratios)
        ours_ms, peer_ms, ratio = map(statistics.median, (times[ours], times[peer], ratios))
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        row = {"what": what, "ours_ms": ours_ms, "peer_ms": peer_ms, "ratio": ratio, "quartiles": [low, high]}
        self.rows.append(row | {"min": ratios[0], "max": ratios[-1], "rounds": len(ratios), "goal": goal})
        spread = f"[{low:.3f}, {high:.3f}]"
        print(f"{what:<44}{ours_ms:>10.3f}{peer_ms:>10.3f}{ratio:>9.3f}   {spread:<17} {goal}", flush=True)
        return ratio

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"    {text}", flush=True)

    def write(self, file: Path | None) -> None:
        """Write rows and notes as JSON, where a file was asked for."""
        if file:
            command = " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
            content = {"command": command, "setting": self.setting, "load_after": round(os.getloadavg()[0], 1)}
            content |= {"rows": self.rows, "notes": self.notes}
            file.write_text(json.dumps(content, indent=1) + "\n")


def benchmark_parser(description: str, rounds: int) -> ToolParser:
    """Return a parser with --rounds and --json, which every benchmark has."""
    parser = ToolParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write rows and notes to this file")
    return parser
