"""Progress with an ETA: a bar on a terminal, a line every half minute in a log, a line for every epoch."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from utils.runs import Run

LINE_EVERY = 30.0  # seconds
EPOCH_HEAD = "  epoch       lr    loss   local  masked   acc1   acc5   best  images/s      ETA"


def track(items: Iterable, total: int, label: str, log: Callable[[str], None] | None, done: int = 0) -> Iterator:
    """Yield from `items`, showing how far it is: after the first where the rest takes long, then every half minute.

    log None is silent; `done` items were finished before.
    """
    if log is None:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, initial=done, leave=False, dynamic_ncols=True)
    else:
        started = last = time.monotonic()
        for number, item in enumerate(items, done + 1):
            yield item
            now = time.monotonic()
            remaining = (now - started) / (number - done) * (total - number)
            first = number == done + 1 and remaining >= LINE_EVERY
            if (first or now - last >= LINE_EVERY) and number < total:
                last = now
                log(f"{label}: {number}/{total} ({100 * number / total:.0f} %), ETA {duration(remaining)}")


_LISTENER: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("listener", default=None)


def tell(stage: str, done: int, total: int) -> None:
    """Tell who is `listening` how far a long computation is: `done` of at most `total` steps of a stage."""
    if listener := _LISTENER.get():
        listener(stage, done, total)


@contextmanager
def listening(listener: Callable[[str, int, int], None]) -> Iterator[None]:
    """Call listener(stage, done, total) whenever a computation inside tells how far it is."""
    before = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(before)


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def log_epoch(run: "Run", done: int, total: int, stats: dict, score: dict, best: dict, seconds: float) -> None:
    """Write a line of the epoch table and a row of metrics.jsonl and TensorBoard, after `done` of `total` epochs."""
    run.log(
        f"{done:>3}/{total:<3}  {stats['lr']:.1e} {stats['loss']:7.4f} {stats['localization']:7.4f} "
        f"{stats['masked']:7.2f} "
        f"{score['acc1']:6.2f} {score['acc5']:6.2f} {best['acc1']:6.2f} {stats['images_per_second']:9.1f} "
        f"{duration(seconds / done * (total - done)):>8}"
    )
    if stats["skipped"] or score["skipped"]:
        run.log(f"        skipped unreadable images: {stats['skipped']} in training, {score['skipped']} in validation")
    rows = {"train": stats, "val": {key: value for key, value in score.items() if not isinstance(value, list)}}
    run.scalars(done - 1, {f"{split}/{key}": value for split, row in rows.items() for key, value in row.items()})
