"""scripts/mutate.py: what is changed, which tests are run, and what it says of a small project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts.call_map import enclosing
from scripts.mutants import draw, find_mutants

ROOT = Path(__file__).parents[2]
# The small project needs no plugin of pytest, and every fork would load them anew.
BARE = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def changes(source: str, kind: str) -> set[str]:
    return {mutant.apply() for mutant in find_mutants(source, "a.py") if mutant.kind == kind}


@pytest.mark.parametrize(
    ("kind", "source", "wanted"),
    [
        ("comparison", "a < b", {"(a <= b)", "(a >= b)"}),
        ("comparison", "a is not b", {"(a is b)"}),
        ("arithmetic", "a - b * c", {"(a + b * c)", "a - (b / c)"}),
        ("arithmetic", "a += 1", {"a -= 1"}),
        ("boolean", "a or b", {"(a and b)"}),
        ("sign", "f(not a, -b)", {"f(a, -b)", "f(not a, b)"}),
        ("constant", "f(True, 3)", {"f(False, 3)", "f(True, 4)"}),
        ("constant", "0.5 - 0.0", {"1.0 - 0.0", "0.5 - 1.0"}),
        ("condition", "a if b else c", {"(a if not b else c)"}),
        ("keyword", "f(a, b=1, **c)", {"f(a, **c)"}),
        ("arguments", "f(a, b, c)", {"f(b, a, c)"}),
        ("arguments", "f(a, *b)", set()),
        ("return", "def f():\n    return a", {"def f():\n    return None"}),
        ("return", "def f():\n    return None", set()),
        ("statement", "f(a)\na[0] = b", {"pass\na[0] = b", "f(a)\npass"}),
        ("statement", "if a:\n    raise b\nc = d", {"if a:\n    pass\nc = d"}),
        ("constant", 'def f(a: "x" = 1) -> 2:\n    "3"', {'def f(a: "x" = 2) -> 2:\n    "3"'}),
        ("constant", 'f"{4}é" + g(é=5)', {'f"{4}é" + g(é=6)'}),
        ("statement", 'if __name__ == "__main__":\n    main()', set()),
    ],
)  # fmt: skip
def test_one_thing_is_changed_at_a_time(kind, source, wanted):
    assert changes(source, kind) == wanted


def test_a_mutant_says_where_it_is():
    source = "import a\n\n\nclass B:\n    def c(self):\n        return 1 + 2\n"
    (mutant,) = [mutant for mutant in find_mutants(source, "x/b.py") if mutant.kind == "arithmetic"]
    assert (mutant.line, mutant.function) == (6, "B.c")
    assert mutant.changed_lines() == (["return 1 + 2"], ["return (1 - 2)"])
    assert "--- x/b.py\n" in mutant.diff() and "+        return (1 - 2)" in mutant.diff()
    again = find_mutants(source.replace("1 + 2", "1 + 3"), "x/b.py")
    assert mutant.key in {other.key for other in find_mutants(source, "x/b.py")} - {other.key for other in again}


def test_the_draw_is_seeded_takes_all_kinds_and_each_mutant_once():
    source = "".join(f"a{number} = {number} + f(b={number})\n" for number in range(15)) + "c = d or e\n"
    found = find_mutants(source, "a.py")
    drawn = draw(found, 40, seed=1)
    assert drawn == draw(found, 40, seed=1) and drawn != draw(found, 40, seed=2)
    assert drawn[:10] == draw(found, 10, seed=1)
    assert {mutant.kind for mutant in drawn} == {mutant.kind for mutant in found}
    assert len({mutant.key for mutant in draw(found, 10**6, seed=0)}) == len(found)


def test_functions_are_found_by_their_first_line(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import b\n\n\n@b\ndef c():\n    def d():\n        return 1\n    return d\n\n\nclass E:\n    f = 1\n"
    )
    lines = {1: "", 4: "c", 5: "c", 6: "c.d", 7: "c.d", 8: "c", 12: "E"}
    assert {line: enclosing(str(path), line) for line in lines} == lines


CODE = '''"""A small project."""

LIMIT = 10


def clip(value):
    if value > LIMIT:
        return LIMIT
    return value


def unused(value):
    return value + 1
'''
TESTS = """
import subprocess, sys
import pytest
from code_under_test import clip

@pytest.fixture(scope="module")
def clipped():
    return clip(11)

