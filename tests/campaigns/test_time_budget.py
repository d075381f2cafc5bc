"""campaigns/time_budget.py: blocks that take too long are stopped, and shares add up to no more than the time."""

import signal
import threading

import pytest

from campaigns.time_budget import TimeBudget, TimeIsUp, stopped_after
from utils.errors import foreign


def test_a_block_is_stopped_and_the_alarm_taken_back():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeIsUp), stopped_after(0.02):
        while True:
            pass
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with stopped_after(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(TimeIsUp), stopped_after(0):  # nothing left: not "no limit"
        while True:
            pass


def test_in_another_thread_nothing_is_stopped():
    reached = []

    def work() -> None:
        with stopped_after(1e-3):
            reached.append(signal.getitimer(signal.ITIMER_REAL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [(0.0, 0.0)]


def test_shares_are_of_what_is_left(monkeypatch):
    now = iter([100.0, 110.0, 110.0, 110.0, 175.0, 175.0, 175.0])
    monkeypatch.setattr("campaigns.time_budget.time.monotonic", lambda: next(now))
    budget = TimeBudget(1.0)
    assert budget.share(2) == 25 and budget.share(2, keep=30) == 10 and str(budget) == "0:00:10 of 0:01:00"
    assert budget.left == budget.share(3) == 0 and budget.spent == 75


def test_the_alarm_is_not_taken_for_a_failure_of_the_network_at_work():
    with pytest.raises(TimeIsUp), stopped_after(0.02), foreign("the network fails", "look at it"):
        while True:
            pass
