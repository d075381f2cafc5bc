"""CONTRIBUTING.md, done as it says: its three parts go into a copy of the project, and its scripts use them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CODE = (
    "attacks",
    "campaigns",
    "configs",
    "data",
    "defenses",
    "eval",
    "models",
    "options",
    "reports",
    "training",
    "utils",
)
VICTIM = ["--model", "vit", "--image_size", "16", "--model_options.patch_size", "8", "--model_options.embed_dim", "24"]


def blocks() -> list[tuple[str, str, str]]:
    """Return (language, path or "", text) of every fenced block of the page, without its indentation."""
    found = re.findall(r"^( *)```(\w+) ?(\S*)\n(.*?)^ *```$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    return [(kind, path, re.sub(rf"^{indent}", "", text, flags=re.M)) for indent, kind, path, text in found]


def insert(file: Path, line: str, before: str) -> None:
    """Put `line` in front of the first line of the file that begins with `before`, spaces aside."""
    text = file.read_text()
    place = re.search(rf"^ *{re.escape(before)}", text, flags=re.M)
    file.write_text(f"{text[: place.start()]}    {line}\n{text[place.start() :]}")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project with the attack, the defence and the metric of the page."""
    root = tmp_path_factory.mktemp("contributing")
    for name in CODE:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "tests" / "defenses" / "test_registry.py"):
        shutil.copy(file, root)
    lines = []
    for _, path, text in blocks():
        if path:
            (root / path).write_text(text)
        else:
            lines += text.splitlines()
    attack, defense, metric = lines
    insert(root / "attacks" / "__init__.py", attack, "closed_form=")
    insert(root / "defenses" / "__init__.py", defense, 'noise="')
    file = root / "eval" / "reconstruction.py"
    insert(file, metric, '"mse": Metric(')
    file.write_text(file.read_text().replace("from eval.mse import", "from eval.mae import mae\nfrom eval.mse import"))
    pixels = np.full((16, 16, 3), 51, np.uint8)  # 0.2: 0.05 from the level of 0.25 below
    (root / "images").mkdir()
    Image.fromarray(pixels).save(root / "images" / "grey.png")
    return root


def chains() -> dict[str, list[tuple[str, str]]]:
    """Return, of each row of the page, the (file, name) pairs one opens in order."""
    rows = re.findall(r"^\| ([^|]+) \| (`[^|`]+:.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
    return {what: [tuple(step.split(":")) for step in re.findall(r"`([^`]+)`", steps)] for what, steps in rows}


@pytest.mark.parametrize("what", chains())
def test_a_thing_is_followed_through_five_files_at_most(what):
    steps = chains()[what]
    assert 3 <= len(steps) <= (5 if "mask_ratio" in what else 4)
    for file, name in steps:
        assert re.search(rf"^(?:def |class )?{name}\b", (ROOT / file).read_text(), flags=re.M), f"{file} has no {name}"


def test_all_things_are_listed():
    assert len(chains()) == 4


def attack(copy: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "attack.py", "--config", "configs/attack/mean_colour.yaml", *arguments]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)


def test_attack_defence_and_metric_work_together(copy):
    config = ["--config", "configs/defense/scale.yaml", "--attack_options.level", "0.25", *VICTIM]
    done = attack(copy, *config, "--images", "images", "--output", "run")
    assert done.returncode == 0, done.stderr
    found = json.loads((copy / "run" / "results.json").read_text())
    assert found["summary"]["mae"]["mean"] == pytest.approx(0.05, abs=1e-6)
    said = done.stdout + done.stderr
    assert "MAE" in said and re.search(r"attacks that apply: .*mean_colour", said)
    assert "reduction 0.5" in (copy / "run" / "report.html").read_text()


def test_the_help_lists_the_options_of_the_new_parts(copy):
    shown = attack(copy, "--attack", "mean_colour", "--help").stdout
    assert "level" in shown and "of every pixel, from 0 to 1" in shown
    assert "Share by which every entry shrinks" in attack(copy, "--defense", "scale", "--help").stdout


def test_a_wrong_option_of_a_new_part_is_refused(copy):
    for option, words in (("--attack_options.levle", "level"), ("--defense_options.reduktion", "reduction")):
        done = attack(copy, "--defense", "scale", option, "0.1", "--images", "images", "--output", "refused")
        assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and not (copy / "refused").exists()


def test_the_registry_tests_hold_for_the_new_defence(copy):
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-k", "scale", "test_registry.py"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    for name in (
        "test_zero_strength_is_bit_identical_to_no_defence[vit-scale]",
        "test_every_defence_acts_by_default_and_follows_its_seed[scale]",
    ):
        assert f"PASSED test_registry.py::{name}" in done.stdout, done.stdout
