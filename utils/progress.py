"""Progress with an ETA: a bar on a terminal, a line every half minute in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds


def track(items: Iterable, total: int, label: str, log: Callable[[str], None] | None, done: int = 0) -> Iterator:
    """Yield from `items`, showing how far it is. log None is silent; `done` items were finished before."""
    if log is None:
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, initial=done, leave=False, dynamic_ncols=True)
    else:
        started = last = time.monotonic()
        for number, item in enumerate(items, done + 1):
            yield item
            now = time.monotonic()
            if now - last >= LINE_EVERY and number < total:
                last = now
                remaining = (now - started) / (number - done) * (total - number)
                log(f"{label}: {number}/{total} ({100 * number / total:.0f} %), ETA {duration(remaining)}")


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
