"""A run that is asked to stop finishes its step, saves its state and goes."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from utils.errors import on_stop_signals

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class StopSignal:
    """Inside the block, remembers which stop signal came (0: none); the training loop asks for it between steps."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "StopSignal":
        self.stack = ExitStack()
        self.stack.enter_context(on_stop_signals(self._receive))
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def _receive(self, number: int) -> None:
        self.received = number


class Interruptible:
    """The batches of a loader until a stop signal came; at least one. Whoever counts them must then ask the signal."""

    def __init__(self, loader: "DataLoader", stop: StopSignal):
        self.loader, self.stop, self.dataset = loader, stop, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            yield batch
            if self.stop.received:
                return
