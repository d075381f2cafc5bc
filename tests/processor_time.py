"""Which tests take longest, in processor time: python -m pytest -p tests.processor_time [--slowest 25] PATHS

--durations counts seconds by the clock, which on a busy machine are mostly those of others. Here a test's set-up, call
and clean-up each count with the user and system time of this process and of the children it has waited for; what the
server of tests/scripts/fork.py forks is not among them.
"""

import os
from collections.abc import Iterator

import pytest

TIMES, LAST = pytest.StashKey[list](), pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slowest", type=int, default=25, help="tests and fixtures shown, slowest first")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    now = sum(os.times()[:4])
    item.config.stash.setdefault(TIMES, []).append((now - item.config.stash.get(LAST, now), call.when, item.nodeid))
    item.config.stash[LAST] = now
    return report


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[LAST] = sum(os.times()[:4])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    times = sorted(config.stash.get(TIMES, []), reverse=True)
    terminalreporter.section(f"processor time, {sum(seconds for seconds, *_ in times):.0f} s in all")
    for seconds, when, name in times[: config.getoption("--slowest")]:
        terminalreporter.write_line(f"{seconds:8.2f} s {when:<8} {name}")
