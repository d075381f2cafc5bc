"""Processes of their own that start at once: a server that has the entry scripts loaded forks them."""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "training.fit",
        "models.resnet",
        "models.swin",
        "models.text",
        "models.vit",
        "campaigns.audit",
        "campaigns.sentences",
        "data.sources",
        "eval.accuracy",
        "tests.scripts.fork",
    ]
)


class Fork:
    """`python SCRIPT ARGUMENTS` in a session of its own, with as much of subprocess.Popen as tests ask of it."""

    def __init__(self, argv: list[str], streams: Path):
        self.streams = [streams.with_suffix(f".{name}") for name in ("out", "err")]
        self.process = FORKS.Process(target=child, args=(argv, self.streams, dict(os.environ)))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        self.process.join(timeout)
        if self.poll() is None:
            raise TimeoutError(f"process {self.pid} has not ended after {timeout} s")
        return tuple(path.read_text(errors="replace") for path in self.streams)

    @property
    def returncode(self) -> int | None:
        return self.poll()


def child(argv: list[str], streams: list[Path], environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()  # the server has what stood there when the first process was asked of it
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv, status = argv, 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # which ends loader workers; a process of multiprocessing leaves it out
    sys.exit(status)
