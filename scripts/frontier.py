"""What a defence costs and what it hides: from the runs of a benchmark, one table, one figure, a verdict for each row.

    python scripts/benchmark.py --plan configs/benchmark/frontier.yaml --output runs/frontier
    python scripts/frontier.py --runs runs/frontier --output docs/results/frontier.json \\
        --figure docs/figures/frontier.png

For every defence: accuracy over the seeds, the best PSNR of attackers who do not know it and of those who do (patches
in any order), the share of an image's bits that some attack proves leaked, and the share that is hidden from every
attack: in one update, and over a training in which each image takes part once an epoch (information of releases adds up
at most). The verdict asks for stated levels: `proved`, if at least PROVED percent stay hidden over the training; `not
broken`, if no attack certifies a bit and the best is within LEVEL dB of a picture in the mean colour; else `leaks`.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.report import read_results
from reports.charts import new_figure, open_axes
from reports.tables import Measured, Table, markdown
from scripts.benchmark_plan import cells_of
from utils.errors import UserError, run_command
from utils.files import write_atomic, write_json
from utils.statistics import describe
from utils.tool_parser import ToolParser

HEADS = ["defence", "accuracy (%)", "naive (dB)", "adaptive (dB)", "proved leaked (%)", "hidden, one update (%)",
         "hidden, training (%)", "verdict"]  # fmt: skip
PROVED = 90.0  # percent of an image's bits hidden from every attack, over the whole training
LEVEL = 1.0  # dB above a picture in the mean colour of the image
USEFUL = 7 / 8  # of the accuracy without a defence: 70 % where that has 80 %
COLORS = {"proved": "#0f766e", "not broken": "#94a3b8", "leaks": "#c2410c"}
SAYS = {
    "proved": f"at least {PROVED:g} % of an image proved hidden over the training",
    "not broken": "not broken by the attacks here, no proof",
    "leaks": f"an attack certifies bits or is over {LEVEL:g} dB above the mean colour",
}


def rows_of(runs: Path) -> list[dict]:
    """Return a row for every defence of a benchmark's folder. Raises UserError where an attack has no interval."""
    return [row_of(cell, runs) for cell in cells_of(runs / "results.json")]


def row_of(cell: dict, runs: Path) -> dict:
    """Return the row of a cell: its scores, and what is proved by its attacks and over its trainings."""
    place = runs / cell["model"]
    trainings = sorted((place / cell.get("weights", cell["defense"])).glob("train_*/results.json"))
    trained = [read_results(file) for file in trainings]
    found = [
        read_results(place / cell["defense"] / name / "results.json").get("interval") for name in cell["psnr_by_attack"]
    ]
    if not trained or not all(found):
        what = "an attack in" if trained else "no training beside"
        raise UserError(f"{what} '{place / cell['defense']}' has no interval: run scripts/benchmark.py again")
    bits = found[0]["bits"]
    reachable = min(bits - one["hidden"]["mean"] for one in found)
    best = {who: max(cell[who]["psnr"], cell[who].get("psnr_patches") or 0) for who in ("naive", "adaptive")}
    row = {
        "defense": cell["defense"],
        "strength": cell.get("strength", "–"),
        "accuracy": describe([run["acc1"] for run in trained]),
        "attack": cell["adaptive"]["attack"],
        "attacks": cell["psnr_by_attack"],
        **best,
        "no_leak": cell["naive"]["no_leak"],
        "n": cell["naive"]["n"],
        "leaked": 100 * max(one["leaked"]["mean"] for one in found) / bits,
        "hidden": 100 * (1 - reachable / bits),
        "bits": bits,
        "bits_training": trained[0]["epochs"] * reachable,
        "hidden_training": 100 * max(0.0, 1 - trained[0]["epochs"] * reachable / bits),
        "epochs": trained[0]["epochs"],
        "epsilon": trained[0].get("epsilon_shuffled"),
    }
    return row | {"verdict": verdict(row)}


def verdict(row: dict) -> str:
    """Return what the numbers of a row say of a defence at the stated levels: a key of SAYS."""
    if row["hidden_training"] >= PROVED:
        return "proved"
    return "not broken" if row["leaked"] == 0 and row["adaptive"] <= row["no_leak"] + LEVEL else "leaks"


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    keys = ("naive", "adaptive", "leaked", "hidden", "hidden_training")
    lines = [
        [row["defense"], accuracy(row), *(Measured(row[key]) for key in keys), f"**{row['verdict']}**"] for row in rows
    ]
    return markdown(Table(HEADS, lines))


