"""Real runs in processes of their own that start in no time: this one has torch loaded, and forks."""

import ctypes
import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import campaigns.audit  # noqa: F401, loaded once for all forks, with what attack.py and train.py need
import campaigns.sentences  # noqa: F401
import data.sources  # noqa: F401
import utils.files
from options import AttackConfig, TrainConfig
from training.trainer import Trainer
from utils.campaign import Campaign
from utils.commandline import _build_parser
from utils.errors import run_command

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
for schema in (TrainConfig, AttackConfig):
    _build_parser(schema)  # once for all forks
FORK = multiprocessing.get_context("fork")
PATIENCE = 60.0  # seconds after which a process that should have ended counts as hanging
HANGING = 99  # exit status of such a process


@dataclass(frozen=True)
class Job:
    """A command whose result can be compared.

    compare(folder): what every run of it must have in common; saved(folder): how much work a broken run has kept, in
    what `unit` is counted; whole(folder) raises when something under its final name cannot be read in full.
    """

    script: str
    options: list[str]
    compare: Callable[[Path], object]
    saved: Callable[[Path], int]
    whole: Callable[[Path], None]
    unit: str
    processes: int = 1
    finished: Callable[[Path], bool] = lambda folder: (folder / "results.json").exists()


@dataclass(frozen=True)
class Fault:
    """What happens to a run: `hook` in the last of its processes before the script starts, `act` in this one meanwhile.

    before and after: in this process, with the run's folder; after undoes what before did. expect: exit statuses that
    are right; says: a part of the last line that processes with status 2 leave on stderr.
    """

    hook: Callable[[], None] | None = None
    act: Callable[[list, "Work"], None] | None = None
    before: Callable[[Path], None] = lambda folder: None
    after: Callable[[Path], None] = lambda folder: None
    expect: tuple[int, ...] = (-9,)
    says: str = ""


class Work:
    """How far a run has come, counted in its process and read in this one: training steps, images, or files."""

    def __init__(self):
        self.done = FORK.Value(ctypes.c_int, 0, lock=False)

    def wait_for_first(self, forks: list) -> None:
        limit = time.monotonic() + PATIENCE
        while not self.done.value and any(fork.is_alive() for fork in forks) and time.monotonic() < limit:
            time.sleep(0.002)

    def count(self, unit: str) -> None:
        """Called in the process of the run."""
        step, opened, add, write = Trainer._train_step, Campaign.__init__, Campaign.add, utils.files.write_atomic

        def counted_step(trainer, batch):
            result = step(trainer, batch)
            self.done.value = trainer.epoch * trainer.steps + trainer.step + 1
            return result

        def counted_open(campaign, *given):
            opened(campaign, *given)
            self.done.value = len(campaign.finished)

        def counted_add(campaign, rows):
            add(campaign, rows)
            self.done.value += len(rows)

        def counted_write(path, function):
            write(path, function)
            self.done.value += Path(path).suffix == ".JPEG"

        if unit == "files":
            utils.files.write_atomic = counted_write
        elif unit == "steps":
            Trainer._train_step = counted_step
        else:
            Campaign.__init__, Campaign.add = counted_open, counted_add


def run(job: Job, folder: Path, fault: Fault, work: Work) -> tuple[list[int], list[str], float]:
    """Exit statuses, last lines on stderr, and seconds from the fault's act until every process had ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = range(job.processes)
    forks = [FORK.Process(target=child, args=(job, folder, rank, port, fault.hook, work)) for rank in ranks]
    for fork in forks:
        fork.start()
    if fault.act:
        fault.act(forks, work)
    began, statuses = time.monotonic(), []
    for fork in forks:
        fork.join(max(0.1, PATIENCE + began - time.monotonic()))
        statuses.append(HANGING if fork.is_alive() else fork.exitcode)
        if fork.is_alive():
            fork.kill()
            fork.join()
    seconds = time.monotonic() - began
    errors = [Path(f"{folder}.err.{rank}").read_text(errors="replace").strip() for rank in ranks]
    return statuses, [text.splitlines()[-1] if text else "" for text in errors], seconds


def child(job: Job, folder: Path, rank: int, port: int, hook: Callable[[], None] | None, work: Work) -> None:
    """The process of a run: its own session and streams, torchrun's variables, then the script as a user calls it."""
    os.setsid()
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    if job.processes > 1:
        about = {"RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": job.processes}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in about.items()})
    sys.argv, status = [str(ROOT / job.script), *job.options, "--output", str(folder)], 0
    try:
        work.count(job.unit)
        if hook and rank == job.processes - 1:
            hook()
        run_command(importlib.import_module(job.script.removesuffix(".py").replace("/", ".")).main)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
