"""Which functions of the tree each test calls: a pytest plugin for scripts/mutate.py.

A trace function notes every Python function that starts, in the process of the tests and, through a `sitecustomize`
on PYTHONPATH, in those that they start. What runs in fixtures counts for all tests of the file, as a fixture may run
for the first of them only.
"""

import ast
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

# In a process that a test starts: note what is called, and write it down when the process ends.
CUSTOMIZE = """
    import atexit, json, os, sys, threading
    seen = {}
    def trace(frame, event, argument):
        code = frame.f_code
        if id(code) not in seen:
            seen[id(code)] = code
    def write():
        sys.settrace(None)
        places = sorted({(code.co_filename, code.co_firstlineno) for code in seen.values()})
        places = [place for place in places if place[0].startswith(os.environ["TRACE_ROOT"])]
        row = {"test": os.environ.get("PYTEST_CURRENT_TEST", ""), "places": places}
        with open(os.path.join(os.environ["TRACE_OUTPUT"], f"{os.getpid()}.json"), "w") as file:
            json.dump(row, file)
    atexit.register(write)
    threading.settrace(trace)
    sys.settrace(trace)
"""


def function_of(file: str, name: str) -> str:
    """Return how a function is called here: 'models/vit.py:build_vit'; without a name, the file's level."""
    return f"{file}:{name}"


class Calls:
    """A plugin of pytest; `collect` reads what `run` has written, in another process if need be."""

    def __init__(self, tree: Path, output: Path):
        self.tree, self.output = tree, output
        self.seen: dict[int, object] = {}
        self.calls: dict[str, set] = {}
        self.passed: dict[str, bool] = {}
        self.seconds: dict[str, float] = {}

    def run(self, tests: Callable[[], int]) -> int:
        """Run tests() under the trace function and write what was called."""
        shutil.rmtree(self.output, ignore_errors=True)
        (self.output / "site").mkdir(parents=True)
        (self.output / "site/sitecustomize.py").write_text(textwrap.dedent(CUSTOMIZE))
        path = [str(self.output / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ |= {"TRACE_ROOT": str(self.tree), "TRACE_OUTPUT": str(self.output)}
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
        sys.settrace(self.trace)
        try:
            status = tests()
        finally:
            sys.settrace(None)
        rows = {
            name: {"seconds": self.seconds[name], "places": sorted(self.calls.get(name, ()))}
            for name, passed in self.passed.items()
            if passed
        }
        (self.output / "main.json").write_text(json.dumps(rows))
        return status

    def trace(self, frame, event, argument) -> None:
        code = frame.f_code
        if id(code) not in self.seen:  # the code is kept, so its id is not given to another
            self.seen[id(code)] = code

    def note(self, name: str) -> None:
        """Count what was called since the last note for a test, or for a file."""
        seen, self.seen = self.seen, {}  # first: the trace function goes on noting, this function for one
        places = {(code.co_filename, code.co_firstlineno) for code in seen.values()}
        self.calls.setdefault(name, set()).update(place for place in places if place[0].startswith(str(self.tree)))

    def pytest_runtest_logreport(self, report) -> None:
        file = report.nodeid.split("::")[0]
        self.note(report.nodeid if report.when == "call" else file)
        self.passed[report.nodeid] = self.passed.get(report.nodeid, True) and report.passed
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call":
            sys.settrace(self.trace)  # tests of torch.compile and debuggers put theirs in its place
        if report.when == "teardown":
            self.calls[report.nodeid] = self.calls.get(report.nodeid, set())

    def pytest_sessionfinish(self) -> None:
        for name in self.passed:
            self.calls[name] = self.calls.get(name, set()) | self.calls.get(name.split("::")[0], set())

    def collect(self) -> dict[str, dict]:
        """Return {test: {"seconds", "calls": names as of `function_of`}} of tests that passed."""
        main = self.output / "main.json"
        rows = json.loads(main.read_text()) if main.exists() else {}
        for path in self.output.glob("[0-9]*.json"):
            row = json.loads(path.read_text())
            name, _, when = row["test"].rpartition(" ")
            for test, entry in rows.items():
                if test == name or (when != "(call)" and test.split("::")[0] == name.split("::")[0]):
                    entry["places"] += row["places"]
        return {
            name: {"seconds": row["seconds"], "calls": sorted({self.name(*place) for place in row["places"]})}
            for name, row in rows.items()
        }

    def name(self, file: str, line: int) -> str:
        inside = Path(file).relative_to(self.tree).as_posix() if file.startswith(str(self.tree)) else file
        return function_of(inside, enclosing(file, line))


@cache
def functions(file: str) -> list[tuple[int, int, str]]:
    """Return (first line with decorators, last line, dotted name) of all functions and classes, outer ones first."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{name}.{node.name}".lstrip(".")
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append((first, node.end_lineno, name))
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    visit(ast.parse(Path(file).read_text()), "")
    return found


def enclosing(file: str, line: int) -> str:
    """Return the innermost function or class around a line; empty at the level of the module."""
    if not file.endswith(".py") or not Path(file).exists():
        return ""
    inside = [name for first, last, name in functions(file) if first <= line <= last]
    return inside[-1] if inside else ""
