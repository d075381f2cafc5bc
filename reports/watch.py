"""A running optimisation in TensorBoard and in the log, while it runs."""

import time
from collections.abc import Callable, Sequence

from data.transforms import denormalize
from utils.progress import LINE_EVERY, duration
from utils.runs import Run


def watcher(
    run: Run, every: int, victims: Sequence[int], normalize: dict | None
) -> Callable[[int, int, Callable], None]:
    """A function (iteration, iterations, snapshot) for attacks that take `watch`; snapshot() -> (images, objectives).

    Every `every` iterations (0: never) the best images so far and their objectives go to TensorBoard, by the number of
    the victim; normalize: mean and std of the images, None for what is no picture. The log gets a line every half
    minute, with the time left.
    """
    began = last = 0.0

    def watch(iteration: int, iterations: int, snapshot: Callable) -> None:
        nonlocal began, last
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
        if iteration and now - last >= LINE_EVERY:
            last = now
            remaining = duration((now - began) / iteration * (iterations - iteration))
            best = float(snapshot()[1].min())
            where = f"image {victims[0]}: iteration {iteration}/{iterations}"
            run.log(f"{where}, objective {best:.3g}, ETA {remaining}")

    return watch
