"""One run = one folder: run.json, config.yaml, environment.json, log.txt, metrics.jsonl, tb/, results.json (written
last), and *.pt in training.

One process has a folder at a time. Nothing in it changes before the run starts, that is, before its options, its data
and what it continues from have been looked at, and there is work to do. A run that is refused after all leaves the
folder as it was. One that --overwrite replaces is set aside, and comes back if the new one fails before it has anything
to keep.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from torch import Tensor

from utils import ownership
from utils.aliases import current
from utils.distributed import Processes
from utils.errors import AlreadyFinished, Stopped, UserError, no_such_path, printable
from utils.files import remove_leftovers, replace_files, write_figure, write_json, write_text
from utils.machine import environment, in_words
from utils.notes import Notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

try:
    import fcntl
except ImportError:  # not on Windows, where folders are not locked
    fcntl = None

UNFINISHED = ("last.pt", "partial")  # what a run that can be resumed keeps: a training, an attack campaign
WORTH = ("results.json", "last.pt", "best.pt", "partial/*.jsonl")  # what a run was made for
PATIENCE = 15.0  # seconds to wait for a folder: loader workers outlive a killed run by up to 5


class Run:
    """The folder of one run. Only the main process writes; on the others every method does nothing.

    inputs: files and folders the run will read. They must exist, and lie outside the folder. A folder with an earlier
    run is refused unless that is resumed or `overwrite` is given, one with anything else always is. state: which of
    `UNFINISHED` this kind of run resumes from; None: it cannot be resumed. may_change: the options a resumed run may
    have changed, listed in `changes`; None is all of them, others are refused. outputs: what the run writes besides
    `ownership.BASE`, as paths or patterns inside the folder. The defaults are those of a training. notes:
    what the run assumed and used, for its results.

    Raises AlreadyFinished where the run to be resumed has its results and no state to go on from.
    """

    def __init__(
        self,
        folder: str,
        config: str,
        processes: Processes,
        *,
        overwrite: bool = False,
        resume: bool = False,
        state: str | None = "last.pt",
        may_change: Sequence[str] | None = None,
        inputs: Sequence[str | None] = (),
        outputs: Sequence[str] = ownership.TRAINED,
    ):
        self.folder, self.is_main, self.processes = Path(folder), processes.is_main, processes
        self.config, self.overwrite, self.state = config, overwrite, state
        self.outputs = [*ownership.BASE, *outputs]
        self.inputs = [Path(path) for path in inputs if path]
        self.started, self.claimed, self.lock, self.notes = False, False, None, Notes(self.log)
        self.worth: dict | None = None  # what was there of `WORTH` when the run started
        self.there: list[Path] = []  # files that were there
        self.before: dict[Path, bytes | None] = {}  # small ones of them, as they were
        self.made: list[Path] = []  # folders made for it
        self.drawn = False  # it has a point of a curve
        self.logger = logging.getLogger(f"run.{self.folder.absolute()}")
        self.tensorboard: SummaryWriter | None = None
        self._listen()
        try:
            self._look(resume, may_change, inputs)
        except BaseException as error:
            self.close(error)
            raise

    def _look(self, resume: bool, may_change: Sequence[str] | None, inputs: Sequence[str | None]) -> None:
        """Decide whether this run may have the folder, and what it continues; nothing in it changes."""
        if self.is_main and self.folder.is_dir():
            self._claim()
            kept = any((self.folder / name).exists() for name in ("results.json", *UNFINISHED))
            ownership.put_back(self.folder, keep_new=kept)  # after a run that was killed
        self.processes.wait()
        resume = resume and not self.overwrite
        there = self.state is not None and (self.folder / self.state).exists()
        self.resumed = resume and there
        self.continued = [self.folder / name for name in (self.state, "best.pt")] if self.resumed else []
        finished = resume and not there and (self.folder / "results.json").exists() and self._is_own_kind()
        self._check_inputs(inputs)
        self.changes = ""  # options that differ from those the resumed run was started with
        if self.resumed or finished:
            self.changes = self._changes_since(self.config, may_change)
        if finished:
            self.finished()
        self._check_folder()
        self.processes.wait()

    def _is_own_kind(self) -> bool:
        """Return whether the run in the folder was made by a script with these options."""
        before = ownership.read_mapping(self.folder / "config.yaml") or {}
        return len(before) > 0 and before.keys() <= yaml.safe_load(self.config).keys()

    def _listen(self) -> None:
        """Send what is logged to the console, and keep it for log.txt until there is one."""
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        self.waiting = MemoryHandler(1 << 20, flushLevel=sys.maxsize, flushOnClose=False)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.handlers = [self.waiting, console]

    def start(self) -> None:
        """Open the folder for writing: the run is accepted and has work to do. Once; call it on every process.

        Raises UserError where another run came first, or the folder cannot be written to.
        """
        if self.started:
            return
        self.processes.wait()
        if self.is_main:
            about = environment() | {"processes": self.processes.world_size, "device": str(self.processes.device)}
            try:
                self._make_folder()
                self._open(about)
            except OSError as error:
                reason = f"cannot write to output folder '{self.folder}' ({error.strerror})"
                raise UserError(f"{reason}: choose another --output") from error
        self.processes.wait()  # nobody writes into the folder before it is ready
        self.started = True

    def _make_folder(self) -> None:
        for path in (self.folder, *self.folder.parents):
            if path.exists():
                break
            self.made.append(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.claimed:
            self._claim()
            self._check_folder()

    def _open(self, about: dict) -> None:
        """Write config.yaml and its companions, all of them or none, after what is there was made safe."""
        folder = self.folder
        self.worth = {} if self.overwrite else _worth(folder)
        if self.overwrite:
            ownership.set_aside(folder)
        files = [*(ownership.listed(folder) or ()), *self.outputs]
        self.there = ownership.own_files(folder, self.outputs)
        if strange := {*self.there} - {*ownership.own_files(folder)} - {*self.continued}:
            raise UserError(f"'{min(strange)}' was written by no run, and this one would replace it: move it elsewhere")
        remove_leftovers(folder, files)
        texts = dict([ownership.mark(folder, files), (folder / "config.yaml", self.config)])
        texts[folder / "environment.json"] = json.dumps(about, indent=1) + "\n"
        for path in (*texts, folder / "log.txt", folder / "metrics.jsonl"):
            self.before[path] = path.read_bytes() if path.exists() else None
        replace_files(texts)
        file = LogFile(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        self.logger.handlers[0] = file
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        file.handle(logging.makeLogRecord({"msg": in_words(about)}))
        self.waiting.setTarget(file)
        self.waiting.flush()

    def finished(self) -> None:
        """Say that there is nothing left to do. Raises AlreadyFinished, which ends the script in order."""
        options = self.changes.replace("; changed since", "; options that differ, and were not used") or ""
        self.log(f"already finished: '{self.folder}' holds the results and is left as it is{options}")
        raise AlreadyFinished

    def _check_inputs(self, inputs: Sequence[str | None]) -> None:
        for path in filter(None, inputs):
            if not Path(path).exists():
                raise UserError(no_such_path(path))
            if self.folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise UserError(f"output folder '{self.folder}' holds '{path}', which this run reads: choose another")
        if self.overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            raise UserError(
                f"restarted by torchrun, and --overwrite would discard what this run has done so far in "
                f"'{self.folder}': continue without --overwrite, with --resume auto where the script has it"
            )

    def _check_folder(self) -> None:
        """Raise UserError where the folder holds anything but what this run may continue or replace."""
        ownership.refuse_foreign(self.folder, [path.name for path in self.continued])
        if self.overwrite or self.resumed:
            return
        if (self.folder / "results.json").exists():
            raise UserError(f"output folder '{self.folder}' holds a finished run: choose another, or pass --overwrite")
        if any((self.folder / name).exists() for name in UNFINISHED):
            raise UserError(
                f"output folder '{self.folder}' holds an unfinished run: continue it with --resume auto "
                f"(train.py, attack.py), or discard it with --overwrite"
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

    def keep(self) -> None:
        """Note that this run has something worth keeping now: what it replaced may go. For long runs; closing does it
        too."""
        if self.is_main:
            ownership.put_back(self.folder, keep_new=True)

    def _changes_since(self, config: str, may_change: Sequence[str] | None) -> str:
        """Return what the resumed run's options say differently, as text; empty when nothing. UserError when they may
        not."""
        before = _flatten(current(ownership.read_mapping(self.folder / "config.yaml") or {}))
        after = _flatten(yaml.safe_load(config) or {})
        keys = [key for key in {**before, **after} if key not in ("output", "resume", "overwrite")]
        changed = [key for key in keys if before.get(key) != after.get(key)]
        listed = ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in changed)
        if may_change is not None and not set(changed) <= {*may_change}:
            raise UserError(
                f"output folder '{self.folder}' holds a run with other options ({listed}): "
                f"continue it with the same, or discard it with --overwrite"
            )
        return f"; changed since: {listed}" if changed else ""

    def log(self, message: str) -> None:
        """Write one line on stdout and in log.txt."""
        if self.is_main:
            self.logger.info("\n".join(printable(line) for line in message.split("\n")))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one row of metrics.jsonl and one TensorBoard point per tag, e.g. {'train/loss': 2.3}."""
        if not self.is_main:
            return
        self._draw()
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for tag, value in values.items():
            self._writer(step).add_scalar(tag, value, step)

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """Write a TensorBoard image, (3, H, W) in [0, 1]."""
        if self.is_main:
            self._draw()
            self._writer(step).add_image(tag, image.clamp(0, 1), step)

    def figures(self, figures: dict[str, "Figure"]) -> None:
        """Write matplotlib figures by name to figures/NAME.png and NAME.pdf."""
        self.start()
        if self.is_main and figures:
            (self.folder / "figures").mkdir(exist_ok=True)
            names = [name for name in figures if not self._is_taken(name)]
            files = [file for name in names for file in ownership.figure_files(name)]
            replace_files(dict([ownership.mark(self.folder, [*(ownership.listed(self.folder) or ()), *files])]))
            for name in names:
                write_figure(self.folder / "figures" / name, figures[name])

    def _is_taken(self, name: str) -> bool:
        """Return whether a figure's name is that of a file which no run wrote: that one stays, and the log says so."""
        there = ownership.own_files(self.folder, ownership.figure_files(name))
        taken = not {*there} <= {*ownership.own_files(self.folder)}
        if taken:
            self.log(f"'{there[0]}' is not of this run and stays: the figure of that name is not written")
        return taken

    def rewind(self, step: int) -> None:
        """Drop metric rows from `step` on: the resumed run writes them again, with the same numbers."""
        path = self.folder / "metrics.jsonl"
        if self.is_main and path.exists():
            rows = [line for line in path.read_text().splitlines(keepends=True) if _step(line) < step]
            write_text(path, "".join(rows))

    def results(self, results: dict) -> None:
        """Write results.json, which marks the run as finished, with what `notes` say. Call it on every process."""
        self.start()
        if self.is_main:
            write_json(self.folder / "results.json", results | self.notes.results())

    def close(self, error: BaseException | None = None) -> None:
        """Close the files. error: what ended the run; see the top of this file for what becomes of the folder then."""
        try:
            if self.tensorboard:
                self.tensorboard.close()
        finally:
            for handler in (*self.logger.handlers, self.waiting):
                with suppress(OSError):  # every line was flushed, or has stopped the run, when it was written
                    handler.close()
            self.logger.handlers = []
            if self.claimed and self.worth is not None:
                self._settle(error)
            if self.lock is not None:
                os.close(self.lock)
            self.claimed, self.lock = False, None

    def _settle(self, error: BaseException | None) -> None:
        """Forget the run that was set aside or, where this one failed with nothing to keep, put back what was there."""
        if error is None or _worth(self.folder) != self.worth:
            ownership.put_back(self.folder, keep_new=True)
        elif self.overwrite and ownership.is_set_aside(self.folder):
            ownership.put_back(self.folder)
        elif isinstance(error, UserError) and not self.drawn:
            with suppress(OSError):  # of a disk that is full: it is the error of the run that is said
                self._undo()

    def _undo(self) -> None:
        for path in {*ownership.own_files(self.folder, self.outputs)} - {*self.there}:
            path.unlink()
        for path in self.made:
            path.rmdir()
        replace_files(
            {path: text for path, text in self.before.items() if text is not None and path.read_bytes() != text}
        )

    def _draw(self) -> None:
        """Remove old curves before the first point of a new one: a run that died before it had anything to continue
        from left others."""
        if not self.drawn and not self.resumed:
            ownership.remove_own(self.folder, ownership.CURVES)
        self.drawn = True

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
    except BaseException as error:
        run.close(error)
        if isinstance(error, Stopped) and run.state is not None and (run.folder / run.state).exists():
            error.remedy = error.remedy or "what is finished is kept, continue with --resume auto"
        raise
    run.close()


class LogFile(logging.FileHandler):
    """A log file whose disk is full stops the run like any other file, instead of a traceback per line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        raise  # noqa: PLE0704, called while the error is handled


def _worth(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of change (ns) of all that the run in `folder` was made for."""
    own = {*ownership.own_files(folder)}
    stats = {path: path.stat() for path in ownership.own_files(folder, WORTH) if path in own}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


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
