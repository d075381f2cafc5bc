"""docs/servers.md says what its JSON says, and the detector uses the thresholds that were measured."""

import json
import runpy
from pathlib import Path

import pytest

from defenses.detector import THRESHOLDS
from scripts.servers_tables import verdict

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def study(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_page_is_what_its_script_writes():
    script = runpy.run_path(str(ROOT / "scripts" / "servers_page.py"), run_name="script_under_test")
    text = script["page"]({name: study(name) for name in script["STUDIES"]})
    assert (ROOT / "docs" / "servers.md").read_text() == text, "out of date: python scripts/servers_page.py"


def test_verdicts_follow_the_numbers():
    def cell(ratio: float, content: float, in_place: float) -> dict:
        return {
            "ratio": ratio,
            "visible": {"mean": content},
            "hidden": {"mean": content},
            "in_place": {"mean": in_place},
        }

    plain = cell(0.0, 0.9, 0.9)
    assert verdict([plain, cell(0.9, 0.85, 0.0)]).startswith("MJP protects no content and hides places")
    assert verdict([plain, cell(0.9, 0.1, 0.0)]).startswith("MJP protects content and hides places")
    assert verdict([plain, cell(0.9, 0.9, 0.8)]).startswith("MJP protects no content nor places")


def test_the_detector_uses_the_measured_thresholds():
    measured = study("detector")["all"]["thresholds"]
    assert measured.keys() == THRESHOLDS.keys()
    for name, value in measured.items():
        assert THRESHOLDS[name] == pytest.approx(value, abs=5e-3), name