def accuracy(row: dict) -> Measured:
    return Measured(row["accuracy"]["mean"], row["accuracy"]["std"])


def finding(rows: list[dict], base: str = "none") -> str:
    """Return which defences hold at a useful accuracy, and what the cheapest costs that hold at all."""
    plain = next(row for row in rows if row["defense"] == base)["accuracy"]["mean"]
    least, parts = USEFUL * plain, []
    for kind, what in (("proved", "is proved to hide images"), ("not broken", "was not broken")):
        holds = sorted((row for row in rows if row["verdict"] == kind), key=lambda row: -row["accuracy"]["mean"])
        useful = [row for row in holds if row["accuracy"]["mean"] >= least]
        text = ", ".join(f"`{row['defense']}` ({accuracy(row)} %)" for row in useful) or "nothing here"
        parts.append(f"At a useful accuracy, {least:.1f} % (seven eighths of the plain {plain:.1f} %), {what}: {text}.")
        if holds and not useful:
            parts[-1] += f" The nearest, `{holds[0]['defense']}`, has {accuracy(holds[0])} %."
    for row in (row for row in rows if row["verdict"] == "proved"):
        passed = f"at most {row['bits_training']:,.0f} of the {row['bits']:,.0f} bits of an image pass"
        says = f"Of `{row['defense']}` {passed} in the {row['epochs']} updates it takes part in"
        parts.append(says + (f" (epsilon {row['epsilon']:,.0f})." if row["epsilon"] else "."))
    return "\n".join(f"* {part}" for part in parts) + "\n"


def page(rows: list[dict]) -> str:
    """Return the table of docs/defenses.md with what follows from it."""
    return f"{table(rows)}\n{finding(rows)}"


def draw(rows: list[dict], path: Path) -> None:
    """Draw each defence in a line of its own: accuracy, the naive and the best attack, the verdict as colour."""
    rows = sorted(rows, key=lambda row: row["accuracy"]["mean"])
    with open_axes():
        chart = new_figure(9.0, 0.36 * len(rows) + 1.5)
        accuracy, leak = chart.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (2, 3), "wspace": 0.06})
        for line, row in enumerate(rows):
            color, ends = COLORS[row["verdict"]], [min(row[who], 100.0) for who in ("naive", "adaptive")]
            accuracy.errorbar(row["accuracy"]["mean"], line, xerr=row["accuracy"]["std"] or 0, color=color, marker="o")
            leak.plot(ends, [line] * 2, color=color, alpha=0.5, linewidth=2.5, zorder=1)
            leak.scatter(ends[0], line, facecolor="white", edgecolor=color, s=36, zorder=2)
            leak.scatter(ends[1], line, color=color, s=36, zorder=3)
        no_leak = statistics.fmean(row["no_leak"] for row in rows)
        leak.axvline(no_leak, color="#64748b", linestyle=":", linewidth=1, zorder=0)
        leak.annotate("mean colour", (no_leak, 1), (4, 2), ("data", "axes fraction"), "offset points", fontsize=8)
        for kind, says in SAYS.items():
            leak.scatter([], [], color=COLORS[kind], s=36, label=says)
        leak.set(
            xscale="log", xlabel="PSNR, patches in any order (dB, capped at 100):\nnaive attack (open), best attack"
        )
        leak.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        leak.minorticks_off()
        accuracy.set(xlabel="accuracy (%)", xlim=(0, 102), yticks=range(len(rows)))
        accuracy.set_yticklabels([row["defense"] for row in rows], fontsize=8)
        accuracy.grid(axis="x", color="#e2e8f0", linewidth=0.6)
        chart.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncol=1)
        write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=120, bbox_inches="tight"))


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of a benchmark's runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--figure", type=Path, help="PNG to draw of it")
    args = parser.parse_args(argv)
    rows = sorted(rows_of(args.runs), key=lambda row: -row["accuracy"]["mean"])
    write_json(args.output, {"command": "python scripts/frontier.py --runs DIR --output FILE", "rows": rows})
    if args.figure:
        draw(rows, args.figure)
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
