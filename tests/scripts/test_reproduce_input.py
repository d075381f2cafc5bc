"""scripts/reproduce: what is set wrong is one line with status 2 before anything is written or computed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BAD = [
    ("inverting_gradients", {"DATA": "nowhere"}, "DATA is 'nowhere', which is no folder"),
    ("inverting_gradients", {"DATA": "configs", "NUM": "0"}, "NUM is '0': give a whole number of at least 1"),
    ("inverting_gradients", {"DATA": "configs", "ITERATIONS": "many"}, "ITERATIONS is 'many'"),
    (
        "inverting_gradients",
        {"DATA": "configs", "TRUNK": "no.safetensors"},
        "TRUNK is 'no.safetensors', which is no file",
    ),
    ("hybrid", {"KEPT": "no.json"}, "KEPT is 'no.json', which is no file"),
    ("dlg_batches", {"IMAGES": "configs", "BATCHES": "3"}, "BATCHES has '3'"),
]


@pytest.mark.parametrize(("script", "settings", "problem"), BAD)
def test_a_wrong_setting_is_one_line_and_writes_nothing(script, settings, problem, tmp_path):
    own = {"OUT": str(tmp_path / "out"), "PYTHON": "false"}
    unset = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
    command = ["bash", str(ROOT / f"scripts/reproduce/{script}.sh")]
    result = subprocess.run(command, cwd=tmp_path, env=unset | own | settings, capture_output=True, text=True)
    assert result.returncode == 2
    assert problem in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
