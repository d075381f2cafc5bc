"""Tables of gradient matching out of docs/results: what scripts/results_page.py writes between the markers of
docs/matching.md."""

from collections.abc import Sequence

from claim_numbers import bracketed
from results_weights import measured, one_of, read

from reports.tables import Measured, Table, markdown
from utils.statistics import describe

STARTS = ("closed_form", "defense_aware")  # attacks behind which scripts/levenberg_marquardt.py polishes
USUAL_STEPS = 8  # at most, of rows that do not say it
SOLVED = 100.0  # dB: above it every value of an 8-bit picture is right


def gradvit_mjp() -> str:
    """Return the table of scripts/reproduce/gradvit_mjp.sh: matching with and without MJP, and what it is of."""
    found = read("gradvit_mjp")
    (ratios,) = found["attacks"].values()
    lines = []
    for ratio, row in ratios.items():
        lpips = measured(one_of(row, "lpips_alex", "lpips_alex_unverified"), ".3f")
        name = "no mask" if float(ratio) == 0 else f"MJP at {ratio}"
        scores = [measured(row[key], ".2f") for key in ("psnr", "psnr_baseline")]
        lines.append(
            [name, row["images"], *scores, measured(row["ssim"], ".3f"), lpips, measured(row["seconds"], ".0f")]
        )
    header = ["model", "n", "PSNR (dB)", "mean colour (dB)", "SSIM", "LPIPS (unverified)", "seconds an image"]
    return markdown(Table(header, lines)) + f"\n{found['data']}.\n"


def polish() -> str:
    """Return the table of scripts/levenberg_marquardt.py: a row for each start under each defence."""
    cases: dict[tuple, list[dict]] = {}
    for row in read("levenberg_marquardt")["images"]:
        options = ", ".join(f"{key} {value:g}" for key, value in row["options"].items())
        case = f"{row['defence']}, {options}", row["weights"], row.get("most_steps", USUAL_STEPS)
        cases.setdefault(case, []).append(row)
    lines = [_gain(case, rows, start) for case, rows in cases.items() for start in STARTS]
    header = ["defence, start", "n", "mean colour", "start", "polished", "gain [95 %]", "better", "above 100 dB"]
    return markdown(Table(header, lines))


def _gain(case: tuple, rows: Sequence[dict], start: str) -> list:
    """Return a row of the table: PSNR in dB before and after the steps from one start."""
    defence, weights, steps = case
    about = f"{defence}, {weights} weights, `{start}`, {steps} steps"
    before, after = ([row[key] for row in rows] for key in (start, f"polished_{start}"))
    gains = [late - early for early, late in zip(before, after, strict=True)]
    spreads = (describe(values) for values in ([row["mean_colour"] for row in rows], before, after))
    shown = [Measured(one["mean"], one["std"]) for one in spreads]
    counts = [
        f"{sum(gain > 0 for gain in gains)} of {len(rows)}",
        f"{sum(one > SOLVED for one in after)} of {len(rows)}",
    ]
    return [about, len(rows), *shown, bracketed(describe(gains), "").strip(), *counts]
