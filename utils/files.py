"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from utils.errors import UserError, no_such_path

if TYPE_CHECKING:  # takes most of a second, which runs that draw nothing should not pay
    from matplotlib.figure import Figure


TORN = re.compile(r"\..+\.\d+\.tmp")  # name of what a kill in the middle of a write leaves


def write_atomic(path: str | Path, write: Callable[[BinaryIO], None], *, sync: bool = True) -> None:
    """Call `write(file)` on a temporary file next to `path` and rename it into place once it is on disk.

    sync False: rename it without waiting for the disk, for many small files that are easily made again.

    Raises OSError naming `path` where it cannot be written, also when it is torch's archive writer that fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Give several files new contents; where one of them cannot be written, none has changed. Raises OSError."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with open(temporary[path], "wb") as file:
                file.write(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: Iterable[str] = ("*", "*/*")) -> None:
    """Remove what a kill in the middle of writing files of these names, or patterns of names, left in `folder`."""
    for name in map(PurePath, names):
        for path in folder.glob(str(name.with_name(f".{name.name}.*.tmp"))):
            if TORN.fullmatch(path.name):
                path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; bytes of file names that are not UTF-8 are escaped."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: str | Path, value) -> None:
    """Write strict JSON atomically (NaN and infinity raise ValueError: they are not JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_figure(stem: str | Path, chart: "Figure") -> None:
    """Write a figure as STEM.png, for screens, and STEM.pdf, for papers; the same figure gives the same bytes."""
    write_atomic(f"{stem}.png", lambda file: chart.savefig(file, format="png", dpi=160))
    write_atomic(f"{stem}.pdf", lambda file: chart.savefig(file, format="pdf", metadata={"CreationDate": None}))


def existing_file(path: str | Path, what: str) -> Path:
    """Return `path` as a Path; raises UserError when it is not a file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} '{path}' is not a file" if path.exists() else f"{what} {no_such_path(path)}")
    return path


def existing_folder(path: str | Path, what: str) -> Path:
    """Return `path` as a Path; raises UserError when it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{what} '{path}' is not a folder" if path.exists() else f"{what} {no_such_path(path)}")
    return path
