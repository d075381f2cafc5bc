"""Every folder of ours that is imported or run with `python -m` is a regular package.

A folder without `__init__.py` loses against any installed package of the same name, wherever it stands on the path:
Opacus, for one, ships a top-level `benchmarks`. `tests/` is the exception: pytest imports its files one by one.
"""

import ast
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = (".py", ".md", ".sh", ".yaml", ".ipynb", ".toml", ".sbatch", "")  # "" is Makefile and .ci/run
LISTED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
FILES = [ROOT / name for name in LISTED.stdout.split("\0") if name and Path(name).suffix in TEXTS]
FILES = [path for path in FILES or ROOT.rglob("*") if path.is_file() and not path.is_relative_to(ROOT / ".venv")]


def modules_run(text: str) -> set[str]:
    """Return the dotted names that follow `-m`, as on a command line or in a list of arguments."""
    return set(re.findall(r"""-m["',\s]+([a-z_]\w*(?:\.\w+)*)""", text))


def modules_imported(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def packages() -> list[str]:
    """Return the folders of ours, dotted, that lead to a module that is imported or run."""
    names = set()
    for path in FILES:
        text = path.read_text()
        names |= modules_run(text) | (modules_imported(text) if path.suffix == ".py" else set())
    names = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
    folders = {name for name in names if (ROOT / name.replace(".", "/")).is_dir()}
    return sorted(name for name in folders if name.split(".")[0] not in ("tests", "docs"))


def test_commands_and_imports_are_found():
    assert modules_run('$(VENV) -m benchmarks.attacks\n["-m", "eval.mse"]') == {"benchmarks.attacks", "eval.mse"}
    assert modules_imported("import a.b\nfrom c.d import e") == {"a.b", "c.d", "c.d.e"}
    assert {"attacks", "benchmarks", "data", "defenses.ats", "eval", "scripts"} <= set(packages())


@pytest.mark.parametrize("package", packages())
def test_a_package_is_ours_whatever_else_is_installed(package, tmp_path):
    *parents, name = package.split(".")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    found = PathFinder.find_spec(name, [str(ROOT.joinpath(*parents)), str(tmp_path)])
    assert found.origin == str(ROOT.joinpath(*parents, name, "__init__.py"))


@pytest.mark.parametrize("module", sorted(modules_run((ROOT / "Makefile").read_text())))
def test_make_runs_modules_that_exist(module):
    """Found, not run: with everything that is installed on the path, and the repository first as `python -m` has it."""
    *parents, name = module.split(".")
    folders = [str(ROOT.joinpath(*parents)), *([] if parents else sys.path)]
    assert PathFinder.find_spec(name, folders) is not None, f"make runs `python -m {module}`: no such module"
