"""A federation over loopback, its curious server, and the attack on what it wrote. Needs Flower; skipped without it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from leak_file import load

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("FLOWER_PYTHON") or (sys.executable if importlib.util.find_spec("flwr") else None)
VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
CONFIG = ["model=vit", f"model-options={json.dumps(VIT)}", "image-size=32", "classes=10", "min-block=2", "max-block=8"]


def same_as_here(leaks: list[Path], folders: list[Path], mask_ratio: float) -> bool:
    """Whether what came over the wire is what the app's functions give in this process, bit for bit."""
    sys.path.insert(0, str(ROOT / "examples" / "flower"))
    from federation.task import local_batch, new_model, train

    config = {"model": "vit", "model-options": json.dumps(VIT), "image-size": 32, "classes": 10, "min-block": 2}
    config |= {"max-block": 8, "local-steps": 1, "batch-size": 1, "lr": 0.05, "mask-ratio": mask_ratio, "seed": 0}
    for path, folder in zip(leaks, folders, strict=True):
        model, leak = new_model(config), load(path)
        assert all(value.equal(leak.before[name]) for name, value in model.state_dict().items())
        train(model, *local_batch(str(folder), 1, config), 1, str(folder), config)
        if not all(value.equal(leak.after[name]) for name, value in model.state_dict().items()):
            return False
    return True


@pytest.mark.skipif(PYTHON is None, reason="Flower is not installed, and FLOWER_PYTHON names no interpreter with it")
@pytest.mark.parametrize("mask_ratio", [0.0, 0.3])
def test_the_server_reconstructs_what_its_clients_trained_on(tmp_path, mask_ratio):
    from skimage import data

    folders = [tmp_path / f"client_{client}" for client in range(2)]
    for folder, name in zip(folders, ("astronaut", "coffee"), strict=True):
        (folder / "class").mkdir(parents=True)
        Image.fromarray(getattr(data, name)()).resize((32, 32)).save(folder / "class" / "0.png")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [PYTHON, ROOT / "examples/flower/run.py", "--images", *folders, "--leaks", tmp_path / "leaks", "--config"]
    config = [*CONFIG, "local-steps=1", "lr=0.05", f"mask-ratio={mask_ratio}"]
    done = subprocess.run([*map(str, command), *config], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    leaks = sorted((tmp_path / "leaks").iterdir())
    assert [path.name for path in leaks] == [f"round_001_client_{client}.safetensors" for client in range(2)]
    about = load(leaks[0]).about
    assert (about.lr, about.steps, about.masked, about.batch_size) == (0.05, 1, mask_ratio > 0, 1)
    assert same_as_here(leaks, folders, mask_ratio)
    (tmp_path / "originals").mkdir()
    for folder in folders:
        shutil.copy(folder / "class" / "0.png", tmp_path / "originals" / f"{folder.name}.png")
    options = ["--model", "vit", "--image_size", "32", "--model_options.num_classes", "10"]
    options += [part for key, value in VIT.items() for part in (f"--model_options.{key}", str(value))]
    options += ["--model_options.unknown", "true", "--attack", "mjp_aware"] if mask_ratio else []
    command = [sys.executable, "attack.py", *options, "--leak", tmp_path / "leaks", "--images", tmp_path / "originals"]
    command += ["--output", tmp_path / "run"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["per_image"]
    assert all(row["psnr_visible"] > (15 if mask_ratio else 35) for row in rows)
    assert all((row["hidden"] > 0) == (mask_ratio > 0) for row in rows)


def test_what_run_needs_is_said_first(tmp_path):
    command = [sys.executable, str(ROOT / "examples/flower/run.py"), "--images", "/no/such", "--leaks", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "error: image folder '/no/such' does not exist"
