"""Samplers and loaders: every image exactly once, the same tensors for any number of workers and processes."""

import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from data.loaders import EpochSampler, TransformedDataset, open_eval, open_train
from data.options import AugmentOptions, DataOptions
from data.transforms import eval_transform, train_transform
from utils.distributed import Processes
from utils.errors import UserError
from utils.seeds import seed_cpu

CPU = torch.device("cpu")


class Noise(Dataset):
    """Random pictures, the same each time."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 44, 3), dtype=np.uint8)
        return Image.fromarray(pixels), index % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 9), ("val", 7)):
        for label in range(2):
            target = root / split / str(label)
            target.mkdir(parents=True)
            for number in range(count):
                picture, _ = Noise()[number + 10 * label]
                picture.save(target / f"{number}.png")
    return root


def options(folder, **changes) -> DataOptions:
    known = {
        "path": str(folder),
        "image_size": 32,
        "batch_size": 4,
        "workers": 0,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    return DataOptions(**known | changes)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_together_see_one_global_batch(world_size):
    whole = EpochSampler(30, 12, seed=3)
    parts = [EpochSampler(30, 12 // world_size, 3, rank, world_size) for rank in range(world_size)]
    for sampler in [whole, *parts]:
        sampler.set_epoch(5)
    for together, *shares in zip(whole, *parts, strict=True):
        assert sorted(together) == sorted(key for share in shares for key in share)


def test_epoch_shuffles_anew_and_start_skips():
    sampler = EpochSampler(20, 4, seed=0)
    epochs = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert sorted(index for batch in epochs[0] for index, _ in batch) == list(range(20))
    assert epochs[0] != epochs[1]
    sampler.set_epoch(1, start=3)
    assert len(sampler) == 2 and list(sampler) == epochs[1][3:]


TAKES_NOTHING = pytest.mark.skipif(len(RepeatAugSampler(range(100), 1, 0)) == 0, reason="timm 1.0.26 takes no image")


@pytest.mark.parametrize("length", [pytest.param(100, marks=TAKES_NOTHING), 256, 700])
@pytest.mark.parametrize("world_size", [1, 2])
def test_repeated_augmentation_takes_what_timm_takes(length, world_size):
    """Same share of the data and same repeats; the order differs, since ours is drawn from (seed, epoch)."""
    ours = [EpochSampler(length, 5, 0, rank, world_size, repeats=3) for rank in range(world_size)]
    theirs = [RepeatAugSampler(range(length), world_size, rank) for rank in range(world_size)]
    counts = [[index for batch in sampler for index, _ in batch] for sampler in ours]
    assert all(0 <= len(one) - len(mine) < 5 for one, mine in zip(theirs, counts, strict=True))
    together = [entry for entries in zip(*counts, strict=True) for entry in entries]
    assert all(len(set(together[i : i + 3])) == 1 for i in range(0, len(together) - 2, 3))
    seeds = [seed for batch in ours[0] for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_augmentation_depends_on_the_key_only():
    data = TransformedDataset(Noise(), train_transform(32))
    first = data[(3, 77)].images
    torch.rand(5)
    assert torch.equal(data[(3, 77)].images, first)
    assert not torch.equal(data[(3, 78)].images, first)


@pytest.mark.parametrize("where", ["loader", "split", "device"])
def test_workers_and_a_later_start_change_nothing(folder, where):
    augment = {"crop": "resized", "scale": (0.3, 1.0), "flip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}
    augment |= {"color_jitter": 0.4, "erasing": 0.5, "where": where, "repeats": 1}
    batches = []
    for workers in (0, 2):
        data = options(folder, workers=workers)
        loader = open_train(Processes(0, 1, CPU), data, AugmentOptions(**augment), seed=1, accumulation=1)
        loader.batch_sampler.set_epoch(0, start=workers)
        batches.append([[*batch[:4], *(batch.plan or ())] for batch in loader])
    for one, other in zip(batches[0][2:], batches[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(one) == (4 if where == "loader" else 8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_counts_each_image_once(folder, world_size):
    seen = []
    for rank in range(world_size):
        for batch in open_eval(Processes(rank, world_size, CPU), options(folder)):
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(14))


def test_limit_counts_over_all_processes(folder):
    loaders = [open_eval(Processes(rank, 2, CPU), options(folder), limit=5) for rank in range(2)]
    assert sorted(index for loader in loaders for batch in loader for index in batch.index.tolist()) == [0, 2, 5, 8, 11]


def test_loader_workers_may_be_started_by_any_method():
    data = TransformedDataset(Noise(), train_transform(32))
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[(1, 5)].images, data[(1, 5)].images)


def test_a_stop_signal_at_any_moment_leaves_workers_at_work(folder):
    """They are signalled as soon as they are there, long before they could have said that they do not listen."""
    loader = open_eval(Processes(0, 1, CPU), options(folder, workers=2, batch_size=1))
    batches = iter(loader)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert len([*batches]) == 14
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])  # this process does listen


def test_too_large_a_batch_is_refused():
    with pytest.raises(UserError, match="do not fill one global batch of 24"):
        EpochSampler(20, 6, 0, 0, 2, accumulation=2)


def test_rand_augment_survives_the_newest_pillow():
    """timm's PosterizeIncreasing asks for 0 bits now and then; Pillow 13 refuses that."""
    data = TransformedDataset(
        Noise(), train_transform(32, AugmentOptions(rand_augment="rand-m10-mstd1.5-inc1", erasing=0))
    )
    posterize = [op for op in data.transform.transforms[2].ops if op.name == "PosterizeIncreasing"]
    assert posterize, "the policy under test no longer posterizes"
    image, _ = Noise()[0]
    assert np.asarray(posterize[0].aug_fn(image, 0)).max() > 0
    for seed in range(600):
        data[(seed % 10, seed)]


