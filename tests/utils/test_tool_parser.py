"""Small tools: hyphens or underscores, and one line for what is wrong."""

import ast
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.tool_parser import ToolParser

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("place", ["benchmarks", "data", "defenses", "eval", "examples", "scripts"])
def test_every_option_of_a_tool_says_what_it_is(place):
    for path in (ROOT / place).rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        options = [call for call in calls if getattr(call.func, "attr", "") == "add_argument"]
        silent = [call for call in options if "help" not in {word.arg for word in call.keywords}]
        assert not silent, f"{path.name}: {[ast.unparse(call)[:60] for call in silent]}"


def parser() -> ToolParser:
    tool = ToolParser(prog="tool")
    tool.add_argument("--source_dir", required=True)
    tool.add_argument("--runs", nargs="*")
    tool.add_argument("--number", type=int)
    return tool


def test_hyphens_are_underscores_in_names_and_nowhere_else():
    for written in (["--source-dir", "a-b"], ["--source-dir=a-b"], ["--source_dir", "a-b"]):
        assert parser().parse_args(written).source_dir == "a-b"
    found = parser().parse_args(["--source-dir", "x", "--runs", "a-b=c-d", "e-f", "--number=-1"])
    assert (found.runs, found.number) == (["a-b=c-d", "e-f"], -1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--source-dri", "x"], "unknown option '--source_dri': did you mean '--source_dir'"),
        (["--source_dri", "x", "--source_dir", "x"], "unknown option '--source_dri': did you mean '--source_dir'"),
        (["--source_dir", "x", "y"], "unexpected 'y'"),
        (["--source_dir", "x", "--number", "many"], "invalid int value: 'many' (see tool --help)"),
        ([], "the following arguments are required: --source_dir"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        parser().parse_args(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
