"""scripts/gpu.sh: a part at its smallest on a CPU, its JSON, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_part_ends_with_the_script(tmp_path, number):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho $$ >{tmp_path}/pid.new && mv {tmp_path}/pid.new {tmp_path}/pid && exec sleep 300\n"
    )
    python.chmod(0o755)
    for name in ("digits", "photographs"):
        (tmp_path / "data" / name).mkdir(parents=True)
    settings = {"PYTHON": str(python), "OUT": str(tmp_path), "PRESET": "tiny", "DEVICE": "cpu"}
    # Tests that are run in the background do not hear Ctrl-C, and neither would the script they start.
    command = ["env", "--default-signal=INT", str(ROOT / "scripts/gpu.sh"), "sync"]
    with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as script:
        while not (tmp_path / "pid").exists():
            assert script.poll() is None
            time.sleep(0.01)
        script.send_signal(number)
        assert script.wait(timeout=60) == 128 + number
    part = Path("/proc") / (tmp_path / "pid").read_text().strip() / "cmdline"
    end = time.monotonic() + 30
    while part.exists() and part.read_bytes() and time.monotonic() < end:  # a zombie's is empty
        time.sleep(0.05)
    assert not part.exists() or not part.read_bytes()


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
