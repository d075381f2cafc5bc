"""One image file as RGB, and how folders are searched for them: what strangers' files may do is decided here.

Only regular files are opened (a pipe would be waited for). Grey, palette, CMYK and transparent images become RGB as
Pillow converts them, 16-bit ones keep their upper 8 bits, animations give their first frame, and orientation tags are
not applied, as in torchvision. What Pillow refuses (truncated, empty, above 178 million pixels) is unreadable, and the
caller names it.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError

# What systems and programs leave in folders of images, beside names that start with a dot (macOS, Jupyter, Synology).
LITTER = frozenset({"__MACOSX", "@eaDir", "@tmp", "#recycle", "#snapshot", "lost+found", "$RECYCLE.BIN",
                    "System Volume Information", "Thumbs.db", "ehthumbs.db", "desktop.ini"})  # fmt: skip
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_rgb(path: str | Path) -> Image.Image:
    """Return the first frame of an image file in 8-bit RGB. Raises one of UNREADABLE."""
    with open_image(path) as image:
        return to_rgb(image)


def open_image(path: str | Path) -> Image.Image:
    """Return Pillow's image of a regular file, not read yet. Raises one of UNREADABLE."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return Image.open(path)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture in 8-bit RGB. Pillow alone would clip 16-bit values at 255, which makes such pictures
    white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError("values beyond 16 bits")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels: convert it to 8 or 16 bits")
    if image.mode == "RGB":
        image.load()  # and no copy: it lives on without its file
        return image
    return image.convert("RGB")


def is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one; a link to itself is neither and no error yet."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_litter(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or left by a system, and so no image and no class."""
    return (name.startswith(".") and name not in (".", "..")) or name in LITTER


def in_words(litter: Sequence[str], root: str | Path) -> str:
    """Return a sentence about the hidden files and folders below `root` that were passed over."""
    some = ", ".join(f"'{os.path.basename(path)}'" for path in litter[:3]) + (", ..." if len(litter) > 3 else "")
    return f"passed over {len(litter)} hidden or system files and folders in '{root}' ({some})"


def image_files(root: str | Path, litter: list[str] | None = None) -> list[str]:
    """Return the paths of everything below `root`, links followed, whose name says image, broken links too: they are
    named when they are read. Folder by folder, each sorted. What `is_litter` says is passed over, and appended to
    `litter`. Raises UserError for links that lead into a circle, which would count images twice, and for folders that
    cannot be listed.
    """
    found: list[tuple[str, list[str]]] = []

    def search(folder: str, above: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            raise UserError(f"'{folder}' is a link into a folder it lies in: remove the link")
        try:
            listed = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder '{folder}' cannot be listed ({error.strerror}): fix or remove it") from error
        entries = [entry for entry in listed if not is_litter(entry.name)]
        if litter is not None and len(entries) < len(listed):
            litter.extend(entry.path for entry in listed if is_litter(entry.name))
        folders = [entry for entry in entries if is_folder(entry)]
        others = entries if not folders else [entry for entry in entries if not is_folder(entry)]
        found.append((folder, [entry.path for entry in others if entry.name.lower().endswith(IMG_EXTENSIONS)]))
        for entry in folders:
            search(entry.path, (*above, real))

    search(str(root), ())
    return [path for _, names in sorted(found) for path in names]
