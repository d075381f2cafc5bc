"""One, two and three processes give the same: real torchrun, one launch per number, all scripts in turn (worlds.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.reviews import write_reviews
from tests.scripts.conftest import ROOT, TINY
from tests.scripts.worlds import run_jobs

PUZZLE = ["--min_block", 2, "--max_block", 8]
VIT = ["--model", "vit", "--model_options.embed_dim", 48, "--model_options.depth", 2, "--model_options.num_heads", 3]
LENET = ["--model", "lenet", "--model_options.num_classes", 10, "--image_size", 32, "--dtype", "float64"]
# With a checkpoint after every step.
LONG = [*TINY, "--data.batch_size", 4, "--optim.epochs", 10, "--optim.mixup", 0.8]
LONG += ["--optim.ema", 0.9, "--model.drop_path", 0.1, "--log.checkpoint_minutes", 1e-9]
SEARCH = ["--policies", "3-1-7,43-18-18,0,39", "--samples", 1, "--draws", 2, "--batch", 4, "--batches", 2]


def jobs(processes: int, folder: Path, trained: Path, images: Path, spoilt: Path, reviews: Path) -> dict[str, list]:
    """Command lines by the name of their run folder below `folder`."""
    subject = ["--checkpoint", trained / "last.pt", "--device", "cpu"]
    scored = [*subject, "--data.path", spoilt, "--data.on_corrupt", "skip", "--data.workers", 0, "--data.batch_size", 4]
    scored += [*PUZZLE, "--mask_ratios", "0,0.5,0.9", "--seeds", 2]
    private = ["--images", images / "val", "--device", "cpu"]
    vit = [*VIT, "--model_options.patch_size", 8, "--image_size", 32, *PUZZLE, "--mask_ratio", 0.3, "--num_images", 5]
    matching = ["--attack", "inverting_gradients", "--attack_options.iterations", 4, "--attack_options.signed", "none"]
    words = ["--data.kind", "text", "--data.path", reviews, "--model", "text_small", "--model_options.embed_dim", 48]
    words += ["--attack", "token_rows", "--mask_ratio", 0.5, "--num_images", 3, "--device", "cpu"]
    # A global batch of 6. Every process draws dropout and mixtures for itself, so they are off; so is it by default.
    share = ["--data.batch_size", 6 // processes, "--jigsaw.per_sample", "true", "--data.path", images]
    found = {
        "eval": ["eval.py", *scored],
        "consistency": ["consistency.py", *scored],
        "closed form": ["attack.py", *vit, *private, "--defense", "noise"],
        "together": ["attack.py", *LENET, *matching, *private, "--num_images", 4, "--victims_at_once", 2],
        "sentences": ["attack.py", *words],
        "search": ["defenses.ats.search", *SEARCH, "--threshold", -1000000, *subject, "--data", images],
        "training": ["train.py", *TINY, *share],
    }
    half = ["--data.batch_size", 3 // processes, "--optim.accumulation", 2]  # twice 3 images, which 2 cannot share
    private = ["--defense", "dp_sgd", "--defense_options.clip", 0.5, "--optim.lr", 0.01, "--data.path", images]
    found["private"] = ["train.py", *TINY, *share, *private]
    found["noisy"] = ["train.py", *TINY, *share, "--defense", "noise", "--defense_options.std", 0.01]
    if processes != 2:
        found["private accumulated"] = ["train.py", *TINY, *private, *half]
    if processes == 2:
        found["straight"] = ["train.py", *LONG, "--data.path", images]
    return {name: [*map(str, options), "--output", str(folder / name)] for name, options in found.items()}


@pytest.fixture(scope="module")
def worlds(once, trained, images, tmp_path_factory) -> dict[int, Path]:
    """The folders of all runs by the number of processes; every one counts to the same 16 of 17 images."""

    def make(folder: Path) -> None:
        shutil.copytree(images, folder / "spoilt")
        (folder / "spoilt" / "val" / "class_0" / "00.jpg").write_bytes(b"no image")
        write_reviews(folder / "reviews", 48, 12)
        running = []
        for number in (3, 2, 1):
            own = jobs(number, folder / str(number), trained, images, folder / "spoilt", folder / "reviews")
            (folder / f"{number}.json").write_text(json.dumps(list(own.values())))
            if number == 1:
                run_jobs(folder / "1.json")
                continue
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
            command += ["tests/scripts/worlds.py", str(folder / f"{number}.json")]
            with open(folder / f"{number}.txt", "w") as log:
                streams = {"stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
                running.append(subprocess.Popen(command, cwd=ROOT, **streams))
        statuses = [process.wait() for process in running]
        assert statuses == [0, 0], "\n".join((folder / f"{number}.txt").read_text() for number in (2, 3))

    folder = once("worlds", make)
    return {number: folder / str(number) for number in (1, 2, 3)}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name, key", [("eval", "accuracy"), ("consistency", "consistency")])
def test_scores(worlds, name, key):
    one, *others = (results(worlds[number] / name)[key] for number in worlds)
    assert [row["mask_ratio"] for row in one] == [0, 0.5, 0.9]
    spoilt = [str(worlds[1].parent / "spoilt" / "val" / "class_0" / "00.jpg")]
    for rows in (one, *others):
        for row, first in zip(rows, one, strict=True):
            assert (row["images"], row["seeds"], row["skipped"]) == (16, 2, 1)
            assert row.pop("skipped_files", spoilt) == spoilt
            assert row == pytest.approx(first, rel=1e-6, abs=1e-6)  # losses and features are float32 of other batches
            shares = ("acc1", "acc5", "consistency")
            assert [row[key] for key in shares if key in row] == [first[key] for key in shares if key in first]
    assert f"skipped unreadable image '{spoilt[0]}'" in (worlds[3] / name / "log.txt").read_text()


@pytest.mark.parametrize("name", ["closed form", "sentences"])
def test_reconstructions_bit_for_bit(worlds, name):
    one, *others = (results(worlds[number] / name)["per_image"] for number in worlds)
    for other in others:
        for row, same in zip(one, other, strict=True):
            del same["seconds"]
            assert str({key: value for key, value in row.items() if key != "seconds"}) == str(same)  # NaN equals NaN


def test_vectorised_reconstructions_up_to_rounding(worlds):
    """Pairs of two on one process, other pairs on two, and single ones on three."""
    one, *others = (results(worlds[number] / "together")["per_image"] for number in worlds)
    for other in others:
        assert [row["mse"] for row in other] == pytest.approx([row["mse"] for row in one], rel=1e-9)


def test_policies(worlds):
    one, *others = (json.loads((worlds[number] / "search" / "policies.json").read_text()) for number in worlds)
    assert len(one["policies"]) == 4 and one == others[0] == others[1]


@pytest.mark.parametrize("name", ["training", "noisy", "private", "private accumulated"])
def test_training_up_to_rounding(worlds, name):
    """The same global batch of 6 as 1 x 6, 2 x 3 and 3 x 2, or in two halves as 1 x 3 and 3 x 1. Replicas that were
    noised each on its own, or more than once, would end elsewhere."""
    files = [worlds[number] / name / "last.pt" for number in worlds if "accumulated" not in name or number != 2]
    one, *others = (torch.load(file, weights_only=True) for file in files)
    for other in others:
        assert other["epoch"] == one["epoch"] == 3 and other["privacy"] == one["privacy"]
        assert one["privacy"]["history"] == [[1.0 if "private" in name else 0.0, 6 / 24, 12]]
        for key, value in one["model"].items():
            torch.testing.assert_close(other["model"][key], value, rtol=1e-4, atol=2e-5)
    assert {results(worlds[number] / "training")["images"] for number in worlds} == {17}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the second process")
def test_torchrun_restarts_after_the_death_of_one_process_and_the_end_is_the_same_bit_for_bit(worlds, images, tmp_path):
    """train.sh, one of whose two processes is killed inside an epoch."""
    run, options = tmp_path / "run", [*map(str, LONG)]
    variables = {"GPUS": "2", "RESTARTS": "1", "DATA": str(images), "OUT": str(run), "PYTHON": sys.executable}
    with open(tmp_path / "log.txt", "w") as log:
        streams = {"stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"} | variables}
        running = subprocess.Popen(["./train.sh", *options], cwd=ROOT, **streams)
        while not (run / "last.pt").exists():
            assert running.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        status = running.wait(timeout=240)
    said = (tmp_path / "log.txt").read_text()
    assert status == 0 and "resuming at epoch" in said, said
    straight, broken = (torch.load(folder / "last.pt", weights_only=True) for folder in (worlds[2] / "straight", run))
    for part in ("model", "model_ema"):
        assert [key for key, value in straight[part].items() if not torch.equal(broken[part][key], value)] == []
    one, other = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (worlds[2] / "straight", run)
    )
    assert [row["train/loss"] for row in one] == [row["train/loss"] for row in other] and len(one) == 10
