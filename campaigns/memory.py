"""How much memory a victim more takes, and how many victims an attack can therefore take at once.

One iteration on a few victims, measured, is enough: each more takes the same, and optimizers take all they need at the
first step.
"""

import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.errors import UserError

SHARE = 0.7  # of the free memory: the rest is for work space inside operations, fragments, and whoever comes later
LARGEST = 256  # victims at once: a stopped campaign does those in work again, and small ones would fit by thousands
# Control groups of version 2, whose line in /proc/self/cgroup names no controllers, and of version 1: folder, the files
# of the limit and of the use, and the entry of memory.stat for cached files that are not in use.
CGROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class LiveStorages(TorchDispatchMode):
    """Inside the block, follows the storages that operations make: bytes alive now (`live`) and at most (`peak`).

    Storages from outside do not count, and work space that an operation takes and returns is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._meet(storage, 0)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._meet(storage, storage.nbytes())
        return result

    def _meet(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._leave, storage._cdata, size).atexit = False

    def _leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors in `tree`; wrappers of torch.func have none, and what they wrap is seen by
    itself."""
    tensors = [value for value in tree_leaves(tree) if isinstance(value, Tensor)]
    return [value.untyped_storage() for value in tensors if torch._C._has_storage(value)]


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the most memory, in bytes, that tensors made inside `function` take at one time on its device."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveStorages() as storages:
        function()
    return storages.peak


def free_bytes(device: torch.device, processes: int = 1) -> int:
    """Return the memory that this process may still take: of its GPU, or of the machine (Linux: MemAvailable, and what
    the limits of its control groups leave), of which each of `processes` has an equal part."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError as error:
        raise UserError("free memory is not known on this system: give --victims_at_once as a number") from error
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for controllers, path in groups:
        for version, (folder, limit, used, files) in CGROUPS.items():
            if version in controllers.split(","):
                group = Path(folder, path.strip("/"))
                free += [_left(place, limit, used, files) for place in (group, *group.parents)]
    return max(0, int(min(free))) // processes


def _left(group: Path, limit: str, used: str, files: str) -> float:
    """Return the bytes below the limit of one control group; infinity where it has none."""
    if not (group / limit).exists() or (most := (group / limit).read_text().strip()) == "max":
        return float("inf")
    held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(most) - int((group / used).read_text()) + int(held[files])  # cached files can be dropped


def how_many(
    iterate: Callable[[int], object], device: torch.device, most: int, *, free: int, share: float = SHARE
) -> tuple[int, str]:
    """Return (victims at once, a sentence that says why): as many as fit in `share` of the `free` bytes, from 1 to
    `most`.

    iterate(n) makes n victims and does one iteration on them. One alone is differentiated in another way than several,
    so what one more takes is the difference of three and two.
    """
    room = share * free
    one = peak_bytes(lambda: iterate(1), device)
    alone = f"1 victim at a time, {one / 1e6:.1f} MB, {free / 1e9:.1f} GB free"
    if most < 2 or 4 * one > room:
        return 1, alone
    two = peak_bytes(lambda: iterate(2), device)
    each = two - one
    if most > 2 and two + each <= room:
        each = peak_bytes(lambda: iterate(3), device) - two
    number = min(most, 2 + int((room - two) // max(1, each)))
    if number < 2:
        return 1, alone
    return number, f"{number} victims at once, {each / 1e6:.1f} MB each, {free / 1e9:.1f} GB free"