def test_eval_transform_resizes_and_crops_like_deit():
    wide = Image.new("RGB", (512, 256))
    wide.paste((255, 255, 255), (256 - 112, 0, 256 + 112, 256))
    assert eval_transform(224, mean=(0.0,) * 3, std=(1.0,) * 3)(wide).min() == 1
    assert eval_transform(224, mean=(0.0,) * 3, std=(1.0,) * 3, crop=False)(wide).min() == 0


def test_interpolation_is_that_of_both_transforms():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    unit = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
        "lanczos": Image.Resampling.LANCZOS,
    }
    for name, chosen in (filters | {"random": Image.Resampling.BILINEAR, None: Image.Resampling.BICUBIC}).items():
        straight = eval_transform(32, crop=False, interpolation=name, **unit)(image)
        assert straight.equal(to_tensor(image.resize((32, 32), chosen))), name
    crop = train_transform(48, interpolation="random").transforms[0]
    assert isinstance(crop.interpolation, tuple)
    padded = train_transform(32, interpolation="lanczos", **unit).transforms[0].transforms[0]
    assert padded.interpolation.value == "lanczos"
    recipe = {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    own, said = (eval_transform(32, recipe=recipe, interpolation=name).transforms[0] for name in (None, "bilinear"))
    assert (own.interpolation.value, said.interpolation.value) == ("bicubic", "bilinear")


def test_erasing_has_a_kind_and_a_number():
    erasing = train_transform(48, AugmentOptions(erasing=1.0, erasing_mode="const", erasing_count=3)).transforms[-1]
    white = torch.ones(3, 48, 48)
    seed_cpu(0)
    shares = [float((erasing(white.clone()) == 0).float().mean()) for _ in range(50)]
    assert min(shares) > 0 and max(shares) < 0.5 and (erasing.min_count, erasing.max_count) == (1, 3)
    assert train_transform(48, AugmentOptions(erasing_mode="rand")).transforms[-1].rand_color
    for where, options in (("split", {"erasing_count": 2}), ("device", {"erasing_mode": "const"})):
        with pytest.raises(UserError, match="set --augment.where loader"):
            train_transform(48, AugmentOptions(where=where, **options))
    with pytest.raises(UserError, match="is bicubic"):
        train_transform(48, AugmentOptions(where="device"), interpolation="bilinear")
