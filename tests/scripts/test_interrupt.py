"""Ctrl-C: one line, status 130, what was finished is kept, and the second one ends a process at once."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LENET = shlex.split("--model lenet --model_options.num_classes 4 --image_size 32 --labels hidden --device cpu")
SLOW = shlex.split("--attack dlg --attack_options.iterations 4000 --attack_options.restarts 1 --victims_at_once 1")
MODEL = shlex.split("--mask_ratios 0.5 --min_block 2 --max_block 8 --seeds 4000 --data.workers 0 --device cpu")


def wait_for(running, condition) -> None:
    while not condition():
        assert running.poll() is None, running.finish().err
        time.sleep(0.01)


def interrupt(running, condition, group: bool = False) -> str:
    """Ctrl-C once the condition holds. Returns the line that the process ends with."""
    wait_for(running, condition)
    os.killpg(running.pid, signal.SIGINT) if group else running.send_signal(signal.SIGINT)
    outcome = running.finish()
    assert outcome.status == 130 and "Traceback" not in outcome.err, outcome
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("stopped by Ctrl-C (SIGINT)"), outcome.err
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_saves_its_state_as_its_workers_do_not_hear_it(start, tiny, tmp_path):
    run = tmp_path / "run"
    running = start(1, "train.py", *tiny, "--optim.epochs", 400, "--data.workers", 2, "--output", run)
    line = interrupt(running, (run / "last.pt").exists, group=True)
    assert "state saved at epoch" in line and line.endswith("continue with --resume auto")
    saved = torch.load(run / "last.pt", weights_only=True)
    assert f"epoch {saved['epoch']}, step {saved['step']}" in line and 0 < saved["epoch"] < 400


def test_a_second_one_ends_a_training_at_once_and_leaves_whole_files(start, tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    running = start(1, "train.py", *tiny, "--optim.epochs", 400, "--output", run)
    wait_for(running, (run / "last.pt").exists)
    running.send_signal(signal.SIGINT)
    running.send_signal(signal.SIGINT)
    outcome = running.finish()
    assert outcome.status in (-signal.SIGINT, 130) and "Traceback" not in outcome.err, outcome.err
    torch.load(run / "last.pt", weights_only=True)


def test_an_attack_keeps_the_images_it_has_finished(start, images, tmp_path):
    run = tmp_path / "run"
    options = [*LENET, *SLOW, "--images", images / "val", "--output", run]
    options[options.index("4000")] = "40"
    rows = run / "partial" / "0.jsonl"
    line = interrupt(start(1, "attack.py", *options), rows.exists)
    assert line.endswith("what is finished is kept, continue with --resume auto")
    done = [json.loads(row)["index"] for row in rows.read_text().split("\n") if row.endswith("}")]
    again = start(1, "attack.py", *options, "--resume", "auto").finish()
    assert again.status == 0 and f"continuing: {len(done)} of 17" in again.out, again.err


def test_what_replaces_a_run_gives_it_back(start, call, images, tmp_path):
    run = tmp_path / "run"
    assert call("attack.py", *LENET, "--metric_only", "--output", run).status == 0
    before = contents(run)
    options = [*LENET, *SLOW, "--images", images / "val", "--overwrite", "--output", run]
    line = interrupt(start(1, "attack.py", *options), (run / ".replaced").exists)
    assert line.endswith("run the same command again")
    assert contents(run) == before


@pytest.mark.parametrize("script", ["eval.py", "consistency.py"])
def test_an_evaluation_leaves_no_half_results(start, trained, images, tmp_path, script):
    run = tmp_path / "run"
    running = start(1, script, *MODEL, "--checkpoint", trained / "last.pt", "--data.path", images, "--output", run)
    line = interrupt(running, (run / "log.txt").exists)
    assert line.endswith("run the same command again") and not (run / "results.json").exists()
    again = [*MODEL, "--seeds", 1, "--checkpoint", trained / "last.pt", "--data.path", images, "--output", run]
    assert start(1, script, *again).finish().status == 0


def test_an_audit_and_a_search_stop(start, trained, images, tmp_path):
    small = ["--checkpoint", trained / "last.pt", "--device", "cpu"]
    audit = start(1, "attack.py", "--audit", *small, "--images", images / "val", "--output", tmp_path / "audit")
    line = interrupt(audit, (tmp_path / "audit" / "log.txt").exists)
    assert line.endswith("run the same command again") and not (tmp_path / "audit" / "audit.html").exists()
    options = [*small, "--data", images, "--samples", 1, "--draws", 1, "--batch", 8, "--batches", 1, "--number", 4000]
    search = start(1, "defenses/ats/search.py", *options, "--output", tmp_path / "search")
    line = interrupt(search, (tmp_path / "search" / "partial" / "0.jsonl").exists)
    assert line.endswith("continue with --resume auto")


def test_a_launcher_says_one_line_and_ends_with_the_status_of_its_processes(tiny, tmp_path):
    """python -m utils.launch, which train.sh calls: a wrong folder, then Ctrl-C, on two processes."""
    torchrun = ["--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    launch = [sys.executable, "-m", "utils.launch", *torchrun, "train.py"]
    options = [*map(str, tiny), "--data.batch_size", "3", "--optim.epochs", "400", "--output", str(tmp_path / "run")]
    wrong = [*options, "--data.path", str(tmp_path / "nowhere")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    about = {"cwd": ROOT, "env": environment, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*launch, *options], start_new_session=True, **about) as running:
        done = subprocess.run([*launch, *wrong], **about)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: '{tmp_path / 'nowhere'}' does not exist: check the path\n"
        while not (tmp_path / "run" / "last.pt").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    said = [line for line in err.splitlines() if not line.startswith("[")]  # torch's C++ logs, on a busy machine
    assert len(said) == 1, err
    assert said[0].startswith("stopped by Ctrl-C (SIGINT), state saved at epoch"), err
    assert said[0].endswith("with --resume auto"), err
