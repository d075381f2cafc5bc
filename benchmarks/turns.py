"""Attacks that take turns: what a comparison of iterative methods on a busy machine needs."""

import math
import statistics
import threading
import time
from collections.abc import Callable


class Stop(Exception):  # noqa: N818, not an error
    """Ends an attack that nobody waits for."""


class Loop(threading.Thread):
    """An iterative attack in its own thread that only runs while `advance` lets it.

    attack(tick) calls tick() once per iteration and works on `images` images; a turn is `steps` iterations.
    """

    def __init__(self, attack: Callable, *, steps: int, images: int = 1):
        super().__init__(daemon=True)
        self.attack, self.steps, self.images = attack, steps, images
        self.left, self.result, self.error = 0, None, None
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
        self.returned.release()

    def tick(self) -> None:
        if self.left == 0:
            self.returned.release()
            self.granted.acquire()
            if self.left == 0:
                raise Stop
        self.left -= 1

    def advance(self, iterations: float) -> float:
        """Run so many iterations, or to the end; 0 ends the attack. Returns seconds of CPU time."""
        self.left, start = iterations, time.process_time()
        self.granted.release()
        self.returned.acquire()
        if self.error:
            raise self.error
        return time.process_time() - start

    def finish(self):
        """What the attack returns after its remaining iterations."""
        self.advance(math.inf)
        return self.result


def take_turns(loops: dict[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image and iteration of each loop, by round; the order rotates from round to round."""
    times, names = {name: [] for name in loops}, list(loops)
    for loop in loops.values():
        loop.advance(loop.steps)  # set-up, compilation, warm-up
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            loop = loops[name]
            times[name].append(1e3 * loop.advance(loop.steps) / (loop.steps * loop.images))
    return times


def stop(loops: dict[str, Loop]) -> None:
    for loop in loops.values():
        if loop.is_alive():
            loop.advance(0)


class Table:
    """Rows and notes, printed as they come and kept."""

    def __init__(self):
        self.rows: list[dict] = []
        self.notes: list[str] = []
        print(f"{'':<36}{'ours ms':>9}{'peer ms':>9}{'ratio':>8}   {'[min, max]':<15} goal", flush=True)

    def add(self, what: str, times: dict, ours: str, peer: str, goal: str, *, overhead: bool = False) -> None:
        """ratio: of times in the same round, peer / ours, or ours / peer for an overhead; the median over rounds."""
        ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
        ratios = sorted(1 / ratio for ratio in ratios) if overhead else sorted(ratios)
        ours_ms, peer_ms, ratio = map(statistics.median, (times[ours], times[peer], ratios))
        row = {"what": what, "ours_ms": ours_ms, "peer_ms": peer_ms, "ratio": ratio}
        self.rows.append(row | {"min": ratios[0], "max": ratios[-1], "goal": goal})
        spread = f"[{ratios[0]:.2f}, {ratios[-1]:.2f}]"
        print(f"{what:<36}{ours_ms:>9.3f}{peer_ms:>9.3f}{ratio:>8.2f}   {spread:<15} {goal}", flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"    {text}", flush=True)
