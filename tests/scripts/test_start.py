"""Options are read, and wrong ones refused, before torch loads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "timm", "torchvision", "matplotlib", "numpy", "scipy", "PIL")
CASES = (
    [script, *options]
    for script in ("train.py", "eval.py", "consistency.py", "attack.py")
    for options in (
        ["--help"],
        ["--help-all"],
        ["--no_such_option", "1"],
        ["--output", "x", "--seed", "many"],
        ["--output", "x", "--model", "lenet", "--checkpoint", "no/such/file", "--images", "no/such/folder"],
        ["--config", "no/such.yaml"],
        ["--config", "configs/train/deit_small.yaml", "--output", "x", "--data.path", "no/such/folder"],
        ["--attack", "gradvit", "--help"],
        ["--output", "x", "--defense", "noise", "--defense_options.sd", "1", "--model", "lenet", "--images", "d"],
    )
)
RUN = """
import contextlib, io, json, runpy, sys
found = []
for argv in json.load(sys.stdin):
    sys.argv, status = argv, 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    found.append([argv, status, errors.getvalue(), sorted({name.split(".")[0] for name in sys.modules})])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes() -> list:
    """[arguments, status, stderr, modules that are loaded] of all cases, run one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(list(CASES)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_no_answer_needs_torch(outcomes):
    for argv, _, errors, loaded in outcomes:
        assert not set(HEAVY) & set(loaded), (argv, errors)


def test_wrong_options_end_in_one_line_and_status_2(outcomes):
    for argv, status, errors, _ in outcomes:
        if "--help" in argv or "--help-all" in argv:
            assert (status, errors) == (0, ""), argv
        else:
            assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1, (argv, errors)


UNUSED = ("torch._dynamo", "triton", "sympy", "lpips", "skimage", "sklearn", "tensorboard", "scipy.stats")
WORK = """
import attack, sys
attack.main(sys.argv[1:])
import consistency, eval.ratios, eval.report, eval.accuracy, eval.consistency
print(sorted(set(UNUSED) & set(sys.modules)))
from utils import light_imports
import torch, torch._dynamo.utils as compiler
print([light_imports._is_compile_supported(kind) == compiler.is_compile_supported(kind) for kind in ("cpu", "meta")])
print(light_imports._disable(lambda text: len(text))("four"), torch.compiler.disable is light_imports._disable)
"""


def test_an_attack_and_an_evaluation_load_nothing_they_do_not_use(tmp_path):
    """And what stands in for parts of torch.compile does the same once that is loaded."""
    image = tmp_path / "one.png"
    Image.new("RGB", (16, 16), (200, 120, 40)).save(image)
    size = ["--image_size", "16", "--model_options.patch_size", "8", "--model_options.depth", "1"]
    argv = ["--attack", "closed_form", "--model", "deit_tiny", *size, "--images", str(image)]
    code = f"UNUSED = {UNUSED}\n{WORK}"
    command = [sys.executable, "-c", code, *argv, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["[]", "[True, True]", "4 False"]
