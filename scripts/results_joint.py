"""The table of whole batches and masked images in docs, from what scripts/joint_table.py measured."""

import json
from pathlib import Path

from reports.tables import Measured, Table, markdown
from utils.statistics import describe

FILES = Path(__file__).resolve().parents[1] / "docs" / "results"
LIMITS = {"in_place": 60, "visible": 55, "hidden": 55}  # dB, the goals of the attack


def joint() -> str:
    """Return the table of the preset `paper`: a line for each kind of victim, over its batches."""
    found, lines = json.loads((FILES / "joint_paper.json").read_text()), []
    for name, batches in found["batches"].items():
        masked = "hidden_median" in batches[0]
        whole = "visible" if masked else "in_place"
        ends = f"{min(row[f'{whole}_min'] for row in batches):.0f} / {_mean(batches, f'{whole}_median'):.0f}"
        if masked:
            ends += f"; {min(row['hidden_min'] for row in batches):.0f} / {_mean(batches, 'hidden_median'):.0f}"
        lines.append(
            [
                _victim(name, found["cases"][name]["dtype"]),
                len(batches),
                _share(batches, whole),
                _share(batches, "hidden") if masked else "–",
                ends,
                _claimed(batches),
                f"{sum(row['exact_up_to_order' if masked else 'exact'] for row in batches)} of {len(batches)}",
                _measured([row["seconds"] for row in batches]),
            ]
        )
    header = ["victim", "n", "patches back (%)", "hidden back (%)", "smallest / median (dB)", "claimed", "exact", "s"]
    return markdown(Table(header, lines))


def _victim(name: str, dtype: str) -> str:
    return f"{name.removesuffix(f', {dtype}')}, {dtype}"


def _claimed(batches: list[dict]) -> str:
    """Return how many tokens are claimed of how many; closed_form, which answers for one image, counts none."""
    if "tokens" not in batches[0]:
        return "–"
    return f"{sum(row['found'] for row in batches)} of {sum(row['tokens'] for row in batches)}"


def _mean(batches: list[dict], key: str) -> float:
    return sum(row[key] for row in batches) / len(batches)


def _share(batches: list[dict], group: str) -> Measured:
    """Return the percentage of the patches of a group above its limit."""
    return _measured([100 * row[f"{group}_above_{LIMITS[group]}"] for row in batches])


def _measured(values: list[float]) -> Measured:
    told = describe(values)
    return Measured(told["mean"], told["std"])
