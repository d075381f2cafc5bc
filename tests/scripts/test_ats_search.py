"""python -m defenses.ats.search: ranks policies, and goes on where it was stopped, on the processes that are left."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from defenses.ats.search import SearchConfig, main
from utils.commandline import load
from utils.errors import UserError

POLICIES = ["3-1-7", "43-18-18", "0", "39", "21-13", "5", "30-8-44", "12-27"]
QUICK = ["--policies", ",".join(POLICIES), "--samples", "1", "--draws", "1", "--batch", "4", "--batches", "2"]
QUICK += ["--threshold", "-1000000", "--device", "cpu"]


def test_it_says_what_its_options_are():
    """Run by -m, its options are declared in __main__."""
    command = [sys.executable, "-m", "defenses.ats.search", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--policies" in done.stdout and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def quick(trained, images) -> list[str]:
    """Options of a search, all but the run folder."""
    return [*QUICK, "--checkpoint", str(trained / "last.pt"), "--data", str(images)]


@pytest.fixture(scope="module")
def straight(quick, tmp_path_factory) -> Path:
    """The run folder of a search that nothing happened to."""
    folder = tmp_path_factory.mktemp("search") / "run"
    main([*quick, "--output", str(folder)])
    return folder


def found(folder: Path) -> dict:
    return json.loads((folder / "policies.json").read_text())


def cut(quick: list[str], folder: Path, rows: list[dict]) -> list[str]:
    """Make the folder of a search that was stopped after these rows; return the options that continue it."""
    (folder / "partial").mkdir(parents=True)
    (folder / "partial" / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*quick, "--resume", "auto", "--output", str(folder)]
    (folder / "config.yaml").write_text(load(SearchConfig, options)[1])
    return options


def test_policies_are_ranked(straight, quick):
    result = found(straight)
    assert {row["policy"] for row in result["best"]} == {*POLICIES}
    assert [row["combined"] for row in result["best"]] == sorted(row["combined"] for row in result["best"])
    assert len(result["hybrid"].split("+")) == 2 and result["below_threshold"] == 0
    assert all(0 < row["privacy"] < 1.01 and row["accuracy"] < -0.99 for row in result["policies"])
    with pytest.raises(UserError, match="holds a finished run"):
        main([*quick, "--output", str(straight)])


def test_a_stopped_search_continues(straight, quick, tmp_path):
    scores = {"privacy": [9.0, 9, 9, 9], "accuracy": [-1.0, -1]}
    rows = [{"index": index, "image": policy} | scores for index, policy in enumerate(POLICIES) if index]
    main(cut(quick, tmp_path / "run", rows))
    result = found(tmp_path / "run")["policies"]
    assert [row["privacy"] for row in result[1:]] == [9.0] * (len(POLICIES) - 1)  # what was scored is kept
    assert result[0]["privacy"] == found(straight)["policies"][0]["privacy"]


def test_scores_of_another_checkpoint_are_not_continued(quick, tmp_path):
    """The file under the checkpoint's name holds other weights than those the finished policies were scored with."""
    row = {"index": 1, "image": POLICIES[1], "privacy": [9.0], "accuracy": [-1.0], "sha256": 64 * "0"}
    with pytest.raises(UserError, match="checkpoint behind them, are not those"):
        main(cut(quick, tmp_path / "run", [row]))


def test_the_share_of_a_lost_process_is_scored_by_those_that_are_left(start, straight, quick, tmp_path, monkeypatch):
    """Of two processes one is killed and the other ended, as torchrun does; one process alone then scores the rest,
    nothing twice, and all is as in a search that nothing happened to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    run, ranks = tmp_path / "run", []
    options = [*quick, "--resume", "auto", "--output", str(run)]
    with monkeypatch.context() as patch:
        for rank in range(2):
            about |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            for key, value in about.items():
                patch.setenv(key, str(value))
            ranks.append(start(1, "defenses/ats/search.py", *options))
    files = [run / "partial" / f"{rank}.jsonl" for rank in range(2)]
    while not all(file.exists() for file in files):
        assert all(rank.poll() is None for rank in ranks), [rank.finish() for rank in ranks]
        time.sleep(0.01)
    ranks[1].kill()
    ranks[0].terminate()
    assert [rank.finish().status for rank in ranks] == [143, -signal.SIGKILL]
    kept = [json.loads(line)["index"] for file in files for line in file.read_text().split("\n") if line.endswith("}")]
    assert 2 <= len(kept) < len(POLICIES) and len({*kept}) == len(kept)
    main(options)
    assert f"continuing: {len(kept)} of {len(POLICIES)} policies are scored" in (run / "log.txt").read_text()
    assert found(run) == found(straight)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--policies", "3-50"], "operation 50"),
        (["--batch", "1"], "--batch must be at least 2"),
        (["--batches", "99"], "is more than 17 images"),
        (["--number", "0"], "--number must be at least 1"),
        (["--checkpoint", "/no/such.pt"], "/no/such.pt"),
    ],
)
def test_bad_input(quick, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        main([*quick, "--output", str(tmp_path / "run"), *options])
