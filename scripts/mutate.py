"""Mutation testing: which small wrong changes to the code would no test see?

    python scripts/mutate.py attacks defenses models eval training --number 200 --seed 0

Draws mutants of the given files and folders (scripts/mutants.py), puts one at a time into a copy of the tree, and runs
the tests that call the changed function, shortest first, until one fails. Prints the survivors and their share per
folder, without those that tests/equivalent_mutants.yaml lists with the reason why no test can see them. A mutant with
which the tests take three times as long counts as seen.

Continues where it was stopped: in the output folder, `calls.json` says which functions each test calls (measured once
per test file), `mutants.jsonl` has a row per mutant and choice of tests. A mutant is tried again when other tests are
chosen, but not while the test that failed for it is as it was. Needs os.fork: each run starts from a process that has
torch loaded, as importing that takes longer than most tests.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.call_map import Calls, function_of  # noqa: E402
from scripts.mutants import Mutant, draw, find_mutants  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LOADED = (  # what the tests import besides our own code
    "torch", "torchvision", "timm", "lpips", "skimage.metrics", "skimage.data", "sklearn.datasets", "scipy.optimize",
    "scipy.ndimage", "matplotlib.pyplot", "tensorboard", "torch.utils.tensorboard", "torch.func", "torch.utils.data",
    "hypothesis", "jsonargparse", "yaml", "PIL.Image", "tqdm", "safetensors.torch",
)  # fmt: skip


CRASHED = 70  # no exit status of pytest


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="Python files, or folders of them, to change.")
    parser.add_argument("--number", type=int, default=200, help="mutants to draw (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="test files or folders (default: tests)")
    parser.add_argument("--without", nargs="*", default=[], help="test files or folders to leave out")
    parser.add_argument("--seconds", type=float, default=120.0, help="of tests per mutant (default: 120)")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants"), help="folder (default: runs/mutants)")
    parser.add_argument("--loaded", nargs="*", default=LOADED, help="modules to import once, before the forks")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the tree (default: this repository)")
    return parser.parse_args(argv)


def python_files(root: Path, paths: list[str], pattern: str = "*.py") -> list[str]:
    found = []
    for path in paths:
        place = root / path
        if not place.exists():
            sys.exit(f"no such file or folder: {path}")
        found += sorted(place.rglob(pattern)) if place.is_dir() else [place]
    return list(dict.fromkeys(path.relative_to(root).as_posix() for path in found))


def copy_tree(root: Path, target: Path) -> None:
    """Copy what git knows or would know of; without git everything but hidden folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    names = [name for name in listed.stdout.split("\0") if name]
    names = names or [path.relative_to(root).as_posix() for path in root.rglob("[!.]*") if path.is_file()]
    for name in names:
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def in_a_fork(work: Callable[[], int], seconds: float, log: Path) -> int | None:
    """Return the exit status of work() in a process of its own that starts with ours; None if it took too long."""
    pid = os.fork()
    if not pid:
        status = CRASHED
        try:
            os.setsid()
            with open(log, "w") as file:
                for stream in (1, 2):
                    os.dup2(file.fileno(), stream)
            status = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end, status = time.monotonic() + seconds, None
    try:
        while time.monotonic() < end:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # and whatever the tests have started
        if status is None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return status


def run_tests(tree: Path, names: list[str], plugins: list | None = None, stop: bool = True) -> int:
    """Run tests, in a fork: the tree's modules are not loaded yet. Returns pytest's exit status."""
    os.chdir(tree)
    sys.path[:] = [str(tree)] + [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "scripts"))]
    for module in [name for name in sys.modules if name.split(".")[0] in ("scripts", "tests")]:
        del sys.modules[module]
    options = [
        "-q",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(tree / ".tests"),
        *(["-x"] if stop else []),
    ]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins' modules that LOADED has brought in
    return pytest.main([*options, *names], plugins or [])


class FirstFailure:
    """A plugin of pytest that writes the name of the first test that fails to a file."""

    def __init__(self, path: Path):
        self.path = path
        path.unlink(missing_ok=True)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    def name(self) -> str:
        return self.path.read_text() if self.path.exists() else ""


def measure(tree: Path, files: list[str], table: Path) -> dict[str, dict]:
    """Return {test file: {"sha", "tests": {name: {"seconds", "calls"}}}}, kept in `table`, of the tests that pass."""
    known = json.loads(table.read_text()) if table.exists() else {}
    for place, file in enumerate(files, 1):
        sha = hashlib.sha256((tree / file).read_bytes()).hexdigest()
        if known.get(file, {}).get("sha") == sha:
            continue
        calls = Calls(tree, table.parent / "trace")
        start, log = time.monotonic(), table.parent / "measure.log"
        status = in_a_fork(
            lambda calls=calls, file=file: calls.run(lambda: run_tests(tree, [file], [calls], False)), 1800, log
        )
        if status not in (0, 1, 5):  # passed, failed, none found
            sys.exit(f"{file}: the tests did not run to their end, see {log}")
        known[file] = {"sha": sha, "tests": calls.collect()}
        table.write_text(json.dumps(known))
        tests = len(known[file]["tests"])
        print(f"[{place}/{len(files)}] {file}: {tests} tests, {time.monotonic() - start:.0f} s", flush=True)
    return {file: known[file] for file in files}


