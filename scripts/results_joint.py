"""Tables of whole batches and masked images in docs, from what scripts/joint_table.py measured."""

import json
from pathlib import Path

from reports.tables import Measured, Table, markdown
from utils.statistics import describe

FILES = Path(__file__).resolve().parents[1] / "docs" / "results"
LIMITS = {"in_place": 60, "visible": 55, "hidden": 55}  # dB, the goals of the attack
HEADER = ["victim", "n", "patches back (%)", "hidden back (%)", "smallest / median (dB)", "claimed", "exact", "s"]


def joint(preset: str) -> str:
    """Return the table of a file docs/results/joint_PRESET.json: a line for each kind of victim, over its batches.

    Back: in its place above 60 dB; of masked images, visible ones in their places and hidden ones as a set, above 55.
    """
    found, lines = json.loads((FILES / f"joint_{preset}.json").read_text()), []
    for name, batches in found["batches"].items():
        masked, dtype = "hidden_median" in batches[0], found["cases"][name]["dtype"]
        groups = ["visible", "hidden"] if masked else ["in_place"]
        whole = sum(row["exact_up_to_order" if masked else "exact"] for row in batches)
        lines.append(
            [
                name if "float" in name else f"{name}, {dtype}",
                len(batches),
                _share(batches, groups[0]),
                _share(batches, "hidden") if masked else "–",
                "; ".join(_range(batches, group) for group in groups),
                _claimed(batches),
                f"{whole} of {len(batches)}",
                _measured([row["seconds"] for row in batches]),
            ]
        )
    return markdown(Table(HEADER, lines))


def limits() -> str:
    """Return, for every masked photograph, what single precision leaves of it in the equations of its tokens and what
    the attack finds: percentages of patches above 55 dB, visible ones in their places, hidden ones as a set."""
    limits = json.loads((FILES / "joint_limits.json").read_text())
    held, seen = limits["photographs"], limits["batches"]
    found = json.loads((FILES / "joint_paper.json").read_text())["batches"]
    lines = []
    for name, rows in held.items():
        for number, (row, one) in enumerate(zip(rows, found[name], strict=True)):
            shares = [value for part in ("visible", "hidden") for value in (row[part], one[f"{part}_above_55"])]
            told = [f"{100 * share:.0f}" for share in shares]
            lines.append([name.split()[-1], number, f"{row['resolved']} of {row['tokens']}", *told])
    heads = ["visible held", "visible found", "hidden held", "hidden found"]
    masked = Table(["ratio", "photograph", "resolved", *(f"{head} (%)" for head in heads)], lines)
    several = [
        [
            name,
            number,
            f"{100 * share:.1f}",
            f"{round((1 - one['in_place_above_60']) * one['patches'])} of {one['patches']}",
        ]
        for name, shares in seen.items()
        for number, (share, one) in enumerate(zip(shares, found[name], strict=True))
    ]
    return markdown(masked) + "\n" + markdown(Table(["victim", "batch", "resolved (%)", "patches lost"], several))


def _range(batches: list[dict], group: str) -> str:
    """Return the smallest PSNR of a group of patches and its mean median over batches."""
    smallest = min(row[f"{group}_min"] for row in batches)
    return f"{smallest:.0f} / {describe([row[f'{group}_median'] for row in batches])['mean']:.0f}"


def _share(batches: list[dict], group: str) -> Measured:
    """Return the percentage of the patches of a group above its limit."""
    return _measured([100 * row[f"{group}_above_{LIMITS[group]}"] for row in batches])


def _claimed(batches: list[dict]) -> str:
    """Return how many tokens are claimed of how many; closed_form, which answers for one image, counts none."""
    if "tokens" not in batches[0]:
        return "–"
    return f"{sum(row['found'] for row in batches)} of {sum(row['tokens'] for row in batches)}"


def _measured(values: list[float]) -> Measured:
    told = describe(values)
    return Measured(told["mean"], told["std"])


PARTS = {f"joint_{name}": name for name in ("paper", "equal", "trained", "half", "masks")}
