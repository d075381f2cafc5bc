"""What all tests share: reference numbers of published implementations, where they are at hand, and one thread."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # on tensors this small more threads only wait for each other, for minutes on a busy machine
GOLDEN = Path(__file__).parents[2] / "shared" / "golden"  # beside the repository, not in it


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """golden('NAME') is the arrays of NAME.npz, golden('NAME.json') that file; without the folder the test skips."""

    def read(name: str) -> dict:
        if not GOLDEN.is_dir():
            pytest.skip(f"reference numbers not found: {GOLDEN}")
        if name.endswith(".json"):
            return json.loads((GOLDEN / name).read_text())
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return dict(arrays)

    return read
