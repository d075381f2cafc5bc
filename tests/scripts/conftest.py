"""Fixtures of the script tests: small folders of real JPEGs, and the entry scripts as a user calls them."""

import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.scripts.fork import Fork
from train import main as train
from utils.errors import run_command

ROOT = Path(__file__).parents[2]
# A ViT of 3,000 parameters on 32 x 32 images, 16 patches: seconds to train, all the machinery in use.
TINY = shlex.split(
    "--data.image_size 32 --data.batch_size 6 --data.workers 0 --augment.repeats 1 --optim.mixup 0 --optim.cutmix 0 "
    "--model.name vit --model.patch_size 8 --model.embed_dim 24 --model.depth 1 --model.num_heads 2 "
    "--model.unknown true --model.localization nonlinear --optim.epochs 3 --optim.warmup_epochs 1 --optim.lr 0.1 "
    "--jigsaw.mask_ratio 0.5 --jigsaw.start_epoch 1 --jigsaw.min_block 2 --jigsaw.max_block 8 --device cpu"
)


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


def write_images(folder: Path, classes: int, per_class: int, seed: int) -> None:
    """Noisy JPEGs of varying size in which the class decides where a bright block stands."""
    rng = np.random.default_rng(seed)
    for label in range(classes):
        target = folder / f"class_{label}"
        target.mkdir(parents=True)
        for number in range(per_class):
            height, width = rng.integers(36, 48, 2)
            pixels = rng.integers(0, 90, (height, width, 3))
            top, left = (label // 2) * height // 2, (label % 2) * width // 2
            pixels[top : top + height // 2, left : left + width // 2] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(target / f"{number:02d}.jpg", quality=95)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An image folder: 4 classes, 24 training images, 17 validation images (no number of processes divides them)."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 4, 6, seed=0)
    write_images(folder / "val", 4, 5, seed=1)
    for name in ("class_0/04.jpg", "class_1/04.jpg", "class_2/04.jpg"):
        (folder / "val" / name).unlink()
    return folder


@pytest.fixture
def call(capsys, monkeypatch) -> Callable[..., Outcome]:
    """call('train.py', '--output', ...) runs an entry script in this process as the command line would."""
    monkeypatch.chdir(ROOT)

    def run(script: str, *arguments) -> Outcome:
        argv = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [script, *argv])
        main, status = runpy.run_path(str(ROOT / script), run_name="script_under_test")["main"], 0
        try:
            run_command(lambda: main(argv))
        except SystemExit as stop:
            status = stop.code
        return Outcome(status, *capsys.readouterr())

    return run


class Finish:
    """A script in processes of its own, whose end can be waited for."""

    def finish(self) -> Outcome:
        out, err = self.communicate(timeout=120)
        return Outcome(self.returncode, out, err)


class Script(Finish, subprocess.Popen):
    """Started anew."""


class Forked(Finish, Fork):
    """Forked from a process that has torch and the scripts loaded."""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Script | Forked]]:
    """start(2, 'train.py', ...) launches a script with torchrun on that many processes; 1 is python SCRIPT, without the
    seconds that its imports take."""
    started = []

    def launch(processes: int, script: str, *arguments) -> Script | Forked:
        argv = [script, *(str(argument) for argument in arguments)]
        if processes == 1:
            started.append(Forked(argv, tmp_path / f"fork{len(started)}"))
            return started[-1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(Script([*torchrun, *argv], cwd=ROOT, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield launch
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory) -> Path:
    """The run folder of a finished training."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train([*TINY, "--data.path", str(images), "--output", str(folder)])
    return folder


@pytest.fixture
def tiny(images) -> list[str]:
    """Options of train.py for the small model on the small data."""
    return [*TINY, "--data.path", str(images)]


@pytest.fixture
def shell(images) -> Callable[..., Outcome]:
    """shell('train.sh', '--optim.epochs', 1, GPUS='2') runs a shell script of the repository with this interpreter."""

    def run(script: str, *arguments, **variables: str) -> Outcome:
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
        command = [str(ROOT / script), *(str(argument) for argument in arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run
