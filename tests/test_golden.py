"""The reference values of tests/golden: small, described, free of code, and read by tests."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "tests/golden").iterdir() if path.suffix in (".npz", ".json"))
NAMES = sorted({path.stem for path in FILES})


def test_they_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "tests/golden").iterdir()}
    assert max(sizes.values()) < 500_000, sizes
    assert sum(sizes.values()) < 5_000_000


def test_each_is_described_and_nothing_else_is():
    text = (ROOT / "tests/golden/README.md").read_text()
    described = set()
    for heading in re.findall(r"^\*\*.*?(?= \(|\()", text, flags=re.MULTILINE):
        first, *others = re.findall(r"\*\*(\w+)\*\*", heading)
        stem = first.rsplit("_", 1)[0]
        described |= {first, *(stem + other if other.startswith("_") else other for other in others)}
    assert described == set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_holds_finite_numbers_only(path):
    if path.suffix == ".json":
        assert json.loads(path.read_text())
        return
    with np.load(path, allow_pickle=False) as arrays:
        for name, value in arrays.items():
            assert value.dtype.kind in "iuf" and value.size, name
            assert np.isfinite(value).all(), name
