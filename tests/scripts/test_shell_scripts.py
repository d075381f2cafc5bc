"""Shell scripts: a variable that is missing is asked for in one line, before anything is done."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "train.sh", *sorted((ROOT / "scripts").rglob("*.sh"))]
MISSING = [  # script, what is set, what is asked for
    ("train.sh", {"OUT": "run"}, "DATA"),
    ("train.sh", {"DATA": "data"}, "OUT"),
    ("train.sh", {"DATA": "data", "OUT": "run", "NNODES": "2"}, "MASTER"),
    ("gpu.sh", {"DEVICE": "cpu", "IMAGES": "images"}, "DATA"),
    ("gpu.sh", {"DEVICE": "cpu", "DATA": "data"}, "IMAGES"),
    ("ablation.sh", {"PRESET": "subset"}, "DATA"),
    ("ablation.sh", {"PRESET": "gpu"}, "DATA"),
    ("ablation.sh", {"PRESET": "paper"}, "DATA"),
    ("claims.sh", {"PRESET": "gpu"}, "CIFAR10"),
    ("claims.sh", {"PRESET": "paper"}, "IMAGENET"),
    ("dlg_batches.sh", {}, "IMAGES"),
    ("finetune.sh", {}, "DATA"),
    ("finetune_photographs.sh", {}, "IMAGES"),
    ("flower.sh", {}, "IMAGES"),
    ("gradvit_prior.sh", {"IMAGES": "images"}, "DATA"),
    ("gradvit_prior.sh", {"DATA": "data"}, "IMAGES"),
    ("inverting_gradients.sh", {}, "DATA"),
    ("joint.sh", {}, "IMAGES"),
    ("ratio_curves.sh", {"MODELS": "one=timm:mixer_b16_224"}, "DATA"),
    ("trained_deit_small.sh", {}, "IMAGES"),
]


@pytest.mark.parametrize("script, given, missing", MISSING)
def test_a_missing_variable_is_asked_for_in_one_line(script, given, missing, tmp_path):
    command = next(path for path in SCRIPTS if path.name == script)
    variables = {"PATH": "/usr/bin:/bin", "PYTHON": "false"} | ({} if missing == "OUT" else {"OUT": f"{tmp_path}/out"})
    done = subprocess.run([command], env=variables | given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir()), done
    assert re.fullmatch(rf"error: set {missing} to .+\n", done.stderr), done.stderr


def test_every_variable_that_a_script_needs_is_tested():
    asked = {(path.name, name) for path in SCRIPTS for name in re.findall(r"\bneed (\w+) \"", path.read_text())}
    assert asked == {(script, missing) for script, _, missing in MISSING}
    for path in SCRIPTS:  # bash's own way ends with status 1
        assert not re.search(r"\$\{\w+:?\?", path.read_text()), path.name
