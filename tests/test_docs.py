"""What the documentation shows runs: notebooks cell by cell, tutorials command by command, links to pages."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from torch.distributed import run as torchrun

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Smaller than the pages show, so that the tests stay short; the cells are otherwise as published.
SMALLER = {
    "SIDE = 224": "SIDE = 96",
    "NUMBER = 4": "NUMBER = 1",
    "levels = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3]": "levels = [1e-4]",
    "for dropped in (0, 8, 16, 20)": "for dropped in (16,)",
    "--optim.epochs 8": "--optim.epochs 1 --optim.warmup_epochs 0 --jigsaw.start_epoch 0 --data.train_images 256",
    "--num_images 5": "--num_images 2",
    "--num_images 3": "--num_images 1",
    "--images datasets/photographs": "--images datasets/photographs --num_images 1",
    "configs/eval/digits.yaml": "configs/eval/digits.yaml --limit 20 --seeds 1",
}


@pytest.mark.parametrize("path", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for long, short in SMALLER.items():
            cell.source = cell.source.replace(long, short)
    NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, timeout=300).execute()


@pytest.mark.parametrize("path", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_published_with_its_pictures_and_without_errors(path):
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def run_python(arguments: list[str], monkeypatch) -> None:
    """`python ARGUMENTS` in this process: starting torch anew for every command would take the longest by far."""
    if arguments[:2] == ["-m", "utils.launch"]:  # tests/scripts/test_world_sizes.py runs it in earnest
        launched = torchrun.parse_args(arguments[2:])
        arguments = [launched.training_script, *launched.training_script_args]
    try:
        if arguments[0] == "-c":
            exec(arguments[1], {})
        elif arguments[0] == "-m":
            monkeypatch.setattr(sys, "argv", arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.setattr(sys, "argv", arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"python {shlex.join(arguments)} ended with status {stop.code}"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy, of a module imported before
@pytest.mark.parametrize("path", sorted(DOCS.glob("tutorials/*.md")), ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    """Its ```bash and ```python blocks, in order, where outputs do not touch the repository."""
    for part in ROOT.iterdir():
        if not part.name.startswith(".") and part.name not in ("datasets", "runs", "exports"):
            (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("audit.BUDGET", 1e6)  # an audit's attacks by matching take the minutes it has
    text = path.read_text()
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    names: dict = {}
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        assert lines and all(line.startswith("python ") for line in lines)
        for line in lines:
            run_python(shlex.split(line)[1:], monkeypatch)
