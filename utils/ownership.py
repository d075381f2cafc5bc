"""Which files in a folder a run of ours has written. No other file is ever changed, moved or removed.

`run.json` marks a folder as that of a run, and lists the files as paths or patterns inside it ('tb/events.*'). It is
written before any of them. Folders from before there was a mark are known by what environment.json or config.yaml say,
and their files by name.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import yaml

from utils.errors import UserError
from utils.files import TORN

MARK = "run.json"
BASE = (MARK, "config.yaml", "environment.json", "log.txt", "results.json")  # of every run
CURVES = ("metrics.jsonl", "tb/events.out.tfevents.*")
PICTURES = tuple(f"{kind}/[0-9][0-9][0-9][0-9]*_*.png" for kind in ("originals", "inputs", "reconstructions"))
TRAINED = ("last.pt", "best.pt", *CURVES)
REPORT = ("partial/*.jsonl", "per_image.csv", "report.html")
UNMARKED = (  # what runs wrote before there was a mark
    *BASE, *TRAINED, *PICTURES, *REPORT, "policies.json", "audit.html", "sentences.json",
)  # fmt: skip
EARLIER = ".replaced"  # where the run that --overwrite replaces waits until the new one has something to keep
MOVING = ".replacing"  # the same while it is only partly there
LITTER = (  # what systems, and people who keep empty folders, put into a folder
    ".DS_Store", "._*", ".localized", "Thumbs.db", "desktop.ini", ".directory", "lost+found", ".nfs*", ".snapshot",
    ".Trash-*", "@eaDir", ".gitkeep", ".gitignore", ".keep", EARLIER, MOVING,
)  # fmt: skip


def listed(folder: Path) -> list[str] | None:
    """Return the paths and patterns of what the run in `folder` writes; None where the folder holds no run of ours."""
    if (mark := read_mapping(folder / MARK)) is not None and isinstance(mark.get("files"), list):
        return [MARK, *filter(_inside, mark["files"])]
    if not _unmarked_run(folder):
        return None
    pairs = [path.with_suffix("") for path in folder.glob("figures/*.png") if path.with_suffix(".pdf").is_file()]
    return [*UNMARKED, *(_literal(f"figures/{pair.name}{end}") for pair in pairs for end in (".png", ".pdf"))]


def read_mapping(path: Path) -> dict | None:
    """Return what a JSON or YAML file holds; None where it is no mapping, or cannot be read."""
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def mark(folder: Path, files: Iterable[str]) -> tuple[Path, str]:
    """Return path and content of the mark of a run that writes `files`, paths or patterns inside `folder`."""
    about = "a run of this project; --overwrite removes the files that are listed here, and no others"
    return folder / MARK, json.dumps({"about": about, "files": list(dict.fromkeys(files))}, indent=1) + "\n"


def own_files(folder: Path, patterns: Iterable[str] | None = None) -> list[Path]:
    """Return the files in `folder` that its run has written, or that match `patterns`; nothing behind links."""
    found = dict.fromkeys(
        path
        for pattern in (listed(folder) or () if patterns is None else patterns)
        for path in sorted(folder.glob(pattern))
        if (path.is_symlink() or path.is_file()) and (path.parent == folder or not path.parent.is_symlink())
    )
    return sorted(found, key=lambda path: path == folder / MARK)  # the mark last: until then the others are known


def foreign(folder: Path, known: Sequence[str] = ()) -> Path | None:
    """Return something in a folder without a run that is neither litter, nor `known` (patterns of names), nor a
    sub-folder that holds runs only; None where a run may begin."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in (*LITTER, *known)):
                continue
            path = folder / entry.name
            is_run = entry.is_dir(follow_symlinks=False) and (listed(path) is not None or not foreign(path))
            if not is_run and not TORN.fullmatch(entry.name):
                return path
    return None


def refuse_foreign(folder: Path, known: Sequence[str] = (), what: str = "no run") -> None:
    """Raise UserError where `folder` holds what no run of ours and no earlier call has written.

    known: patterns of the names that the caller writes itself.
    """
    refuse_no_folder(folder)
    if folder.is_dir() and listed(folder) is None and (path := foreign(folder, known)):
        raise UserError(
            f"output folder '{folder}' holds '{path.name}' and {what}: choose another, which is new or empty"
        )


