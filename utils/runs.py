"""One run = one folder: config.yaml, log.txt, metrics.jsonl, tb/, results.json (written last), and *.pt in training."""

import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import yaml
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from utils.distributed import Processes
from utils.errors import UserError
from utils.files import write_figure, write_json, write_text

# What a run may have left behind and --overwrite may remove; anything else in the folder is the user's.
ARTEFACTS = (
    "config.yaml", "log.txt", "metrics.jsonl", "tb", "results.json", "last.pt", "best.pt",
    "partial", "per_image.csv", "originals", "inputs", "reconstructions", "report.html", "figures",
    "policies.json", "sentences.json",
)  # fmt: skip
UNFINISHED = ("last.pt", "partial")  # what a run that can be resumed keeps: a training, an attack campaign
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


class Run:
    """The folder of one run. Only the main process writes; on the others every method does nothing.

    inputs: files and folders the run will read. They must exist, and lie outside the folder, before anything in it is
    touched. A folder with an earlier run is refused unless it is resumed or `overwrite` is given.
    state: which of `UNFINISHED` this kind of run resumes from. may_change: the options a resumed run may have changed,
    listed in `changes`; None is all of them, others are refused.
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
        self.resumed = resume and not overwrite and (self.folder / state).exists()
        self._check(overwrite, inputs)
        self.changes = ""  # options that differ from those the resumed run was started with
        if self.resumed:
            self.changes = self._changes_since(config, may_change)
        processes.wait()
        self.logger = logging.getLogger(f"run.{self.folder.resolve()}")
        self.tensorboard: SummaryWriter | None = None
        if self.is_main:
            self._open(config, overwrite)
        processes.wait()  # nobody writes into the folder before it is ready

    def _open(self, config: str, overwrite: bool) -> None:
        if overwrite:
            self._clear()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", config)
            file = logging.FileHandler(self.folder / "log.txt")
        except OSError as error:
            reason = f"cannot write to output folder '{self.folder}' ({error.strerror})"
            raise UserError(f"{reason}: choose another --output") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.handlers = [file, console]
        file.handle(logging.makeLogRecord({"msg": environment()}))

    def _check(self, overwrite: bool, inputs: Sequence[str | None]) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output '{self.folder}' is a file: choose a folder")
        for path in filter(None, inputs):
            if not Path(path).exists():
                raise UserError(f"'{path}' does not exist: check the path")
            if self.folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
                raise UserError(f"output folder '{self.folder}' holds '{path}', which this run reads: choose another")
        if overwrite or self.resumed:
            return
        if (self.folder / "results.json").exists():
            raise UserError(f"output folder '{self.folder}' holds a finished run: choose another, or pass --overwrite")
        if any((self.folder / name).exists() for name in UNFINISHED):
            raise UserError(
                f"output folder '{self.folder}' holds an unfinished run: continue it with --resume auto, "
                f"or discard it with --overwrite"
            )

    def _clear(self) -> None:
        for name in ARTEFACTS:
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

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
            self.logger.info(message)

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

    def figures(self, figures: dict[str, Figure]) -> None:
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
        """Write results.json, which marks the run as finished."""
        if self.is_main:
            write_json(self.folder / "results.json", results)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        for handler in self.logger.handlers:
            handler.close()
        self.logger.handlers = []

    def _writer(self, step: int) -> SummaryWriter:
        if self.tensorboard is None:
            self.tensorboard = SummaryWriter(str(self.folder / "tb"), purge_step=step if self.resumed else None)
        return self.tensorboard


@contextmanager
def open_run(folder: str, config: str, processes: Processes, **options) -> Iterator[Run]:
    """Open a run folder and close its files on every way out. Options as in Run."""
    run = Run(folder, config, processes, **options)
    try:
        yield run
    finally:
        run.close()


def command_line() -> str:
    """The command of this process, as one would type it."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def environment() -> str:
    """Command, code version and package versions of this process, in one line."""
    try:
        state = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        state = "unknown"
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{command_line()} | code {state} | Python {platform.python_version()}, {packages}"


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
