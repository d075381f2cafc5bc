"""Batches for training and evaluation, the same for any number of workers and processes.

Training: every image of an epoch is augmented with a seed fixed by (seed, epoch, place in the epoch), so a run resumed
in the middle of an epoch sees the same tensors. Evaluation: process r of W takes images r, r + W, ...; each once.
"""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from data.augmentation_parameters import Plan, make_plan
from data.decode import UNREADABLE
from data.folders import describe_sample, open_dataset
from data.options import AugmentOptions, DataOptions
from data.transforms import eval_transform, train_transform
from utils.distributed import Processes
from utils.errors import STOP_SIGNALS, UserError, reason
from utils.seeds import derive_seed, seed_cpu

SKIPPED = -1  # label of an image that could not be read


class Batch(NamedTuple):
    """images (B, C, H, W) normalised, or token ids (B, n) padded with 0; labels (B,) int64, or (B, attributes) of 0 and
    1, -1 where skipped; index (B,) in the dataset; skipped (B,): unreadable files passed over to fill this place. With
    a plan the images are uint8, and data.device_augment has to finish them."""

    images: Tensor
    labels: Tensor
    index: Tensor
    skipped: Tensor
    plan: Plan | None = None


class TransformedDataset(Dataset):
    """Applies `transform` and decides what an unreadable image does.

    Keys are an index, or (index, seed) to seed the augmentation. on_corrupt 'error' raises UserError naming the file.
    'skip' gives `blank` labelled -1, or in training (`replace`) the next readable one; either way it is counted.
    blank: default a black image. what: one of the data, for messages.
    """

    def __init__(
        self,
        base: Dataset,
        transform: Callable,
        on_corrupt: str = "error",
        replace: bool = False,
        blank: str | None = None,
        what: str = "image",
    ):
        self.base, self.transform, self.on_corrupt, self.replace = base, transform, on_corrupt, replace
        self.blank, self.what = blank, what
        self.label_map: list[int] | None = None  # the model output that stands for each class, where they differ
        self.named: set[str] = set()  # unreadable files that the log has named

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, key: int | tuple[int, int]) -> Batch:
        index, seed = key if isinstance(key, tuple) else (key, None)
        if seed is not None:
            seed_cpu(seed)
        for skipped in range(len(self.base) if self.replace else 1):
            place = (index + skipped) % len(self.base)
            try:
                image, label = self.base[place]
            except UNREADABLE as error:
                if self.on_corrupt == "error":
                    problem = f"cannot read {self.what} '{describe_sample(self.base, place)}' ({reason(error)})"
                    raise UserError(f"{problem}: replace it, or pass --data.on_corrupt skip") from None
                continue
            image, rest = self.transform(image), None
            if isinstance(image, tuple):  # of data.transforms.Unfinished
                image, rest = image
            return Batch(image, self.label_map[label] if self.label_map else label, place, skipped, rest)
        if self.replace:
            raise UserError(f"no readable {self.what} is left in the training set")
        blank = Image.new("RGB", (256, 256)) if self.blank is None else self.blank
        label = [SKIPPED] * len(self.base.classes) if getattr(self.base, "multi_label", False) else SKIPPED
        return Batch(self.transform(blank), label, index, 1)


def readable_rows(labels: Tensor) -> Tensor:
    """Return which images of a batch could be read, (B,) bool, from its labels."""
    return labels.flatten(1)[:, 0] >= 0 if labels.dim() > 1 else labels >= 0


def name_unreadable(
    data: TransformedDataset, places: Iterable[int], peers: Processes, log: Callable[[str], None] | None
) -> list[str]:
    """Return files at these places, on all processes together, sorted by place; the log names each once. Call it on
    every one.

    Places count around the end of the set.
    """
    found = sorted({place % len(data.base) for place in peers.gather(list(places))})
    names = [describe_sample(data.base, place) for place in found]
    for name in names:
        if log and name not in data.named:
            log(f"skipped unreadable {data.what} '{name}'")
        data.named.add(name)
    return names


class Part(Dataset):
    """`number` images of a dataset, spread evenly over it."""

    def __init__(self, base: Dataset, number: int):
        if number > len(base):
            raise UserError(f"--data.train_images {number}: the training set holds only {len(base)} images")
        self.base, self.places, self.classes = base, [i * len(base) // number for i in range(number)], base.classes
        self.multi_label = getattr(base, "multi_label", False)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int):
        return self.base[self.places[index]]

    def place_of(self, index: int) -> str:
        return describe_sample(self.base, self.places[index])


