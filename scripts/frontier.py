"""What a defence costs and what it is proved to hide: from the runs of a benchmark, one table and one figure.

    python scripts/benchmark.py --plan configs/benchmark/frontier.yaml --output runs/frontier
    python scripts/frontier.py --runs runs/frontier --beside docs/results/benchmark_small.json \\
        --output docs/results/frontier.json --figure docs/figures/frontier.png

For every defence: accuracy, the best PSNR of attackers who do not know it and of those who do (patches in any order),
the share of an image's bits that some attack proves leaked, and the share that is hidden from every attack: in one
update, and over a training in which each image takes part once an epoch (information of releases adds up at most).
--beside: results of a benchmark of the same victim, which has no intervals.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.report import read_results
from reports.charts import new_figure, open_axes
from reports.tables import Measured, Table, markdown
from scripts.benchmark import spread_out
from scripts.benchmark_plan import cells_of
from utils.errors import UserError, run_command
from utils.files import write_atomic, write_json
from utils.tool_parser import ToolParser

HEADS = ["defence", "accuracy (%)", "naive (dB)", "adaptive (dB)", "proved leaked (%)", "hidden, one update (%)",
         "hidden, training (%)", "epsilon"]  # fmt: skip

PROVED, UNKNOWN = "#0f766e", "#94a3b8"
LINE = 3.2  # percent of accuracy that a label takes


def rows_of(runs: Path) -> list[dict]:
    """Return a row for every defence of a benchmark's folder. Raises UserError where an attack has no interval."""
    rows = []
    for cell in cells_of(runs / "results.json"):
        place = runs / cell["model"] / cell["defense"]
        training = read_results(place / "train_0" / "results.json")
        found = [read_results(place / name / "results.json").get("interval") for name in cell["psnr_by_attack"]]
        if not all(found):
            raise UserError(f"an attack in '{place}' has no interval: it ran before there were any; run it again")
        bits = found[0]["bits"]
        reachable = min(bits - one["hidden"]["mean"] for one in found)
        rows.append(
            scores(cell)
            | {
                "leaked": 100 * max(one["leaked"]["mean"] for one in found) / bits,
                "hidden": 100 * (1 - reachable / bits),
                "hidden_training": 100 * max(0.0, 1 - training["epochs"] * reachable / bits),
                "epsilon": training.get("epsilon_shuffled"),
            }
        )
    return rows


def scores(cell: dict) -> dict:
    """Return the row of a benchmark's cell, without an interval."""
    best = {who: max(cell[who]["psnr"], cell[who].get("psnr_patches") or 0) for who in ("naive", "adaptive")}
    about = {"defense": cell["defense"], "accuracy": cell["acc1"], "attack": cell["adaptive"]["attack"]}
    return about | best | {"no_leak": cell["naive"]["no_leak"], "n": cell["naive"]["n"]}


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, the most accurate first."""
    keys = ("accuracy", "naive", "adaptive", "leaked", "hidden", "hidden_training", "epsilon")
    lines = [[row["defense"], *(Measured(row.get(key)) for key in keys)] for row in rows]
    return markdown(Table(HEADS, lines))


def draw(rows: list[dict], path: Path) -> None:
    """Draw accuracy against the best attack, and the bits of an update that are proved hidden as colour."""
    with open_axes():
        chart = new_figure(7.6, 5.0)
        axes = chart.add_subplot()
        heights = spread_out([row["accuracy"] for row in reversed(rows)], LINE)[::-1]
        for row, height in zip(rows, heights, strict=True):
            ends = [min(row[who], 100.0) for who in ("naive", "adaptive")]
            axes.plot(ends, [row["accuracy"]] * 2, color="#cbd5e1", linewidth=1, zorder=1)
            axes.scatter(
                ends[1], row["accuracy"], color=PROVED if row.get("hidden", 0) > 90 else UNKNOWN, s=40, zorder=2
            )
            line = {"arrowstyle": "-", "color": "#cbd5e1", "linewidth": 0.6, "relpos": (0, 0.5)}
            place = ends[1], row["accuracy"]
            axes.annotate(row["defense"], place, (135, height), fontsize=8, va="center", arrowprops=line)
        axes.axvline(rows[0]["no_leak"], color="#64748b", linestyle=":", linewidth=1)
        names = {PROVED: "over 90 % of an image provably hidden in one update", UNKNOWN: "no interval measured"}
        for color, name in names.items():
            axes.scatter([], [], color=color, s=40, label=name)
        axes.set(
            xscale="log", xlabel="PSNR of the best attack, patches in any order (dB, capped at 100); left is private"
        )
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.set(ylabel="accuracy (%)", xlim=(5, 420))
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
        write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=120, bbox_inches="tight"))


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of a benchmark's runs")
    parser.add_argument("--beside", type=Path, help="results.json of a benchmark of the same victim")
    parser.add_argument("--output", type=Path, required=True, help="JSON to write")
    parser.add_argument("--figure", type=Path, help="PNG to draw of it")
    args = parser.parse_args(argv)
    rows = rows_of(args.runs)
    if args.beside:
        known = {row["defense"] for row in rows}
        rows += [scores(cell) for cell in cells_of(args.beside) if cell["defense"] not in known]
    rows.sort(key=lambda row: -row["accuracy"])
    write_json(args.output, {"command": "python scripts/frontier.py --runs DIR --output FILE", "rows": rows})
    if args.figure:
        draw(rows, args.figure)
    print(table(rows))


if __name__ == "__main__":
    run_command(main)
