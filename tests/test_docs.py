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

from data.demo import write_photographs
from options import AttackConfig, ConsistencyConfig, EvalConfig, TrainConfig
from reports.prose import wrap_markdown
from reports.tables import COLUMNS
from scripts.check_docs import read_commands
from utils.commandline import load
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
SCRIPTS = {"train": TrainConfig, "eval": EvalConfig, "consistency": ConsistencyConfig, "attack": AttackConfig}
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


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        other = page.parent / target if target else page
        assert other.exists(), f"{page.relative_to(ROOT)} links to {target}"
        assert not anchor or anchor in anchors(other), f"{page.relative_to(ROOT)} links to #{anchor} of {other.name}"


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command of a page that starts one of SCRIPTS."""
    found = []
    for line in (line for command in read_commands(page) for line in command.text.splitlines()):
        if (start := re.search(rf"(?:^|\s)(?=(?:{'|'.join(SCRIPTS)})\.py --?\w)", line)) and "..." not in line:
            line = line.replace("$model", "mjp")  # of a loop over models
            found.append(shlex.split(line[start.end() :].replace("[", "").replace("]", "")))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_understood_by_its_script(page):
    for script, *arguments in commands(page):
        try:
            load(SCRIPTS[script.removesuffix(".py")], arguments)
        except UserError as error:
            pytest.fail(f"{page.name}: python {shlex.join([script, *arguments])}: {error}")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_fit_a_screen(page):
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert all(line.replace(r"\|", "").count("|") <= COLUMNS + 1 for line in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_fits_a_screen_and_figures_have_captions(page):
    text = page.read_text()
    assert wrap_markdown(text) == text, f"long lines: python -m reports.prose {page.relative_to(ROOT)}"
    for figure in re.finditer(r"^!\[.*\]\(.*figures/.*\)$", text, flags=re.MULTILINE):
        assert text[figure.end() :].startswith("\n\n*"), f"{figure[0]} needs a caption: n, and what it is a mean of"


def test_commands_are_found():
    assert len(commands(ROOT / "README.md")) >= 8


def test_commands_of_the_readme_write_to_folders_of_their_own():
    text = (ROOT / "README.md").read_text()
    folders = re.findall(r"(?:--output |OUT=)(runs/[\w/.]+)", text)
    assert len(folders) == len(set(folders)) >= 8


def test_the_first_attack_of_the_readme_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    """Two of its six photographs; its example in Python gives the same photograph back."""
    text = (ROOT / "README.md").read_text()
    write_photographs(tmp_path / "datasets" / "photographs")
    monkeypatch.chdir(tmp_path)
    (command,) = (words for words in commands(ROOT / "README.md") if "runs/first_attack" in words)
    run_python([str(ROOT / command[0]), *command[1:], "--num_images", "2"], monkeypatch)
    printed = capsys.readouterr()
    printed = printed.out + printed.err
    (expected,) = (found.expected for found in read_commands(ROOT / "README.md") if "\n" in found.expected)
    for line in expected.splitlines()[2:]:  # rows of the table: their names, and the scores that are equal for each
        name, mean = re.match(r"(.+?)  +(\S+)", line).groups()
        (found,) = re.findall(rf"^{re.escape(name)}  +(\S+)", printed, flags=re.MULTILINE)
        assert mean not in ("100", "1") or found == mean
    assert expected.splitlines()[0].replace("6 of 6 images", "2 of 2 images") in printed
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["score"].item() > 60 and "dB" in capsys.readouterr().out


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
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)  # an audit's attacks by matching take the minutes it has
    names: dict = {}
    for command in (command for command in read_commands(path) if command.language in ("bash", "python")):
        text = command.text
        for long, short in SMALLER.items():
            text = text.replace(long, short)
        if command.language == "python":
            exec(text, names)
        else:
            run_python(shlex.split(text.removeprefix("python ")), monkeypatch)
