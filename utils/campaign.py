"""A campaign is many victims attacked one after another: what is finished stays finished, whatever stops the run.

Every process appends a JSON line per finished image to its own file in RUN/partial and syncs it to disk. A continued
campaign reads all of them, whatever number of processes wrote them, skips what is there and shares out the rest.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from utils.distributed import Processes
from utils.errors import UserError

DIGEST = "sha256"  # of the files behind an image's row, kept with it until the results are written
POLL = 0.2  # least seconds between looks at what the other processes have finished


class Campaign:
    """Rows of finished images, kept in `folder`/partial until the results are written.

    images: names of all images; a row is a dict of plain values with its `index` among them and its name as `image`.
    files: of each image what its row rests on: the picture, leak file, sentences, the checkpoint attacked. Call it on
    every process. Raises UserError when what is there was measured on others, also on others of the same names.
    """

    def __init__(self, folder: Path, images: Sequence[str], peers: Processes, files: Sequence[Sequence[Path]] = ()):
        self.folder, self.images, self.peers = folder / "partial", list(images), peers
        self.files, self.digests, self.hashed = files, {}, {}
        self.finished = self._read()
        for index, row in self.finished.items():
            known = index < len(self.images) and row["image"] == self.images[index]
            if not known or self.digests.get(index) not in (None, self._digest(index)):
                raise UserError(
                    f"the images, or the leaks, sentences or checkpoint behind them, are not those the campaign in "
                    f"'{folder}' was started with ('{row['image']}'): restore them, or start over with --overwrite"
                )
        peers.wait()  # all share out the same rest; nobody appends before everybody has read

    def todo(self, batch_size: int | Sequence[int], together: int = 1) -> list[list[range]]:
        """Return this process's share of the unfinished batches, each as the indices of its images, `together` in a
        group. batch_size: of all batches, the last one may be smaller, or of each."""
        size = len(self.images)
        if isinstance(batch_size, int):
            batches = [range(first, min(first + batch_size, size)) for first in range(0, size, batch_size)]
        else:
            batches = [range(end - own, end) for end, own in zip(accumulate(batch_size), batch_size, strict=True)]
        rest = [batch for batch in batches if not all(index in self.finished for index in batch)]
        mine = rest[self.peers.rank :: self.peers.world_size]
        return [mine[first : first + together] for first in range(0, len(mine), together)]

    def rows(self, batch: range, scores: Sequence[dict], about: dict) -> list[dict]:
        """Return the rows of a finished batch: which image, its scores, and what is said of the whole batch."""
        return [
            {"index": index, "image": self.images[index]} | row | about
            for index, row in zip(batch, scores, strict=True)
        ]

    def add(self, rows: Sequence[dict]) -> None:
        """Keep the rows of finished images. Files that belong to them should be on disk already."""
        self.folder.mkdir(exist_ok=True)
        # A line starts with its newline, so that it is whole even after one that was torn when the run was killed.
        lines = "".join("\n" + json.dumps(row | {DIGEST: self._digest(row["index"])}) for row in rows)
        with open(self.folder / f"{self.peers.rank}.jsonl", "a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def merge(self) -> list[dict]:
        """Return, on the main process, the rows of all images in order, once every process has added its own; elsewhere
        [].

        It waits for files, not for messages: shares can take hours longer than each other, and messages time out.
        """
        if not self.peers.is_main:
            return []
        while True:
            began = time.monotonic()
            rows = self._read()
            if len(rows) >= len(self.images) or self.peers.world_size == 1:
                break
            time.sleep(max(POLL, 5 * (time.monotonic() - began)))  # thousands of rows take a while to read
        return [rows[index] for index in sorted(rows)]

    def close(self) -> None:
        """Remove the rows from the disk: the results hold them now."""
        if self.peers.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _digest(self, index: int) -> str | None:
        """Return the SHA-256 of an image's files, of several that of theirs; None where it has none, or one is gone."""
        files = list(dict.fromkeys(self.files[index])) if self.files else []
        found = [self._hash(file) for file in files]
        if not found or None in found:
            return None
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()

    def _hash(self, file: Path) -> str | None:
        """Return the SHA-256 of a file, read once: a leak file or a checkpoint stands behind many images."""
        if file not in self.hashed and file.is_file():
            self.hashed[file] = hashlib.sha256(file.read_bytes()).hexdigest()
        return self.hashed.get(file)

    def _read(self) -> dict[int, dict]:
        rows = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                    self.digests[row["index"]] = row.pop(DIGEST, None)
                    rows[row["index"]] = row
                except (json.JSONDecodeError, TypeError, KeyError):  # empty, or torn: that image is attacked again
                    continue
        return rows
