"""From results.json files to tables (Markdown, LaTeX, CSV) and figures (PNG, PDF).

    python -m eval.report --runs DeiT-S=runs/deit MJP=runs/mjp --output runs/tables

Every results.json under a folder counts as a result of its name. Several results of one kind, such as the seeds of a
training, become their mean ± sample standard deviation; a single one keeps the spread it brings. Captions say which.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.reconstruction import METRICS
from reports.charts import line_charts
from reports.tables import Measured, Table, markdown, write_table
from utils.aliases import current
from utils.errors import UserError, reason, run_command
from utils.files import write_figure
from utils.tool_parser import ToolParser

Runs = Mapping[str, Sequence[dict]]  # the contents of the results.json files of every name
CURVES = {  # file: where the rows are, their column, what it says, and how it is printed
    "accuracy": ("accuracy", "acc1", "accuracy (%)", ".1f"),
    "consistency": ("consistency", "consistency", "consistency (%)", ".1f"),
    "feature_distance": ("consistency", "diff_norm", "feature difference norm", ".2f"),
}
SCORES = {  # suites of one row: columns and what they say
    "imagenet_a": {"acc1": "top-1 (%)", "rms_calibration_error": "RMS calibration error (%)", "aurra": "AURRA (%)"},
    "imagenet_o": {"aupr": "AUPR (%)", "auroc": "AUROC (%)", "fpr95": "FPR at 95 % recall (%)"},
    "calibration": {
        "acc1": "top-1 (%)",
        "confidence": "confidence (%)",
        "rms_calibration_error": "RMS calibration error (%)",
        "mean_calibration_error": "mean calibration error (%)",
        "aurra": "AURRA (%)",
        "soft_f1": "soft F1 (%)",
        "temperature": "temperature",
    },
}
MEANS = {"mce": "mCE, normalised", "mce_unnormalised": "mCE, unnormalised", "relative_mce": "relative mCE"}


def read_results(path: str | Path, *needed: str) -> dict:
    """Return the content of a results.json. Raises UserError when there is none, it is not one, or a key that is needed
    is not in it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: run the script that makes it")
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' is not a results.json ({reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' is not a results.json: it holds a {type(content).__name__}")
    if missing := [key for key in needed if key not in current(content)]:
        raise UserError(f"'{path}' has no '{missing[0]}': it is of another run or script")
    return current(content)