def tests_of(mutant: Mutant, measured: dict[str, dict], seconds: float) -> tuple[list[str], float]:
    """Return the tests that call the changed function, shortest first, up to `seconds` in all, and how long they took.

    A change outside of functions counts for all tests that call anything in the file.
    """
    called = function_of(mutant.file, mutant.function)
    rows = []
    for file in measured.values():
        for name, test in file["tests"].items():
            calls = test["calls"]
            if called in calls or (called.endswith(":") and any(call.startswith(called) for call in calls)):
                rows.append((test["seconds"], name))
    chosen, total = [], 0.0
    for took, name in sorted(rows):
        if total + took > seconds and chosen:
            break
        chosen.append(name)
        total += took
    return chosen, total


def try_mutant(mutant: Mutant, tree: Path, names: list[str], seconds: float, log: Path) -> tuple[str, str]:
    """Return (result, test that failed).

    The result is "killed", "timeout" (also seen), or "survived"; "uncalled" where no test calls the function.
    """
    if not names:
        return "uncalled", ""
    path, first = tree / mutant.file, FirstFailure(log.with_suffix(".failed"))
    before = path.stat()
    path.write_text(mutant.apply())
    try:
        status = in_a_fork(lambda: run_tests(tree, names, [first]), seconds, log)
    finally:
        path.write_text(mutant.source)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # its compiled file stays valid
        shutil.rmtree(tree / ".tests", ignore_errors=True)
    return {0: "survived", None: "timeout"}.get(status, "killed"), first.name()


def equivalent(root: Path) -> list[tuple[str, list[str], list[str]]]:
    """Return (file, lines before, lines after) of the mutants that no test can see."""
    path = root / "tests/equivalent_mutants.yaml"
    rows = yaml.safe_load(path.read_text()) if path.exists() else []
    return [(row["file"], row["before"].strip().splitlines(), row["after"].strip().splitlines()) for row in rows or []]


def share_of(count: int, total: int) -> tuple[float, float, float]:
    """Return a share and its Wilson interval, in percent."""
    from eval.ratios import wilson  # not before the tests have run: they import the changed tree

    percent = 100 * count / total
    return percent, *wilson(percent, total)


def report(rows: list[dict]) -> str:
    survivors = [row for row in rows if row["result"] in ("survived", "uncalled")]
    lines = [
        f"{row['file']}:{row['line']} in '{row['function']}' ({row['kind']}, {row['result']})\n{row['diff']}\n"
        for row in survivors
    ]
    totals: dict[str, Counter] = {}
    for row in rows:
        for group in (row["file"].split("/")[0], "all"):
            totals.setdefault(group, Counter()).update([row["result"], "tried"])
    for group in sorted(totals, key=lambda name: (name == "all", name)):
        count = totals[group]
        real, lived = count["tried"] - count["equivalent"], count["survived"] + count["uncalled"]
        share = "{:.1f} %, 95 % interval {:.1f} to {:.1f} %".format(*share_of(lived, real)) if real else "-"
        lines.append(f"{group}: {lived} of {real} survived ({share}), {count['equivalent']} more are equivalent")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    args = parse(argv)
    root, output = args.root.resolve(), args.output.resolve()
    found = [
        mutant for file in python_files(root, args.paths) for mutant in find_mutants((root / file).read_text(), file)
    ]
    drawn = draw(found, args.number, args.seed)
    tests = python_files(root, args.tests, "test_*.py")
    left_out = set(python_files(root, args.without, "test_*.py"))
    output.mkdir(parents=True, exist_ok=True)
    for name in args.loaded:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = Path(folder).resolve() / "tree"
        copy_tree(root, tree)
        measured = measure(tree, [file for file in tests if file not in left_out], output / "calls.json")
        rows = try_all(drawn, tree, measured, args.seconds, output)
    same = equivalent(root)
    for row, mutant in zip(rows, drawn, strict=True):
        if row["result"] in ("survived", "uncalled") and (mutant.file, *mutant.changed_lines()) in same:
            row["result"] = "equivalent"
    print(report(rows))


def try_all(drawn: list[Mutant], tree: Path, measured: dict, seconds: float, output: Path) -> list[dict]:
    """Return a row per mutant; those whose row in mutants.jsonl still holds are not tried again."""
    file, known, failed = output / "mutants.jsonl", {}, {}

    def sha(name: str) -> str:
        return measured.get(name.split("::")[0], {"sha": ""})["sha"]

    def keep(row: dict) -> None:
        known[row["key"], row["tests"]] = row
        if row.get("failed") and row["failed_sha"] == sha(row["failed"]):
            failed[row["key"]] = row

    for line in file.read_text().splitlines() if file.exists() else []:
        keep(json.loads(line))
    rows = []
    for place, mutant in enumerate(drawn, 1):
        names, took = tests_of(mutant, measured, seconds)
        contents = "".join(sha(name) for name in names)
        asked = hashlib.sha256("\0".join([*names, contents]).encode()).hexdigest()[:16]
        row = failed.get(mutant.key) or known.get((mutant.key, asked))
        if row is None:
            start = time.monotonic()
            row = {"key": mutant.key, "tests": asked, "number": len(names), "file": mutant.file, "line": mutant.line}
            row |= {"function": mutant.function, "kind": mutant.kind, "diff": mutant.diff()}
            row["result"], name = try_mutant(mutant, tree, names, 3 * took + 60, output / "mutant.log")
            row |= {"failed": name, "failed_sha": sha(name), "seconds": round(time.monotonic() - start, 1)}
            keep(row)
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
        rows.append(dict(row))
        print(f"[{place}/{len(drawn)}] {row['result']}: {mutant.file}:{mutant.line} {mutant.kind}", flush=True)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
