"""A run that is asked to stop finishes its step, saves its state and goes."""

import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader


class StopSignal:
    """Inside the block, remembers that SIGTERM came; the training loop asks for it between steps."""

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopSignal":
        self.before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _receive(self, *_) -> None:
        self.received = True


class Interruptible:
    """The batches of a loader until a stop signal came; at least one. Whoever counts them must then ask the signal."""

    def __init__(self, loader: DataLoader, stop: StopSignal):
        self.loader, self.stop, self.dataset = loader, stop, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            yield batch
            if self.stop.received:
                return
