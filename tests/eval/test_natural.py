"""eval/natural.py: the outputs that compete, the order of the images, and both suites against a plain loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.options import DataOptions
from data.transforms import eval_transform
from eval.calibration import calibration, detection
from eval.natural import collect_logits, imagenet_a, imagenet_o, labelled_set, open_folder
from eval.options import SubjectOptions
from eval.subject import open_model
from models import build_model
from models.checkpoints import load_model, save_checkpoint
from utils.distributed import Processes
from utils.errors import UserError

PEERS = Processes(0, 1, torch.device("cpu"))
CLASSES = ["ant", "bee", "cow", "dog", "eel"]
DATA = DataOptions(batch_size=3, workers=0)


def write(root: Path, counts: dict[str, int], seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for label, number in counts.items():
        (root / label).mkdir(parents=True)
        for place in range(number):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{place}.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SubjectOptions:
    """Options of a small ViT that recorded the names of its five classes."""
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    network = build_model("vit", **shape)
    torch.nn.init.normal_(network.head.weight, std=2)
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_checkpoint(path, {"arguments": network.arguments, "model": network.state_dict(), "classes": CLASSES})
    return SubjectOptions(checkpoint=str(path))


def plain(model: SubjectOptions, root: Path, names: list[str], kept: list[str] | None = None) -> tuple[Tensor, Tensor]:
    """Logits of the outputs of `names`, or those `kept`, and labels among `names`, one image at a time."""
    network, transform, rows = load_model(model.checkpoint), eval_transform(16), []
    with torch.inference_mode():
        for label, name in enumerate(names):
            for path in sorted((root / name).iterdir()):
                rows.append((network(transform(Image.open(path))[None], None)[0], label))
    columns = [CLASSES.index(name) for name in kept or names]
    return torch.stack([logits for logits, _ in rows])[:, columns], torch.tensor([label for _, label in rows])


def test_imagenet_a_scores_only_the_classes_of_its_folders(model, tmp_path):
    root = write(tmp_path / "a", {"bee": 4, "dog": 3, "eel": 6}, seed=1)
    (row,) = imagenet_a(PEERS, data=replace(DATA, path=str(root)), model=model)["imagenet_a"]
    logits, labels = plain(model, root, ["bee", "dog", "eel"])
    expected = calibration(logits, labels)
    assert row == pytest.approx(expected | {"skipped": 0}, rel=1e-5)
    assert row["images"] == 13
    legacy = imagenet_a(PEERS, data=replace(DATA, path=str(root)), legacy=True, model=model)["imagenet_a"][0]
    assert legacy["rms_calibration_error"] == 0 != row["rms_calibration_error"]


def test_imagenet_o_tells_foreign_images_from_those_of_the_same_classes(model, tmp_path):
    foreign = write(tmp_path / "o", {"ant": 4, "dog": 5}, seed=2)
    known = write(tmp_path / "val", {name: 3 for name in CLASSES}, seed=3)
    lines = []
    found = imagenet_o(PEERS, data=replace(DATA, path=str(foreign)), known=str(known), log=lines.append, model=model)
    scores = [-plain(model, root, ["ant", "dog"])[0].softmax(1).max(1).values for root in (foreign, known)]
    expected = detection(*scores) | {"images": 9, "known_images": 6, "skipped": 0}
    assert found["imagenet_o"][0] == pytest.approx(expected, rel=1e-9)
    assert any(line.startswith("aupr") for line in lines)
    with pytest.raises(UserError, match="--known is missing: ImageNet's val folder"):
        imagenet_o(PEERS, data=replace(DATA, path=str(foreign)), known=None, model=model)
    (known / "dog").rename(known / "dig")
    with pytest.raises(UserError, match="class 'dog' is not in .*: did you mean 'dig'?"):
        imagenet_o(PEERS, data=replace(DATA, path=str(foreign)), known=str(known), model=model)


def test_any_labelled_set_keeps_all_outputs(model, tmp_path):
    root = write(tmp_path / "set" / "val", {"cow": 3, "bee": 4}, seed=4)
    (row,) = labelled_set(PEERS, data=replace(DATA, path=str(root.parent)), model=model)["calibration"]
    logits, labels = plain(model, root, ["bee", "cow"], CLASSES)
    assert row == pytest.approx(calibration(logits, labels + CLASSES.index("bee")) | {"skipped": 0}, rel=1e-5)


def test_images_come_in_the_order_of_the_set_however_they_are_shared_out(model, tmp_path):
    root = write(tmp_path / "a", {"bee": 4, "dog": 3}, seed=1)
    network, inputs = open_model(PEERS, model, DATA)
    whole = collect_logits(network, open_folder(root, PEERS, inputs, None), PEERS)
    parts = []

    class Half(Processes):
        """One of two processes whose peer is asked for its rows in turn."""

        def gather(self, rows: list) -> list:
            parts.extend(rows)
            return list(parts) if rows else []

    for rank in (1, 0):
        half = Half(rank, 2, torch.device("cpu"))
        object.__setattr__(half, "sum", lambda values: values)
        shared = collect_logits(network, open_folder(root, half, inputs, None), half)
    torch.testing.assert_close(shared[0], whole[0], rtol=1e-5, atol=1e-6)
    assert shared[1].equal(whole[1])
    limited = collect_logits(network, open_folder(root, PEERS, inputs, 3), PEERS)
    torch.testing.assert_close(limited[0], whole[0][[0, 2, 4]], rtol=1e-5, atol=1e-6)


def test_unreadable_images_are_counted(model, tmp_path):
    root = write(tmp_path / "a", {"bee": 2, "dog": 2}, seed=1)
    (root / "bee" / "0.png").write_bytes(b"no image")
    data = replace(DATA, path=str(root))
    with pytest.raises(UserError, match="cannot read image"):
        imagenet_a(PEERS, data=data, model=model)
    (row,) = imagenet_a(PEERS, data=replace(data, on_corrupt="skip"), model=model)["imagenet_a"]
    assert (row["images"], row["skipped"]) == (3, 1)
    assert row["skipped_files"] == [str(root / "bee" / "0.png")]
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image could be evaluated"):
        imagenet_a(PEERS, data=replace(data, on_corrupt="skip"), model=model)


def test_classes_the_model_does_not_know_are_refused(model, tmp_path):
    root = write(tmp_path / "a", {"bee": 1, "fox": 1}, seed=1)
    with pytest.raises(UserError, match="'fox' is new"):
        imagenet_a(PEERS, data=replace(DATA, path=str(root)), model=model)
    with pytest.raises(UserError, match="reads class folders, not dataset 'cifar10'"):
        imagenet_a(PEERS, data=replace(DATA, path=str(root), dataset="cifar10"), model=model)
