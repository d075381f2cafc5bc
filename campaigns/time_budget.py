"""The time of an audit: how long it may take in all, and how an attack is stopped that takes more than its share."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from utils.progress import duration


class TimeIsUp(BaseException):  # noqa: N818, not an error
    """What runs inside `stopped_after` has had its seconds. Like an interrupt it passes what catches exceptions, so
    that it is never taken for a failure of the network it found at work."""


class TimeBudget:
    """Wall-clock time of a run, counted from where this is made. minutes: of all of it."""

    def __init__(self, minutes: float):
        self.began, self.minutes = time.monotonic(), minutes
        self.cut: list[str] = []  # what was stopped or left out for want of time, for people

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds that are left, never below 0."""
        return max(0.0, 60 * self.minutes - self.spent)

    def share(self, parts: int, keep: float = 0.0) -> float:
        """Return an equal share of the seconds that are left, for so many `parts`; `keep`: seconds for what follows."""
        return max(0.0, self.left - keep) / max(1, parts)

    def __str__(self) -> str:
        return f"{duration(self.spent)} of {duration(60 * self.minutes)}"


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp inside the block once it has run so long, at the next line of Python that it executes.

    An operation that is under way is finished first. Outside the main thread, and on systems without alarms, nothing
    is stopped.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would turn it off
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
