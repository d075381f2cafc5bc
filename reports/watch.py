"""A running optimisation in TensorBoard and in the log, while it runs."""

import time
from collections.abc import Callable, Mapping, Sequence

from data.transforms import denormalize
from utils.progress import LINE_EVERY, duration
from utils.runs import Run

FIRST_LINE = 3.0  # seconds of an optimisation after which the log says how long it will take


def watcher(
    run: Run, every: int, victims: Sequence[int], normalize: Mapping | None, after: int = 0
) -> Callable[[int, int, Callable], None]:
    """Return a function (iteration, iterations, snapshot) for attacks that take `watch`; snapshot() -> (images,
    objectives).

    Every `every` iterations (0: never) the best images so far and their objectives go to TensorBoard, by the number of
    the victim; normalize: mean and std of the images, None for what is no picture. The log gets a line after the first
    seconds and then every half minute, with the time left; after: how many problems like this one follow, whose time
    is told too.
    """
    began = last = 0.0
    wait = FIRST_LINE

    def watch(iteration: int, iterations: int, snapshot: Callable) -> None:
        nonlocal began, last, wait
        if iteration == 0:  # the first one may have spent minutes compiling
            began = last = time.monotonic()
        if every and iteration % every == 0:
            images, objectives = snapshot()
            for victim, batch, objective in zip(victims, images, objectives.tolist(), strict=True):
                run.scalars(iteration, {f"objective/{victim:04d}": objective})
                if normalize is not None:
                    picture = denormalize(batch[:1].cpu(), **normalize)[0]
                    run.image(iteration, f"reconstruction/{victim:04d}", picture)
        now = time.monotonic()
        if iteration and now - last >= wait:
            last, wait = now, LINE_EVERY
            each = (now - began) / iteration
            left = each * (iterations - iteration)
            best = float(snapshot()[1].min())
            where = f"image {victims[0]}: iteration {iteration}/{iterations}"
            all_left = f", of all images {duration(left + after * each * iterations)}" if after else ""
            run.log(f"{where}, objective {best:.3g}, ETA {duration(left)}{all_left}")

    return watch


def stage_lines(log: Callable[[str], None], victim: int, after: int) -> Callable[[str, int, int], None]:
    """Return a function (stage, done, total) for `utils.progress.listening`: it logs how far the attack on a victim is.

    The log gets a line after the first seconds of an attack and then every half minute: the stage, and the most it can
    still take. after: how many problems like this one follow.
    """
    heard = time.monotonic()
    wait, running, began = FIRST_LINE, "", heard

    def listener(stage: str, done: int, total: int) -> None:
        nonlocal heard, wait, running, began
        now = time.monotonic()
        if done == 0 or stage != running:
            running, began = stage, now
        elif now - heard >= wait:
            heard, wait = now, LINE_EVERY
            left = duration((now - began) / done * (total - done))
            follow = f"; {after} more to come" if after else ""
            log(f"image {victim}: {stage} {done}/{total}, at most {left} of it left{follow}")

    return listener
