"""Faults: what happens to a run, as hooks in its process and as acts of the process that started it."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path

import utils.files
from training.trainer import Trainer
from utils.stopping import Interruptible


def send(number: int, seconds: float, victim: int = -1) -> Callable:
    """A signal to one process of the run, so many seconds after its first step."""

    def act(forks: list, work) -> None:
        work.wait_for_first(forks)
        time.sleep(seconds)
        if forks[victim].is_alive():
            os.kill(forks[victim].pid, number)

    return act


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def told_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Torn:
    """A file whose process meets its end after a share of the bytes of the first write."""

    def __init__(self, file, share: float):
        self.file, self.share = file, share

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data) -> int:
        self.file.write(bytes(data)[: int(self.share * len(data))])
        self.file.flush()
        killed()


def killed_in_write(number: int, share: float) -> Callable[[], None]:
    """SIGKILL in that atomic write: below a share of 1 amid its bytes, at 1 before the rename, at 2 after."""

    def hook() -> None:
        count = [0]

        def opened(path, mode="r", **options):
            count[0] += mode == "wb"
            torn = mode == "wb" and count[0] == number and share < 1
            return Torn(open(path, mode), share) if torn else open(path, mode, **options)

        def replaced(source, target) -> None:
            if count[0] == number and share == 1:
                killed()
            os.replace(source, target)
            if count[0] == number:
                killed()

        utils.files.open = opened
        utils.files.os = types.SimpleNamespace(getpid=os.getpid, fsync=os.fsync, replace=replaced)

    return hook


def writes_refused(code: int, after: int) -> Callable[[], None]:
    """Atomic writes after the first `after` fail: no space, quota, read-only, input/output error."""

    def hook() -> None:
        count = [0]

        def opened(path, mode="r", **options):
            count[0] += mode == "wb"
            if mode == "wb" and count[0] > after:
                raise OSError(code, os.strerror(code), str(path))
            return open(path, mode, **options)

        utils.files.open = opened

    return hook


def file_size_limit(limit: int) -> Callable[[], None]:
    """No file of the process may grow beyond `limit` bytes: writes stop there as on a full disk. Needs no rights."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def told_to_stop_in_validation(number: int) -> Callable[[], None]:
    """SIGTERM after the first batch of that validation."""

    def hook() -> None:
        count = [0]

        def first_batch_then_signal(self):
            count[0] += 1
            for batch in self.loader:
                if count[0] == number:
                    told_to_stop()
                yield batch
                if self.stop.received:
                    return

        Interruptible.__iter__ = first_batch_then_signal

    return hook


def wall_clock_jumps(seed: int) -> Callable[[], None]:
    """Every reading of the wall clock is off by up to ten years."""

    def hook() -> None:
        rng, real = random.Random(seed), time.time
        time.time = lambda: max(0.0, real() + rng.uniform(-3e8, 3e8))

    return hook


def loss_is_nan(step: int) -> Callable[[], None]:
    return poisoned(step, lambda trainer, loss: loss * float("nan"))


def weight_is_nan(step: int) -> Callable[[], None]:
    """A weight becomes NaN in the update of that step, whose own loss does not show it."""

    def spoil(trainer: Trainer, loss):
        next(trainer.model.parameters()).data.view(-1)[0] = float("nan")
        return loss

    return poisoned(step, spoil)


def poisoned(step: int, spoil: Callable) -> Callable[[], None]:
    def hook() -> None:
        real = Trainer._train_step

        def stepped(self, batch):
            loss = real(self, batch)
            return spoil(self, loss) if self.epoch * self.steps + self.step == step else loss

        Trainer._train_step = stepped

    return hook


def image_becomes(path: Path, what: str, step: int) -> Callable[[], None]:
    """At that step a training image turns into a folder, a broken link, a pipe, or an empty or a cut file."""
    return poisoned(step, lambda trainer, loss: spoil(path, what) or loss)


def spoil(path: Path, what: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "broken link":
        path.symlink_to("/no/such/file")
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(content[: 60 * (what == "cut file")])


def restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    path.write_bytes(content)


def can_mount() -> bool:
    """Whether this user may mount: needed for a disk that is really full, or really read-only."""
    return os.geteuid() == 0 and shutil.which("mount") is not None


def mounted(options: str) -> Callable[[Path], None]:
    """The run's folder becomes a small disk of its own in memory."""

    def before(folder: Path) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    return before


def remounted(options: str) -> Callable[[Path], None]:
    def after(folder: Path) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    return after


def unmount(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)
