"""eval/accuracy.py and eval/consistency.py: what an image is shown as depends on the image and the seed alone."""

from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn

from data.loaders import Batch
from eval.accuracy import accuracy
from eval.consistency import consistency
from models.jigsaw import Jigsaw
from utils.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
NUMBER, SIDE, PATCH = 7, 16, 4


class Watcher(nn.Module):
    """A classifier that keeps what it is shown of each image; a pixel holds the image's number and its own place."""

    patch_size, hides_positions = PATCH, True

    def __init__(self):
        super().__init__()
        self.seen = defaultdict(list)

    def forward_features(self, images: Tensor, mask: Tensor | None) -> Tensor:
        for row, image in enumerate(images):
            number = int(image.max()) // SIDE**2
            if mask is not None:
                self.seen[number].append((image, mask[row]))
        return images.flatten(1)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        return tokens if pre_logits else tokens[:, :3]

    def forward(self, images: Tensor, mask: Tensor | None) -> Tensor:
        return self.forward_head(self.forward_features(images, mask))


def batches(size: int, order: list[int], unreadable: set[int]) -> list[Batch]:
    pixels = torch.arange(SIDE**2).view(1, 1, SIDE, SIDE).float()
    images = pixels + SIDE**2 * torch.arange(NUMBER).view(-1, 1, 1, 1)
    labels = torch.tensor([-1 if number in unreadable else number % 3 for number in range(NUMBER)])
    parts = [torch.tensor(order[start : start + size]) for start in range(0, len(order), size)]
    return [Batch(images[part].expand(-1, 3, -1, -1), labels[part], part, part * 0) for part in parts]


class Loader(list):
    dataset = None


def shown(score, size: int, order: list[int], unreadable: set[int] = frozenset()) -> dict[int, list]:
    """{image: its views and masks}, one per jigsaw."""

    model = Watcher()
    score(
        model, Loader(batches(size, order, unreadable)), ALONE, [Jigsaw((4, 4), ratio, seed=3) for ratio in (0.5, 1.0)]
    )
    return model.seen


@pytest.mark.parametrize("score", [accuracy, consistency])
def test_a_view_does_not_depend_on_the_company(score, monkeypatch):
    monkeypatch.setattr("eval.accuracy.name_unreadable", lambda *given: [])  # there are no files here
    alone = shown(score, 1, list(range(NUMBER)))
    assert len({tuple(views[0][1].tolist()) for views in alone.values()}) > 3  # the masks do differ between images
    for size, order, unreadable in ((3, list(range(NUMBER)), set()), (7, [4, 2, 6, 0, 1, 5, 3], {4, 0})):
        together = shown(score, size, order, unreadable)
        assert together.keys() == alone.keys() - unreadable
        for number, views in together.items():
            for (image, mask), (expected, expected_mask) in zip(views, alone[number], strict=True):
                assert image.equal(expected) and mask.equal(expected_mask), (size, number)


@pytest.mark.parametrize("score", [accuracy, consistency])
def test_sums_lie_where_the_processes_add_them(score, monkeypatch):
    """A default device that can hold no number stands for one on which the processes cannot add."""
    monkeypatch.setattr("eval.accuracy.name_unreadable", lambda *given: [])
    loader = Loader(batches(3, list(range(NUMBER)), set()))
    with torch.device("meta"):
        (row,) = score(Watcher(), loader, ALONE, [Jigsaw((4, 4), 0.0)])
    assert row["images"] == NUMBER
