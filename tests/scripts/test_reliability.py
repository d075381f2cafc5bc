"""Numbers that repeat, are counted once and survive: config.yaml, shares, dead workers, bad data behind --overwrite."""

import json
import os
import re
import signal
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
LENET = ["--model", "lenet", "--model_options.num_classes", 4, "--image_size", 32, "--labels", "hidden"]


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def without_seconds(tree):
    if isinstance(tree, dict):
        return {key: without_seconds(value) for key, value in tree.items() if key != "seconds"}
    return [without_seconds(value) for value in tree] if isinstance(tree, list) else tree


def test_the_saved_config_repeats_an_evaluation_and_an_attack_bit_for_bit(call, trained, images, tmp_path):
    evaluation = ["--checkpoint", trained / "last.pt", "--data.path", images, "--data.workers", 0, "--device", "cpu"]
    evaluation += ["--mask_ratios", "0,0.5", "--seeds", 2, "--min_block", 2, "--max_block", 8, "--seed", 3]
    attack = [*LENET, "--attack", "inverting_gradients", "--attack_options.iterations", 3, "--images", images / "val"]
    attack += ["--num_images", 3, "--defense", "noise", "--defense_options.std", "1e-3", "--seed", 3, "--device", "cpu"]
    for script, options in (("eval.py", evaluation), ("consistency.py", evaluation), ("attack.py", attack)):
        first, again = tmp_path / script, tmp_path / f"again {script}"
        assert call(script, *options, "--output", first).status == 0
        outcome = call(script, "--config", first / "config.yaml", "--output", again)
        assert outcome.status == 0, outcome.err
        assert without_seconds(results(first)) == without_seconds(results(again))
        for path in first.glob("reconstructions/*.png"):
            assert path.read_bytes() == (again / "reconstructions" / path.name).read_bytes()


def test_a_loader_worker_that_is_killed_is_reported_in_one_line(start, tiny, tmp_path):
    running = start(1, "train.py", *tiny, "--data.workers", 1, "--optim.epochs", 400, "--output", tmp_path / "run")
    while not (tmp_path / "run" / "last.pt").exists():
        assert running.poll() is None, running.finish().err
        time.sleep(0.01)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    outcome = running.finish()
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and "Traceback" not in outcome.err, outcome.err
    assert line.startswith("error: a loader worker died") and "--resume auto" in line


def test_files_and_shared_memory_do_not_grow_with_the_epochs(start, tiny, tmp_path):
    options = [*tiny, "--data.workers", 1, "--optim.epochs", 400, "--output", tmp_path / "run"]
    running = start(1, "train.py", *options)
    counts = []
    for epochs in (3, 30):
        while len(lines(tmp_path / "run" / "metrics.jsonl")) < epochs:
            assert running.poll() is None, running.finish().err
            time.sleep(0.01)
        shared = [name for name in os.listdir("/dev/shm") if f"_{running.pid}_" in name]
        counts.append((len(os.listdir(f"/proc/{running.pid}/fd")), len(shared)))
    running.terminate()
    assert running.finish().status == 143
    assert counts[1][0] <= counts[0][0] + 4 and counts[1][1] <= counts[0][1] + 4, counts


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_bad_data_behind_overwrite_costs_no_earlier_run(call, tiny, images, tmp_path):
    assert call("train.py", *tiny, "--output", tmp_path / "run").status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    (tmp_path / "classes.txt").write_text("class_0\nno_such_class\n")
    more = ["--data.classes", tmp_path / "classes.txt", "--overwrite", "--output", tmp_path / "run"]
    outcome = call("train.py", *tiny, *more)
    assert outcome.status == 2 and "no_such_class" in outcome.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_an_image_that_cannot_be_read_is_found_before_the_first_attack(call, images, tmp_path):
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    outcome = call("attack.py", *LENET, "--attack", "idlg", "--images", tmp_path, "--output", tmp_path / "run")
    assert outcome.status == 2 and "cannot read image" in outcome.err and "2.png" in outcome.err
    assert not (tmp_path / "run" / "partial").exists()


def test_names_of_strangers_reach_no_terminal_and_no_page(call, tmp_path):
    names = [os.fsdecode(b"not \xff utf-8.png"), "a\nb.png", "<img src=x onerror=alert(1)>.png", "\x1b[31mred.png"]
    for name in names:
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    options = [*LENET, "--attack", "idlg", "--attack_options.iterations", 1, "--images", tmp_path]
    outcome = call("attack.py", *options, "--output", tmp_path / "out" / "run")
    assert outcome.status == 0, outcome.err
    run = tmp_path / "out" / "run"
    assert "\x1b" not in outcome.out + (run / "log.txt").read_text()
    page = (run / "report.html").read_text()
    assert "<img src=x" not in page and "&lt;img src=x" in page and "\x1b" not in page
    assert set(re.findall(r"<img[^>]* src=\"(\w+):", page)) == {"data"}
    assert len(results(run)["per_image"]) == 4 and len((run / "per_image.csv").read_text().splitlines()) >= 5
    assert all(path.name.isprintable() for path in (run / "originals").iterdir())
