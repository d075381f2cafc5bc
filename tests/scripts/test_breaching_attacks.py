"""scripts/breaching_attacks.py: what breaching is given, and how the pictures it returns are scored."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from scripts import breaching_attacks
from scripts.interval_study import VICTIM, Cell, instance
from utils.errors import UserError


class Attacker:
    """An attacker of breaching's kind, that checks what it is given and returns the pictures `answer`."""

    def __init__(self, name: str, model, answer):
        self.name, self.model, self.answer = name, model, answer

    def reconstruct(self, payload, shared, secrets):
        (shared,), (payload,) = shared, payload
        shapes = [value.shape for value in shared["gradients"]]
        assert shapes == [value.shape for value in self.model.parameters()] and payload["metadata"]["shape"] == (
            3,
            32,
            32,
        )
        assert (shared["metadata"]["labels"] is None) == (self.name == "deepleakage")
        if self.name == "april_analytic":
            raise AssertionError("no block of its kind")
        return {"data": self.answer}, None


def test_breaching_gets_the_leak_without_what_mjp_adds_and_its_refusal_is_kept(tmp_path):
    (tmp_path / "0").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0" / "a.png")
    cell = Cell("MJP", 1, model=VICTIM | {"unknown": True}, ratio=0.5)
    one, _ = instance(cell, 0, [tmp_path / "0" / "a.png"])
    breaching = SimpleNamespace(
        get_attack_config=lambda name, overrides: (name, overrides),
        attacks=SimpleNamespace(
            prepare_attack=lambda model, loss, config: Attacker(config[0], model, one.private.model_input.flip(1))
        ),
    )
    for name in ("invertinggradients", "deepleakage"):
        found = breaching_attacks.theirs(breaching, name, one, 0, 20)
        assert breaching_attacks.nearest(found, one)[0] < 30, "colours exchanged"
    with pytest.raises(UserError, match="AssertionError: no block of its kind"):
        breaching_attacks.theirs(breaching, "april_analytic", one, 0, 20)
    row = breaching_attacks.measure(breaching, cell, [tmp_path / "0" / "a.png"], 20)
    assert row["n"] == row["psnr"]["modern"]["n"] == 1 and "april_analytic" not in row["psnr"]
    assert row["refused"] == {"april_analytic": "AssertionError: no block of its kind"}


def test_patches_in_another_order_cost_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    one, _ = instance(Cell("plain", 1), 0, [tmp_path / "a.png"])
    shifted = one.private.model_input.roll((8, 16), dims=(2, 3))
    assert breaching_attacks.nearest(shifted, one)[0] > 100


def test_a_condition_that_is_not_there_is_named_before_any_work(tmp_path):
    given = [f"--images={tmp_path}", "--only", "one picture", f"--output={tmp_path / 'a.json'}"]
    with pytest.raises(UserError, match="no condition 'one picture': choose from one image, batch of 2"):
        breaching_attacks.main(given)
    assert not (tmp_path / "a.json").exists()
