"""Imports run one way: scripts -> campaigns, training -> attacks, eval -> defenses, reports -> models, data, utils."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train", "eval", "consistency", "attack", "audit", "membership")
ALLOWED = {
    "utils": {"utils"},
    "models": {"models", "utils"},
    "data": {"data", "utils"},
    "reports": {"reports", "data", "utils"},
    "eval": {"eval", "reports", "models", "data", "utils"},
    "leak_file": set(),
    "defenses": {"defenses", "models", "data", "utils"},
    "attacks": {"attacks", "defenses", "models", "utils", "leak_file"},
    "training": {"training", "defenses", "eval", "models", "data", "utils"},
    "options": {"options", "campaigns", "training", "attacks", "defenses", "eval", "models", "data", "utils"},
    "campaigns": {"campaigns", "attacks", "defenses", "eval", "reports", "models", "data", "utils", "leak_file"},
}
OURS = set(ALLOWED) | set(SCRIPTS)
PARTS = {name: sorted((ROOT / name).rglob("*.py")) or [ROOT / f"{name}.py"] for name in ALLOWED}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names & OURS


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    for path in PARTS[part]:
        assert imported(path) <= ALLOWED[part], path


def test_packages_know_neither_options_nor_scripts():
    for part in set(ALLOWED) - {"options"}:
        for path in PARTS[part]:
            assert not imported(path) & {"options", "train", "consistency", "attack", "audit", "membership"}, path


@pytest.mark.parametrize("script", SCRIPTS)
def test_entry_scripts_fit_a_screen(script):
    assert len((ROOT / f"{script}.py").read_text().splitlines()) <= (80 if script == "train" else 60)


def test_no_file_imports_one_that_imports_it():
    """Also where a function imports: a circle that waits is one all the same."""
    files = {module(path): path for part in OURS for path in PARTS.get(part, [ROOT / f"{part}.py"])}
    order = TopologicalSorter({name: named(path) & set(files) - {name} for name, path in files.items()})
    order.prepare()  # raises CycleError, which names the circle


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def named(path: Path) -> set[str]:
    """Return every module a file may mean: `from a import b` is a, or the file a/b.py."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in submodules if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= inner or {node.module}
    return found
