"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from utils.errors import UserError

if TYPE_CHECKING:  # takes most of a second, which runs that draw nothing should not pay
    from matplotlib.figure import Figure


def write_atomic(path: str | Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write(file)` on a temporary file next to `path` and rename it into place once it is on disk.

    Raises OSError naming `path` where it cannot be written, also when it is torch's archive writer that fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
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


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill in the middle of `write_atomic` left in `folder` and in the folders right below it."""
    for pattern in (".*.tmp", "*/.*.tmp"):
        for path in folder.glob(pattern):
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
    """`path` as a Path; raises UserError when it is not a file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{what} '{path}' {'is not a file' if path.exists() else 'does not exist'}")
    return path


def existing_folder(path: str | Path, what: str) -> Path:
    """`path` as a Path; raises UserError when it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{what} '{path}' {'is not a folder' if path.exists() else 'does not exist'}")
    return path