def refuse_no_folder(folder: Path) -> None:
    """Raise UserError where no folder can be made, as it or what it is to lie in is a file, or a link to nothing."""
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists():
            raise UserError(f"output folder '{folder}': '{path}' is a file: choose another folder")
        if path.is_symlink():
            raise UserError(
                f"output folder '{folder}': '{path}' is a link to '{os.readlink(path)}', which does not exist: make "
                f"that folder, or choose another"
            )


def figure_files(name: str) -> Iterator[str]:
    """Yield the patterns of a figure's files, see utils.files.write_figure."""
    for end in (".png", ".pdf"):
        yield _literal(f"figures/{name}{end}")


def refuse_others(folder: Path, own: Sequence[str], of: str) -> None:
    """Raise UserError where `folder` holds anything that neither is a folder of runs nor made with what `of` makes.

    own: patterns of the names that it writes beside its runs; they count once one of them is a folder, or a run is
    there, as files of such names may be anybody's.
    """
    refuse_no_folder(folder)
    if not folder.is_dir():
        return
    path = folder / MARK if listed(folder) is not None else foreign(folder, own)
    begun = any(entry.is_dir() for entry in folder.iterdir() if entry.name not in LITTER)
    path = path or (None if begun else foreign(folder))
    if path:
        raise UserError(f"output folder '{folder}' holds '{path.name}', which {of} did not write: choose another")


def earlier_rows(file: Path, field: str) -> list[dict]:
    """Return the rows, {"images": [...]}, that a stopped run of a study has written; none where there is no file.

    Raises UserError for a file that is no such study's: every row of its has `field`.
    """
    if not file.exists():
        return []
    rows = (read_mapping(file) or {}).get("images")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and field in row for row in rows):
        raise UserError(f"'{file}' was not written by this script, which would replace it: choose another --output")
    return rows


def set_aside(folder: Path) -> None:
    """Move the run that is in `folder` out of the way. Killed at any moment, `put_back` returns it whole."""
    put_back(folder, keep_new=True)
    if files := own_files(folder):
        _move(folder, folder / MOVING, files)
        os.replace(folder / MOVING, folder / EARLIER)


def put_back(folder: Path, keep_new: bool = False) -> None:
    """Return the run that was set aside to its place; what the one after it wrote goes. Nothing to do without one.

    keep_new: that one has something worth keeping, so it stays, and the earlier one goes.
    """
    if is_set_aside(folder) and keep_new:
        for path in _files_below(folder / EARLIER):
            path.unlink()
        _remove_empty(folder / EARLIER)
    elif is_set_aside(folder):
        remove_own(folder)
        os.replace(folder / EARLIER, folder / MOVING)
    if (folder / MOVING).is_dir():  # killed while it was set aside or put back: there is no other run
        _move(folder / MOVING, folder, _files_below(folder / MOVING))
        _remove_empty(folder / MOVING)


def is_set_aside(folder: Path) -> bool:
    """Return whether an earlier run waits for the one in `folder` to have something to keep."""
    return (folder / EARLIER).is_dir()


def remove_own(folder: Path, patterns: Iterable[str] | None = None) -> None:
    """Remove the files of `own_files`, and the sub-folders that are empty then."""
    for path in own_files(folder, patterns):
        path.unlink(missing_ok=True)
        if path.parent != folder:
            with suppress(OSError):
                path.parent.rmdir()


def _move(source: Path, target: Path, files: Sequence[Path]) -> None:
    for path in files:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
        if path.parent != source:
            with suppress(OSError):
                path.parent.rmdir()


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those below it that hold nothing."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir()
    folder.rmdir()


def _unmarked_run(folder: Path) -> bool:
    about = read_mapping(folder / "environment.json") or {}
    if {"command", "code", "packages", "machine"} <= about.keys():
        return True
    config = read_mapping(folder / "config.yaml") or {}
    begun = any((folder / name).exists() for name in ("results.json", "log.txt", "last.pt", "partial"))
    return begun and {"output", "seed", "device", "overwrite"} <= config.keys()


def _inside(pattern: object) -> bool:
    """Return whether a pattern of a mark, which may be a stranger's, stays inside the folder and reaches one level
    down."""
    if not isinstance(pattern, str) or not pattern:
        return False
    path = PurePosixPath(pattern)
    return not path.is_absolute() and len(path.parts) <= 2 and not {"..", "**"} & {*path.parts}


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
