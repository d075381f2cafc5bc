"""A test that does not run proves nothing: only what a machine may lack, and is named here, lets a test skip."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
REASONS = {
    "no GPU here",
    "no Chromium or Chrome to open the report in",
    "Flower is not installed, and FLOWER_PYTHON names no interpreter with it",
    "needs /proc to find the second process",
    "torch.compile needs a C++ compiler and Python's headers",
    "timm 1.0.26 takes no image",
}


def skips(source: str) -> list[str]:
    """Return the reason of every `skipif` in a test file, and the bare name of any other way out of a test."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in ("skip", "skipif", "importorskip", "xfail"):
                reason = {keyword.arg: keyword.value for keyword in node.keywords}.get("reason")
                found.append(ast.literal_eval(reason) if reason and name == "skipif" else name)
    return found


def test_a_skip_is_found():
    source = 'mark.skipif(x, reason="no GPU here")\npytest.importorskip("a")\npytest.skip("b")\nmark.xfail()'
    assert skips(source) == ["no GPU here", "importorskip", "skip", "xfail"]


def test_nothing_skips_for_want_of_a_package_or_a_file():
    for path in TESTS.rglob("*.py"):
        assert set(skips(path.read_text())) <= REASONS, path
