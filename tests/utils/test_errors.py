"""One line for the end of a run, whatever its processes have to say, and whichever signals come together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import CLOSEST, SHARED, did_you_mean, no_such_path

ROOT = Path(__file__).parents[2]
SAYS = """
import sys
from utils.errors import UserError, explain, run_command
def main():
    raise {error}
run_command(main)
"""
BOTH = """
import os, signal
from utils.errors import run_command
def main():
    both = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    for number in both:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    while True:
        pass
run_command(main)
"""
PEER = "RuntimeError('[gloo] Connection closed by peer')"
STOPPED = "__import__('utils.errors', fromlist=['Stopped']).Stopped('state saved at epoch 3', 2, 'go on')"


def said(folder: Path, *errors: str, attempt: int = 0) -> list[str]:
    """What processes of one launcher print that end with these errors, all at once."""
    environment = os.environ | {SHARED: str(folder), "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    started = [
        subprocess.Popen([sys.executable, "-c", SAYS.format(error=error)], cwd=ROOT, env=environment,
                         stderr=subprocess.PIPE, text=True)
        for error in errors
    ]  # fmt: skip
    return [line for process in started for line in process.communicate()[1].splitlines()]


def test_processes_that_end_differently_say_one_line_for_each_start(tmp_path):
    errors = ("UserError('one')", "UserError('two')", STOPPED, "__import__('utils.errors').errors.Stopped('')")
    for attempt in (0, 1):
        assert len(said(tmp_path, *errors, attempt=attempt)) == 1


@pytest.mark.parametrize("first", [0, 1])
def test_the_line_is_that_of_the_process_which_knows_why(tmp_path, first):
    errors = [PEER, "UserError('the reason')"]
    assert said(tmp_path, *(errors if first else reversed(errors))) == ["error: the reason"]


def test_a_line_that_follows_from_nothing_said_here_is_said(tmp_path):
    (line,) = said(tmp_path, PEER, PEER)
    assert line.startswith("error: another process of this run ended")


def test_two_stop_signals_at_once_are_one_line():
    done = subprocess.run([sys.executable, "-c", BOTH], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped by Ctrl-C (SIGINT): run the same command again\n")


def test_a_wrong_name_is_answered_with_the_nearest_all_of_few_or_the_closest_of_many():
    few, many = ["noise", "prune"], [f"blocks.{number}.weight" for number in range(100)]
    assert did_you_mean("nois", few) == "did you mean 'noise'?"
    assert did_you_mean("xyz", few) == "known: noise, prune"
    answer = did_you_mean("hat", many)
    assert "of 100, the closest are" in answer and answer.count("blocks.") == CLOSEST


def test_a_path_that_is_not_there_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "photographs").mkdir()
    near = f"did you mean '{tmp_path / 'photographs'}'?"
    assert no_such_path(tmp_path / "photograph").endswith(near)
    assert no_such_path(tmp_path / "photograph" / "a.png").endswith(near)
    assert no_such_path(tmp_path / "cow").endswith("cow' does not exist: check the path")
    assert no_such_path("nowhere/at/all").endswith("check the path")
