"""One run = one folder: config.yaml, environment.json, log.txt, metrics.jsonl, tb/, results.json (written last), and
*.pt in training.

One process has a folder at a time. A run that --overwrite replaces is set aside and comes back if the new one fails
before it has anything to keep.
"""

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from torch import Tensor

from utils.distributed import Processes
from utils.errors import UserError, printable
from utils.files import remove_leftovers, write_figure, write_json, write_text
from utils.machine import code_version, describe_machine
from utils.notes import Notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None

# What a run may have left behind and --overwrite may remove; anything else in the folder is the user's.
ARTEFACTS = (
    "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "tb", "results.json", "last.pt", "best.pt",
    "partial", "per_image.csv", "originals", "inputs", "reconstructions", "report.html", "figures",
    "policies.json", "audit.html", "sentences.json",
)  # fmt: skip
UNFINISHED = ("last.pt", "partial")  # what a run that can be resumed keeps: a training, an attack campaign
EARLIER = ".replaced"  # where the run that --overwrite replaces waits until the new one has something to keep
PATIENCE = 15.0  # seconds to wait for a folder: loader workers outlive a killed run by up to 5


class Run:
    """The folder of one run. Only the main process writes; on the others every method does nothing.

    inputs: files and folders the run will read. They must exist, and lie outside the folder, before anything in it is
    touched. A folder with an earlier run is refused unless it is resumed or `overwrite` is given.
    state: which of `UNFINISHED` this kind of run resumes from. may_change: the options a resumed run may have changed,
    listed in `changes`; None is all of them, others are refused. notes: what the run assumed and used, for its results.
    """

    def __init__(
        self,
        folder: str,
        config: str,
        processes: Processes,
        *,
        overwrite: bool = False,
        resume: bool = False,
        state: str = "last.pt",
        may_change: Sequence[str] | None = None,
        inputs: Sequence[str | None] = (),
    ):
        self.folder, self.is_main = Path(folder), processes.is_main
        self.claimed, self.lock, self.notes = False, None, Notes(self.log)
        self.logger = logging.getLogger(f"run.{self.folder.absolute()}")
        self.tensorboard: SummaryWriter | None = None
        try:
            self._start(config, processes, overwrite, resume, state, may_change, inputs)
        except BaseException:
            self.close(failed=True)
            raise

    def _start(self, config, processes, overwrite, resume, state, may_change, inputs) -> None:
        if self.is_main and self.folder.is_dir():
            self._claim()
            self._settle(failed=True)  # a run that was killed before it had anything to keep
        processes.wait()
        self.resumed = resume and not overwrite and (self.folder / state).exists()
        self._check(overwrite, inputs)
        self.changes = ""  # options that differ from those the resumed run was started with
        if self.resumed:
            self.changes = self._changes_since(config, may_change)
        processes.wait()
        if self.is_main:
            self._open(config, overwrite, processes)
        processes.wait()  # nobody writes into the folder before it is ready

    def _open(self, config: str, overwrite: bool, processes: Processes) -> None:
        about = environment() | {"processes": processes.world_size, "device": str(processes.device)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
            remove_leftovers(self.folder)
            if overwrite:
                self._set_aside()
            if not self.resumed:  # a run that was killed before it had anything to continue from wrote these
                _remove(self.folder / "metrics.jsonl")
                _remove(self.folder / "tb")
            write_text(self.folder / "config.yaml", config)
            write_json(self.folder / "environment.json", about)
            file = LogFile(self.folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            reason = f"cannot write to output folder '{self.folder}' ({error.strerror})"
            raise UserError(f"{reason}: choose another --output") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.handlers = [file, console]
        file.handle(logging.makeLogRecord({"msg": in_words(about)}))

    def _check(self, overwrite: bool, inputs: Sequence[str | None]) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output '{self.folder}' is a file: choose a folder")
        for path in filter(None, inputs):
            if not Path(path).exists():
                raise UserError(f"'{path}' does not exist: check the path")
            if self.folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise UserError(f"output folder '{self.folder}' holds '{path}', which this run reads: choose another")
        if overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            raise UserError(
                f"restarted by torchrun, and --overwrite would discard what this run has done so far in "
                f"'{self.folder}': continue with --resume auto and without --overwrite"
            )
        if overwrite or self.resumed:
            return
        if (self.folder / "results.json").exists():
            raise UserError(f"output folder '{self.folder}' holds a finished run: choose another, or pass --overwrite")
        if any((self.folder / name).exists() for name in UNFINISHED):
            raise UserError(
                f"output folder '{self.folder}' holds an unfinished run: continue it with --resume auto, "
                f"or discard it with --overwrite"
            )

    def _claim(self) -> None:
        """Have the folder to ourselves until this process ends, however it ends, where the file system knows locks."""
        if self.claimed:
            return
        self.lock, began = fcntl and os.open(self.folder, os.O_RDONLY), time.monotonic()
        while fcntl:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > PATIENCE:
                    raise UserError(
                        f"output folder '{self.folder}' is in use by another process: wait for it, or choose another"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a network file system without locks
                break
        self.claimed = True

    def _set_aside(self) -> None:
        """Move the run that is in the folder out of the way."""
        found = [name for name in ARTEFACTS if (self.folder / name).exists()]
        if found:
            (self.folder / EARLIER).mkdir(exist_ok=True)
        for name in found:
            os.replace(self.folder / name, self.folder / EARLIER / name)

    def _settle(self, failed: bool) -> None:
        """Forget the run that was set aside or, where this one failed with nothing to keep, put it back."""
        earlier = self.folder / EARLIER
        if not earlier.is_dir():
            return
        if failed and not any((self.folder / name).exists() for name in ("results.json", *UNFINISHED)):
            for name in ARTEFACTS:
                _remove(self.folder / name)
                if (earlier / name).exists():
                    os.replace(earlier / name, self.folder / name)
        _remove(earlier)

    def keep(self) -> None:
        """This run has something worth keeping now: what it replaced may go. For long runs; closing does it too."""
        if self.is_main:
            self._settle(failed=False)

    def _changes_since(self, config: str, may_change: Sequence[str] | None) -> str:
        """What the resumed run's options say differently, as text; empty when nothing. UserError when they may not."""
        path = self.folder / "config.yaml"
        texts = (path.read_text() if path.exists() else "", config)
        before, after = (_flatten(yaml.safe_load(text) or {}) for text in texts)
        keys = [key for key in {**before, **after} if key not in ("output", "resume", "overwrite")]
        changed = [key for key in keys if before.get(key) != after.get(key)]
        listed = ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in changed)
        if may_change is not None and not set(changed) <= {*may_change}:
            raise UserError(
                f"output folder '{self.folder}' holds an unfinished run with other options ({listed}): "
                f"continue it with the same, or discard it with --overwrite"
            )
        return f"; changed since: {listed}" if changed else ""

    def log(self, message: str) -> None:
        """One line on stdout and in log.txt."""
        if self.is_main:
            self.logger.info("\n".join(printable(line) for line in message.split("\n")))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One row of metrics.jsonl and one TensorBoard point per tag, e.g. {'train/loss': 2.3}."""
        if not self.is_main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self._writer(step).add_scalar(tag, value, step)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """A TensorBoard image, (3, H, W) in [0, 1]."""
        if self.is_main:
            self._writer(step).add_image(tag, image.clamp(0, 1), step)

    def figures(self, figures: dict[str, "Figure"]) -> None:
        """Write matplotlib figures by name to figures/NAME.png and NAME.pdf."""
        if self.is_main and figures:
            (self.folder / "figures").mkdir(exist_ok=True)
            for name, chart in figures.items():
                write_figure(self.folder / "figures" / name, chart)

    def rewind(self, step: int) -> None:
        """Drop metric rows from `step` on: the resumed run writes them again, with the same numbers."""
        path = self.folder / "metrics.jsonl"
        if self.is_main and path.exists():
            rows = [line for line in path.read_text().splitlines(keepends=True) if _step(line) < step]
            write_text(path, "".join(rows))

    def results(self, results: dict) -> None:
        """Write results.json, which marks the run as finished, with what `notes` say."""
        if self.is_main:
            write_json(self.folder / "results.json", results | self.notes.results())

    def close(self, failed: bool = False) -> None:
        """Close the files. failed: this run ended with an error, see `_settle`."""
        try:
            if self.tensorboard:
                self.tensorboard.close()
        finally:
            for handler in self.logger.handlers:
                with suppress(OSError):  # every line was flushed, or has stopped the run, when it was written
                    handler.close()
            self.logger.handlers = []
            if self.claimed:
                self._settle(failed)
            if self.lock is not None:
                os.close(self.lock)
            self.claimed, self.lock = False, None

    def _writer(self, step: int) -> "SummaryWriter":
        if self.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # not every run draws curves

            self.tensorboard = SummaryWriter(str(self.folder / "tb"), purge_step=step if self.resumed else None)
        return self.tensorboard


@contextmanager
def open_run(folder: str, config: str, processes: Processes, **options) -> Iterator[Run]:
    """Open a run folder and close its files on every way out. Options as in Run."""
    run = Run(folder, config, processes, **options)
    try:
        yield run
    except BaseException:
        run.close(failed=True)
        raise
    run.close()


def command_line() -> str:
    """The command of this process, as one would type it."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def environment() -> dict:
    """What the numbers of this process were made with: command, code, packages and machine."""
    return {"command": command_line(), "code": code_version(), **describe_machine()}


def in_words(about: dict) -> str:
    """`environment` in one line."""
    code, packages = about["code"], ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    changed = ", uncommitted changes" if code["dirty"] else ""
    machine = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return f"{about['command']} | code {code['commit']}{changed} | Python {about['python']}, {packages} | {machine}"


class LogFile(logging.FileHandler):
    """A log file whose disk is full stops the run like any other file, instead of a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        raise  # noqa: PLE0704, called while the error is handled


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _step(line: str) -> int:
    """Step of a metrics row; a row cut short by a crash counts as later than any."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize
