"""docs/coverage.md: every command's options exist, every test exists, and every row has a verdict."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from options import AttackConfig, ConsistencyConfig, EvalConfig, TrainConfig
from utils.schema import full_name, option_types, part_options

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "train.py": TrainConfig,
    "attack.py": AttackConfig,
    "eval.py": EvalConfig,
    "consistency.py": ConsistencyConfig,
}
LINES = [line for line in (ROOT / "docs" / "coverage.md").read_text().splitlines() if line.startswith("|")]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]
ROWS = [row for row in ROWS if row[0] != "capability" and not set(row[0]) <= {"-"}]


def test_the_table_is_read():
    assert len(ROWS) > 60 and {len(row) for row in ROWS} == {4}
    assert {row[2] for row in ROWS} == {"yes", "no"}
    assert len({tuple(row) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if row[2] == "yes"], ids=lambda row: row[0])
def test_a_capability_has_a_command_and_a_test_that_runs_it(row):
    path, _, name = row[3].strip("`").partition("::")
    tree = ast.parse((ROOT / path).read_text())
    found = [item.name for item in tree.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")]
    assert found and (not name or name in found), row[3]
    words = shlex.split(row[1].strip("`"))
    assert words[0] == "python", row[1]
    script = words[1] if words[1] != "-m" else words[2].replace(".", "/") + ".py"
    assert (ROOT / script).is_file(), script
    if (schema := SCHEMAS.get(script)) is None:
        text = (ROOT / script).read_text()
        assert all(re.search(rf"\b{word[2:]}\b", text) for word in words if word.startswith("--")), row[1]
        return
    chosen = dict(zip(words, words[1:], strict=False))
    for word in (word[2:] for word in words if word.startswith("--")):
        part, _, own = word.partition(".")
        selector = part.removesuffix("_options")
        if part.endswith("_options") and own:
            assert own in part_options(schema, selector, chosen[f"--{selector}"]), word
        elif word != "config":
            assert full_name(word, option_types(schema)), word
    for file in (words[place + 1] for place, word in enumerate(words) if word == "--config"):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("row", [row for row in ROWS if row[2] == "no"], ids=lambda row: row[0])
def test_what_is_not_here_says_why(row):
    assert not row[1] and len(row[3].split()) >= 2
