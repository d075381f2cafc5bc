"""One process or many: the same calls work plain, under torchrun, on GPUs (nccl) and on CPUs (gloo)."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.errors import AlreadyFinished, UserError


@dataclass(frozen=True)
class Processes:
    """This process among its peers. `rank` counts from 0 to `world_size` - 1; rank 0 writes the files."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the elementwise sum of `values` over all processes, on every process. Sums and counts only, never
        means."""
        if self.world_size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the tensors of rank 0, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Return True on every process if `flag` is true on at least one."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def gather(self, rows: list) -> list:
        """Return the concatenation over ranks of every process's picklable rows, on every process."""
        if self.world_size == 1:
            return rows
        parts: list = [None] * self.world_size
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 alone, then on the others: downloads happen once."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def timed(self, function: Callable, *arguments) -> tuple:
        """Return (function(*arguments), seconds it took on this process's device, which is idle before and after)."""
        self._synchronize()
        began = time.perf_counter()
        result = function(*arguments)
        self._synchronize()
        return result, time.perf_counter() - began

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Block until every process is here."""
        if self.world_size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return 'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:i'. Raises UserError for anything not at hand."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:i, got '{name}'")
    if kind == "cpu":
        return torch.device("cpu")
    position = int(index) if index else local_rank
    if position >= torch.cuda.device_count():
        raise UserError(f"--device {name}: GPU {position} is not there ({torch.cuda.device_count()} found); use cpu")
    return torch.device("cuda", position)


def number_of_processes() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes torchrun started (or stand alone) and leave them in order at the end, which AlreadyFinished
    inside the block brings about."""
    world_size, local_rank = number_of_processes(), int(os.environ.get("LOCAL_RANK", 0))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(int(os.environ.get("RANK", 0)), world_size, chosen)
    except AlreadyFinished:
        pass
    finally:
        if world_size > 1:
            dist.destroy_process_group()
