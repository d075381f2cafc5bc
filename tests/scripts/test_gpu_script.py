"""scripts/gpu.sh: a part at its smallest on a CPU, its JSON, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(out: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {"PYTHON": sys.executable, "OUT": str(out), "PRESET": "tiny", "DEVICE": "cpu"} | environment
    command = [str(ROOT / "scripts/gpu.sh"), *parts]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)


def test_a_part_writes_its_json_and_is_not_run_again(tmp_path):
    for name in ("digits", "photographs"):  # as data.demo makes them, which takes longer
        (tmp_path / "data" / name).mkdir(parents=True)
    noise = torch.randint(256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for place, pixels in enumerate(noise.numpy()):
        Image.fromarray(pixels).save(tmp_path / f"data/photographs/{place}.png")
    first = run(tmp_path, "joint")
    assert first.returncode == 0, first.stdout + first.stderr
    assert json.loads((tmp_path / "joint.json").read_text())["summary"]["psnr"]["n"] == 2
    again = run(tmp_path, "joint", PYTHON="/no/python")
    assert again.returncode == 0 and "joint: done before" in again.stdout
    broken = run(tmp_path, "sync", PYTHON="/no/python")
    assert broken.returncode == 1 and "sync: no result" in broken.stdout and not (tmp_path / "sync.json").exists()


@pytest.mark.parametrize(
    "parts, environment, words",
    [
        (["every"], {}, "no part 'every'"),
        ([], {"PRESET": "huge"}, "neither full nor tiny"),
        ([], {"DEVICE": "tpu"}, "neither cuda nor cpu"),
        ([], {"PRESET": "full"}, "set DATA to the folder of CIFAR-10"),
        ([], {"DEVICE": "cuda", "PYTHON": "/no/python"}, "no GPU is found by torch"),
    ],
)
def test_what_does_not_go_is_said(tmp_path, parts, environment, words):
    outcome = run(tmp_path / "out", *parts, **environment)
    assert outcome.returncode != 0 and words in outcome.stderr