class EpochSampler(Sampler):
    """Batches of (index, seed) for one process: shuffled by (seed, epoch), optionally with repeated augmentation.

    repeats > 1 follows DeiT: each image stands `repeats` times in a row, process r takes every W-th entry, and only the
    first floor(n / 256) * 256 entries (n, when n < 256) are used. Only whole updates are kept. `start` skips the first
    steps of the epoch without loading them.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        accumulation: int = 1,
    ):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.repeats = rank, world_size, repeats
        used = length // 256 * 256 if repeats > 1 and length >= 256 else length
        self.steps = used // (batch_size * world_size * accumulation) * accumulation
        if self.steps == 0:
            raise UserError(
                f"{length} training images do not fill one global batch of {batch_size * world_size * accumulation} "
                f"({batch_size} x {world_size} processes x {accumulation} accumulated): lower --data.batch_size"
            )
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats).tolist()
        for step in range(self.start, self.steps):
            first = step * self.batch_size * self.world_size + self.rank
            places = range(first, first + self.batch_size * self.world_size, self.world_size)
            yield [(order[place], derive_seed(self.seed, "image", self.epoch, place)) for place in places]


def collate(items: list[Batch]) -> Batch:
    images, labels, index, skipped, rest = zip(*items, strict=True)
    if images[0].dim() > 1 and not images[0].is_contiguous():  # as Pillow left them: the device puts channels apart
        stacked = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    elif images[0].dim() > 1:
        stacked = torch.stack(images)
    else:
        stacked = pad_sequence(images, batch_first=True)
    plan = None if rest[0] is None else make_plan(rest)
    return Batch(stacked, torch.tensor(labels), torch.tensor(index), torch.tensor(skipped), plan)


def chosen(values: Tensor, rows: Tensor) -> Tensor:
    """Return values[rows] for (B,) bool rows; without a copy where all are wanted, which may then lie in pinned
    memory."""
    return values if rows.all() else values[rows]


class Loader(DataLoader):
    """Its workers never see a stop signal: launchers and Ctrl-C signal whole process groups, and the training loop
    saves before they go.

    Blocked before a worker starts, which inherits it, as one that blocks it itself may be hit before it gets there.
    """

    def __iter__(self) -> Iterator[Batch]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_workers() -> None:
    """Kill the workers at exit, before multiprocessing waits for workers that do not listen to stop signals."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report each of them as a crash
    for worker in multiprocessing.active_children():
        worker.kill()


def batches(dataset: Dataset, workers: int | None, device: torch.device, **order) -> DataLoader:
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    atexit.register(_kill_workers)
    return Loader(
        dataset,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=collate,
        persistent_workers=workers > 0,
        **order,
    )


def open_train(
    peers: Processes, data: DataOptions, augment: AugmentOptions, *, seed: int, accumulation: int
) -> DataLoader:
    """Open the training split in batches; `batch_sampler` is an EpochSampler. Image size and scale of `data` are known.

    seed: of the order and the augmentation. accumulation: batches of an update, of which only whole ones are kept.
    """
    base = _open_split(peers, data, "train")
    base = base if data.train_images is None else Part(base, data.train_images)
    scale = {"mean": data.mean, "std": data.std}
    transform = train_transform(data.image_size, augment, **scale, interpolation=data.interpolation)
    share = {"rank": peers.rank, "world_size": peers.world_size}
    sampler = EpochSampler(
        len(base), data.batch_size, seed, **share, repeats=augment.repeats, accumulation=accumulation
    )
    dataset = TransformedDataset(base, transform, data.on_corrupt, replace=True)
    return batches(dataset, data.workers, peers.device, batch_sampler=sampler)


def open_eval(
    peers: Processes, data: DataOptions, *, recipe: dict | None = None, limit: int | None = None
) -> DataLoader:
    """Open this process's share of the validation split in batches; nothing is padded, so sums count every image once.

    Image size and scale of `data` are known. recipe: of timm's transform, see `eval_transform`. limit: use that many
    images, spread evenly over the set.
    """
    base = _open_split(peers, data, "val")
    return batches_of_share(base, evaluated_as(data, recipe), peers, data, limit)


def _open_split(peers: Processes, data: DataOptions, split: str) -> Dataset:
    with peers.main_first() if data.download else nullcontext():
        return open_dataset(data.dataset, data.path, split, download=data.download, classes=data.classes)


def evaluated_as(data: DataOptions, recipe: dict | None) -> Callable:
    """Return the transform of images under evaluation."""
    scale = {"mean": data.mean, "std": data.std}
    how = {"crop": data.crop, "recipe": recipe, "interpolation": data.interpolation}
    return eval_transform(data.image_size, **scale, **how)


def batches_of_share(
    base: Dataset, transform: Callable, peers: Processes, data: DataOptions, limit: int | None, **how
) -> DataLoader:
    """Return batches of this process's share of `base`, or of `limit` of it, spread evenly. how: options of
    TransformedDataset."""
    used = min(len(base), limit or len(base))
    share = [place * len(base) // used for place in range(peers.rank, used, peers.world_size)]
    dataset = TransformedDataset(base, transform, data.on_corrupt, **how)
    return batches(dataset, data.workers, peers.device, sampler=share, batch_size=data.batch_size)