def collect(path: str | Path) -> list[dict]:
    """Return the contents of a results.json, or of all in a folder and below it, in the order of their names."""
    path = Path(path)
    files = sorted(path.rglob("results.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"'{path}' holds no results.json: it is not the folder of a finished run")
    return [read_results(file) for file in files]


def found(runs: Runs, key: str) -> dict[str, list]:
    """Return what stands under `key` in the results of every name that has it."""
    values = {name: [content[key] for content in contents if key in content] for name, contents in runs.items()}
    return {name: value for name, value in values.items() if value}


def over_runs(values: Sequence[float | None], digits: str = ".1f", std: float | None = None) -> Measured:
    """Return the mean and sample standard deviation of the values there are; `std` is the spread of a single one."""
    known = [value for value in values if value is not None]
    spread = statistics.stdev(known) if len(known) > 1 else std
    return Measured(statistics.fmean(known) if known else None, spread if known else None, digits, digits)


def curve(rows: Sequence[Sequence[dict]], metric: str, digits: str = ".1f") -> dict[float, Measured]:
    """Return {mask ratio: value} of one model: rows of eval.py or consistency.py, a list per run."""
    points = {}
    for same in zip(*rows, strict=True):
        draws = same[0][f"{metric}_std"] if same[0]["seeds"] > 1 else None
        points[same[0]["mask_ratio"]] = over_runs([row[metric] for row in same], digits, draws)
    return points


def ratio_table(rows: Sequence[dict], columns: Mapping[str, str]) -> Table:
    """Return what eval.py and consistency.py print: mask ratios down; `columns`, with intervals over images if any."""
    header, lines = ["mask ratio"], []
    for key, what in columns.items():
        header += [what, "95 % interval"] if f"{key}_low" in rows[0] else [what]
    for row in rows:
        line = [f"{row['mask_ratio']:g}"]
        for key in columns:
            line.append(over_runs([row[key]], ".2f", row[f"{key}_std"] if row["seeds"] > 1 else None))
            if f"{key}_low" in row:
                line.append(f"{row[f'{key}_low']:.2f} to {row[f'{key}_high']:.2f}")
        lines.append([*line, row["images"], row["skipped"], row["seeds"]])
    return Table([*header, "images", "skipped", "seeds"], lines)


def curves(runs: Runs, key: str, metric: str, digits: str = ".1f") -> dict[str, dict[float, Measured]]:
    """Return `curve` of every name. Raises UserError unless all were measured at the same mask ratios."""
    named = found(runs, key)
    grids = {name: {tuple(row["mask_ratio"] for row in rows) for rows in results} for name, results in named.items()}
    if len(set().union(*grids.values())) > 1:
        raise UserError(f"the {key} of {', '.join(grids)} was not measured at the same mask ratios: repeat one of them")
    return {name: curve(results, metric, digits) for name, results in named.items()}


def spread_of(named: Mapping[str, Sequence[Sequence[dict]]]) -> str:
    """Return what the spread in a table of curves is taken over, in words."""
    numbers = {len(results) for results in named.values()}
    draws = {row["seeds"] for results in named.values() for rows in results for row in rows}
    times = "/".join(map(str, sorted(numbers)))
    if max(numbers) > 1:
        return f"± sample standard deviation, n = {times} runs"
    return f"± sample standard deviation over {max(draws)} mask draws, one run" if max(draws) > 1 else "one run"


def curve_table(runs: Runs, key: str, metric: str, what: str, digits: str) -> Table | None:
    """Return a table: names down, mask ratios across; None where there are no results of the kind."""
    lines = curves(runs, key, metric, digits)
    if not lines:
        return None
    ratios = list(next(iter(lines.values())))
    rows = [[name, *points.values()] for name, points in lines.items()]
    caption = f"{what[0].upper()}{what[1:]} against the mask ratio; {spread_of(found(runs, key))}"
    return Table([what, *(f"{ratio:g}" for ratio in ratios)], rows, caption)


def score_table(runs: Runs, key: str, columns: Mapping[str, str]) -> Table | None:
    """Return a table: names down, the scores of a suite across."""
    rows = []
    for name, results in found(runs, key).items():
        scores = [over_runs([rows[0][column] for rows in results], ".2f") for column in columns]
        rows.append([name, *scores, results[0][0]["images"]])
    return Table(["model", *columns.values(), "images"], rows, key.replace("_", "-")) if rows else None


def corruption_table(runs: Runs) -> Table | None:
    """Return a table: names across, down the means of ImageNet-C, then the mean top-1 error of every corruption there
    is."""
    from eval.mce import CORRUPTIONS  # of scipy and scikit-image, which other tables do without

    named = found(runs, "mce")
    every = [one for results in named.values() for one in results]
    rows = [
        [what, *(over_runs([one[key] for one in results]) for results in named.values())]
        for key, what in MEANS.items()
        if any(one[key] is not None for one in every)
    ]
    rows += [
        [
            kind.replace("_", " "),
            *(over_runs([one["errors"].get(kind) for one in results]) for results in named.values()),
        ]
        for kind in CORRUPTIONS
        if any(kind in one["errors"] for one in every)
    ]
    return Table(["top-1 error (%)", *named], rows, "ImageNet-C: mCE, and mean error per corruption") if rows else None


def position_table(runs: Runs) -> Table | None:
    """Return a line per name, table and probe: the error of a linear probe of the position embeddings, and chance."""
    rows = [
        [
            name,
            *(row[key].replace("_", " ") for key in ("table", "probe", "target")),
            f"{row['dimensions']}-D",
            Measured(row["mae"], row["mae_std"], ".3f", ".3f"),
            Measured(row["chance"], None, ".2f"),
            row["repeats"],
        ]
        for name, results in found(runs, "position").items()
        for rows in results
        for row in rows
    ]
    caption = "Mean absolute error of linear probes in patches; ± sample standard deviation over random splits"
    header = ["model", "table", "probe", "target", "dimensions", "error", "chance", "splits"]
    return Table(header, rows, caption) if rows else None


def attention_table(runs: Runs) -> Table | None:
    """Return a line per name and mask ratio: does the attention of the class token follow the content or stay in
    place?"""
    columns, rows = {"follows_content": "follows content", "stays_in_place": "stays in place"}, []
    for name, results in found(runs, "attention").items():
        every = [row for rows in results for row in rows]
        for ratio in sorted({row["mask_ratio"] for row in every}):
            group = [row for row in every if row["mask_ratio"] == ratio]
            cells = [over_runs([row[key] for row in group], ".2f") for key in columns]
            rows.append([name, f"{ratio:g}", *cells, len(group)])
    caption = (
        "Correlation of the class token's attention with that of the clean image; ± standard deviation over images"
    )
    return Table(["model", "mask ratio", *columns.values(), "images"], rows, caption) if rows else None


def attack_table(runs: Runs) -> Table | None:
    """Return a table: campaigns of attack.py across, the summary of every score down."""
    every = [(name, one) for name, results in found(runs, "summary").items() for one in results if "psnr" in one]
    rows = [
        [str(metric), *(summarised(summary.get(key)) for _, summary in every)]
        for key, metric in METRICS.items()
        if any(key in summary for _, summary in every)
    ]
    header = ["score", *(f"{name}, n = {summary['psnr']['n']}" for name, summary in every)]
    return (
        Table(header, rows, "Reconstructions; ± standard deviation over images, infinite values left out")
        if rows
        else None
    )


def privacy_table(runs: Runs) -> Table | None:
    """Return a line per run whose weights were trained with a guarantee: `none` once an update had no defence."""
    every = [(name, one) for name, contents in runs.items() for one in contents if "epsilon" in one]
    told = {(name, *(one.get(key) for key in ("epsilon", "epsilon_shuffled", "delta"))) for name, one in every}
    rows = [
        [name, *("none" if value is None else f"{value:.4g}" for value in values)]
        for name, *values in sorted(told, key=str)
    ]
    caption = "Differential privacy of the weights, up to delta: epsilon under Poisson sampling, and as run, shuffled"
    return Table(["model", "epsilon", "epsilon, shuffled", "delta"], rows, caption) if rows else None


def summarised(row: Mapping | None, digits: str = ".3g", std_digits: str = ".2g") -> Measured:
    """Return an entry {"mean", "std", "n"} of a summary of attack.py as a cell."""
    mean, std = (row["mean"], row["std"]) if row else (None, None)
    return Measured(mean, std, digits, std_digits)


def tables(runs: Runs) -> dict[str, Table]:
    """Return every table that the results allow, by file name."""
    made = {file: curve_table(runs, *how) for file, how in CURVES.items()}
    made |= {key: score_table(runs, key, columns) for key, columns in SCORES.items()}
    made |= {"imagenet_c": corruption_table(runs), "position": position_table(runs)}
    made |= {"attention": attention_table(runs), "attacks": attack_table(runs), "privacy": privacy_table(runs)}
    return {name: table for name, table in made.items() if table}


def curve_panels(runs: Runs) -> list[dict]:
    """Return panels of `line_charts` in the layout of the MJP paper: top-1 accuracy, then consistency, against mask
    ratio."""
    labels = {"accuracy": "Top-1 Acc. (%)", "consistency": "Consistency (%)"}
    panels = []
    for file, label in labels.items():
        key, metric, what, _ = CURVES[file]
        lines = curves(runs, key, metric)
        if lines:
            panels.append(
                {
                    "title": what.split(" ")[0].capitalize(),
                    "xlabel": "Masking ratio γ",
                    "ylabel": label,
                    "lines": {
                        name: ([*points], [point.mean for point in points.values()]) for name, points in lines.items()
                    },
                    "spread": {name: [point.std or 0 for point in points.values()] for name, points in lines.items()},
                }
            )
    return panels


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser(
        prog="python -m eval.report",
        description=__doc__,
    )
    what = "folders of runs, or results.json files, each with the name it has in tables (default: that of the folder)"
    parser.add_argument("--runs", nargs="+", metavar="NAME=DIR", required=True, help=what)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for tables and figures (default: only print)"
    )
    args = parser.parse_args(argv)
    runs: dict[str, list[dict]] = {}
    for argument in args.runs:
        name, equals, path = argument.partition("=")
        path = Path(path if equals else argument)
        runs.setdefault(name if equals else path.name, []).extend(collect(path))
    made = tables(runs)
    if not made:
        raise UserError(f"no results of eval.py, consistency.py or attack.py in {', '.join(args.runs)}")
    for name, table in made.items():
        print(f"{table.caption}\n\n{markdown(table)}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            write_table(args.output / name, table)
    if args.output and (panels := curve_panels(runs)):
        write_figure(args.output / "ratio_curves", line_charts(panels))


if __name__ == "__main__":
    run_command(main)
