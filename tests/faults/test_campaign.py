"""A small campaign of real faults in the tests; `make faults` is the large one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = {  # what is tried here: kind and job, and how many of it
    ("SIGKILL", "training"): 2,
    ("SIGKILL in a write", "training"): 1,
    ("SIGTERM in validation", "training"): 1,
    ("SIGKILL of one rank", "training on 2"): 1,
    ("file size limit", "training"): 1,
    ("NaN weight", "training"): 1,
    ("SIGKILL", "attack"): 1,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("faults")
    only = [f"{kind}, {job}" for kind, job in KINDS]
    command = [sys.executable, str(HERE / "campaign.py"), "--output", str(output), "--kills", "2", "--trials", "1"]
    done = subprocess.run(
        [*command, "--only", *only], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((output / "results.json").read_text())


def test_whatever_happens_the_continued_run_is_the_straight_one(results):
    found = {(row["fault"], row["job"]): (row["tried"], row["survived"]) for row in results["faults"]}
    assert found == {kind: (number, number) for kind, number in KINDS.items()}
    assert results["failed"] == []


def test_no_more_than_an_epoch_is_lost(results):
    assert all(row["lost_max"] <= 10 for row in results["faults"] if row["unit"] == "steps")
    assert all(row["lost_max"] <= 1 for row in results["faults"] if row["unit"] == "images")


def test_processes_end_soon_after_one_of_them_died(results):
    (row,) = (row for row in results["faults"] if row["fault"] == "SIGKILL of one rank")
    assert row["seconds_to_end_max"] < 45  # generous: of a machine that is busy; a hang would be 60