def test_one(clipped):
    assert clipped == 10

def test_two():
    assert clip(3) == 3

def test_in_a_process():
    subprocess.run([sys.executable, "-c", "import code_under_test; code_under_test.clip(1)"], check=True)

def test_that_fails():
    assert clip(1) == 2
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> tuple[list, str, list[dict]]:
    """(command, what it printed, rows) of all mutants of a small project."""
    root = tmp_path_factory.mktemp("project")
    (root / "tests").mkdir()
    (root / "code_under_test.py").write_text(CODE)
    (root / "tests/test_code.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    command = [sys.executable, str(ROOT / "scripts/mutate.py"), "code_under_test.py", "--root", str(root)]
    command += ["--output", str(root / "out"), "--number", "99", "--loaded"]
    done = subprocess.run(command, cwd=root, env=BARE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return command, done.stdout, [json.loads(line) for line in (root / "out/mutants.jsonl").read_text().splitlines()]


def test_a_project_is_told_what_its_tests_do_not_see(project):
    _, out, rows = project
    results = {(row["function"], row["kind"], row["line"]): row["result"] for row in rows}
    assert results["", "constant", 3] == "killed"  # LIMIT
    assert results["unused", "arithmetic", 13] == results["unused", "return", 13] == "uncalled"
    assert results["clip", "return", 8] == results["clip", "return", 9] == "killed"
    boundary = [row["result"] for row in rows if row["kind"] == "comparison"]
    assert sorted(boundary) == ["killed", "survived"]  # > and >= are the same here: at the limit both return it
    assert "+    if (value >= LIMIT):" in out
    assert (
        f"all: 4 of {len(rows)} survived (50.0 %, 95 % interval 21.5 to 78.5 %)" in out
        and "0 more are equivalent" in out
    )


def test_the_calls_of_fixtures_and_of_other_processes_are_seen(project):
    command, _, _ = project
    root = Path(command[command.index("--root") + 1])
    (file,) = json.loads((root / "out/calls.json").read_text()).values()
    called = {name.split("::")[1]: "code_under_test.py:clip" in test["calls"] for name, test in file["tests"].items()}
    assert called == {"test_one": True, "test_two": True, "test_in_a_process": True}  # what fails anyway is left out


def test_it_continues_and_leaves_out_what_no_test_can_see(project):
    command, _, rows = project
    root = Path(command[command.index("--root") + 1])
    same = {"file": "code_under_test.py", "before": "if value > LIMIT:", "after": "if (value >= LIMIT):", "reason": "?"}
    (root / "tests/equivalent_mutants.yaml").write_text(yaml.safe_dump([same]))
    done = subprocess.run(command, cwd=root, env=BARE, capture_output=True, text=True)
    assert f"all: 3 of {len(rows) - 1} survived" in done.stdout and "1 more are equivalent" in done.stdout
    assert len((root / "out/mutants.jsonl").read_text().splitlines()) == len(rows)


def test_other_tests_are_asked_about_survivors_and_not_about_what_one_has_failed_for(project):
    command, _, rows = project
    root = Path(command[command.index("--root") + 1])
    (root / "tests/test_more.py").write_text(
        "from code_under_test import unused\n\ndef test_it():\n    assert unused(1) == 2\n"
    )
    done = subprocess.run(command, cwd=root, env=BARE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    more = [json.loads(line) for line in (root / "out/mutants.jsonl").read_text().splitlines()][len(rows) :]
    seen = {row["key"]: row["failed"] for row in rows if row["result"] == "killed"}
    assert seen and set(seen.values()) <= {
        f"tests/test_code.py::test_{name}" for name in ("one", "two", "in_a_process")
    }
    assert not seen.keys() & {row["key"] for row in more}
    assert {row["failed"] for row in more if row["function"] == "unused"} == {"tests/test_more.py::test_it"}


def test_the_list_of_equivalent_mutants_is_of_code_that_is_there():
    for row in yaml.safe_load((ROOT / "tests/equivalent_mutants.yaml").read_text()):
        assert row.keys() == {"file", "before", "after", "reason"} and len(row["reason"]) > 20, row
        source = (ROOT / row["file"]).read_text()
        found = [mutant.changed_lines() for mutant in find_mutants(source, row["file"])]
        assert (row["before"].splitlines(), row["after"].splitlines()) in found, row
