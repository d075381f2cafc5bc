"""utils/runs.py: whose a run folder is, what --overwrite may cost, and what a folder says of how it came about."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import utils.runs
from utils.distributed import Processes
from utils.errors import Stopped, UserError, run_command
from utils.ownership import EARLIER, PICTURES, TRAINED
from utils.runs import Run, open_run

ROOT = Path(__file__).parents[2]
ALONE = Processes(0, 1, torch.device("cpu"))


def finished(folder: Path) -> dict[str, bytes]:
    """A finished training, and what its files hold."""
    with open_run(str(folder), "seed: 0\n", ALONE) as run:
        run.start()
        (folder / "last.pt").write_bytes(b"weights")
        run.scalars(0, {"train/loss": 1.0})
        run.results({"acc1": 50.0})
    return contents(folder)


def died(folder: Path, **options) -> Run:
    """A run that started, drew a point of a curve, and ended with nothing to keep or to continue from."""
    run = Run(str(folder), "seed: 0\n", ALONE, **options)
    run.start()
    run.scalars(0, {"train/loss": 1.0})
    run.close(MemoryError())
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_fails_at_once_gives_back_what_it_was_to_replace(tmp_path):
    before = finished(tmp_path)
    with (
        pytest.raises(UserError, match="no such class"),
        open_run(str(tmp_path), "seed: 1\n", ALONE, overwrite=True) as run,
    ):
        run.start()
        assert not (tmp_path / "last.pt").exists()
        run.log("reading the data")
        raise UserError("no such class")
    assert contents(tmp_path) == before


def test_a_run_that_is_killed_at_once_gives_it_back_to_the_next_one(tmp_path):
    before = finished(tmp_path)
    code = (
        "import os, signal, torch; from utils.runs import Run; from utils.distributed import Processes\n"
        f"Run({str(tmp_path)!r}, 'seed: 1', Processes(0, 1, torch.device('cpu')), overwrite=True).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (tmp_path / EARLIER).exists() and not (tmp_path / "results.json").exists()
    with pytest.raises(UserError, match="holds a finished run"):
        Run(str(tmp_path), "seed: 1\n", ALONE)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["last.pt", "results.json"])
def test_what_was_replaced_goes_once_there_is_something_new(tmp_path, name):
    finished(tmp_path)
    with pytest.raises(UserError, match="NaN"), open_run(str(tmp_path), "seed: 1\n", ALONE, overwrite=True) as run:
        run.start()
        (tmp_path / name).write_text("{}")
        run.keep()
        assert not (tmp_path / EARLIER).exists()
        raise UserError("NaN")
    assert (tmp_path / name).read_text() == "{}" and (tmp_path / "config.yaml").read_text() == "seed: 1\n"


def test_a_run_that_torchrun_restarts_does_not_overwrite_itself(tmp_path, monkeypatch):
    before = finished(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="restarted by torchrun, and --overwrite would discard"):
        Run(str(tmp_path), "seed: 0\n", ALONE, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "error, ends",
    [
        (UserError("unknown option"), True),
        (Stopped("saved"), True),
        (Stopped("", signal.SIGINT), True),
        (Stopped(""), False),  # by torchrun, which ends the others when one has died
        (OSError(28, "No space"), False),
    ],
)
@pytest.mark.parametrize("restarts", ["0", "3"])
def test_only_what_may_go_better_next_time_is_restarted(monkeypatch, error, ends, restarts):
    """torchrun itself is stopped by an error that would only come again."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit):
        run_command(main)
    assert sent == ([(os.getppid(), signal.SIGTERM)] if ends and restarts == "3" else [])


def test_two_runs_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.runs, "PATIENCE", 0.3)
    code = (
        "import torch; from utils.runs import Run; from utils.distributed import Processes\n"
        f"run = Run({str(tmp_path)!r}, 'seed: 1', Processes(0, 1, torch.device('cpu')))\n"
        "run.start(); print('ready', flush=True); input()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert other.stdout.readline() == "ready\n"
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="is in use by another process"):
            Run(str(tmp_path), "seed: 2\n", ALONE, **options)
    assert (tmp_path / "config.yaml").read_text() == "seed: 1"
    other.kill()
    other.communicate()
    Run(str(tmp_path), "seed: 2\n", ALONE).close()  # a lock does not outlive its process


def test_leftovers_of_a_kill_are_cleared(tmp_path):
    pictures = {"outputs": [*TRAINED, *PICTURES]}
    died(tmp_path, **pictures)
    (tmp_path / "originals").mkdir()
    for name in (".last.pt.123.tmp", "originals/.0001_a.png.123.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"half")
    died(tmp_path, **pictures)
    kept = set(contents(tmp_path)) - {str(path.relative_to(tmp_path)) for path in (tmp_path / "tb").iterdir()}
    assert kept == {"run.json", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", ".mine.tmp"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    assert len(list((tmp_path / "tb").iterdir())) == 1


def test_a_run_says_what_it_was_made_with(tmp_path):
    died(tmp_path)
    about = json.loads((tmp_path / "environment.json").read_text())
    assert {"torch", "torchvision", "timm", "numpy", "pillow"} <= set(about["packages"])
    assert about["packages"]["torch"] == torch.__version__.split("+")[0] or about["packages"]["torch"]
    assert about["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(about["code"]) == {"commit", "dirty"} and about["machine"]["cores"] == os.cpu_count()
    assert about["processes"] == 1 and about["device"] == "cpu" and about["command"].startswith("python ")
    line = (tmp_path / "log.txt").read_text()
    assert str(about["code"]["commit"]) in line and about["machine"]["processor"] in line


def test_names_that_are_not_utf8_do_not_stop_the_log(tmp_path):
    with open_run(str(tmp_path), "seed: 0\n", ALONE) as run:
        run.start()
        run.log(f"skipped '{os.fsdecode(b'a' + bytes([255]))}'\nand \x1b[31m'b'")
    assert (tmp_path / "log.txt").read_text().splitlines()[-2:][1] == "and \\x1b[31m'b'"
    assert "skipped 'a\\udcff'" in (tmp_path / "log.txt").read_text()


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path):
    with pytest.raises(OSError), open_run(str(tmp_path), "seed: 0\n", ALONE) as run:  # noqa: PT011
        run.start()
        run.logger.handlers[0].stream.close()
        run.logger.handlers[0].stream = open("/dev/full", "w")  # noqa: SIM115, the handler closes it
        run.log("a line")
    assert not run.claimed


def test_a_resumed_run_drops_the_rows_that_it_writes_again(tmp_path):
    """Rows of the step it goes on from and later ones, and one that a crash has cut short."""
    finished(tmp_path)
    rows = [json.dumps({"step": step, "loss": 1.0 / (1 + step)}) + "\n" for step in range(4)]
    for step in range(5):
        (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 0, "lo')
        with open_run(str(tmp_path), "seed: 0\n", ALONE, resume=True) as run:
            run.start()
            run.rewind(step)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(rows[:step])
