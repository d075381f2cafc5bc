"""The ablation as one table and one small file: python scripts/ablation_table.py --runs runs/ablation_cpu --output STEM

Reads RUNS/<variant>/<seed>/, as scripts/reproduce/ablation.sh leaves them. Means and sample standard deviations run
over training seeds; an attack counts with its mean over images in each. Writes STEM.md, STEM.tex, STEM.csv and
STEM.json, from which scripts/results_page.py makes its verdicts: {"data": what it was trained on, "variants": {name:
{measure: {mean, std, values}}}}.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.report import read_results
from reports.tables import Measured, Table, markdown, write_table
from utils.aliases import current_value, every_name
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.tool_parser import ToolParser

SHUFFLED = (0, 0.3, 0.5, 0.9)
SHUFFLES = {
    **{f"acc1_{ratio:g}": f"accuracy at {ratio:g} (%)" for ratio in SHUFFLED},
    **{f"consistency_{ratio:g}": f"consistency at {ratio:g} (%)" for ratio in SHUFFLED[2:]},
}
SCORED = SHUFFLES | {
    "corrupted": "accuracy on corrupted images (%)",
    "position_error": "position error of a linear probe on the PE (patches)",
}
ATTACKED = {
    "naive_visible": "naive attack, visible (dB)",
    "naive": "naive attack (dB)",
    "adaptive_visible": "adaptive attack, visible (dB)",
    "adaptive": "adaptive attack (dB)",
    "adaptive_recovered": "adaptive attack, patches above 25 dB (%)",
}
EITHER = (("closed_form", "mjp_aware"), ("token_span",))
ATTACKS = {"naive": ("closed_form", "token_span"), "adaptive": ("mjp_aware", "token_span")}


def measures(run: Path) -> dict[str, float]:
    """Return everything one trained model was measured by, under the keys of SCORED and ATTACKED."""
    found = {}
    for script, key, column in (("eval", "accuracy", "acc1"), ("consistency", "consistency", "consistency")):
        for row in read_results(run / script / "results.json", key)[key]:
            found[f"{column}_{row['mask_ratio']:g}"] = row[column]
    for name, attacks in ATTACKS.items():
        folders = [run / folder for attack in attacks for folder in every_name("attack", attack)]
        files = [folder / "results.json" for folder in folders if (folder / "results.json").is_file()]
        if not files:
            continue
        summary = read_results(files[0], "summary")["summary"]
        found[name], found[f"{name}_visible"] = summary["psnr"]["mean"], summary["psnr_visible"]["mean"]
        found[f"{name}_recovered"] = summary["patches_recovered"]["mean"]
        found["no_leak"], found["images"] = summary["psnr_baseline"]["mean"], summary["psnr"]["n"]
    if (file := run / "corruption" / "results.json").is_file():
        found["corrupted"] = statistics.fmean(row["acc1"] for row in read_results(file, "imagenet_c")["imagenet_c"])
    if (file := run / "position" / "results.json").is_file():
        for row in read_results(file, "position")["position"]:
            if (row["table"], row["probe"], row["dimensions"]) == ("learned", "absolute", 2):
                found["position_error"], found["position_chance"] = row["mae"], row["chance"]
    return found


def finished(run: Path, attacked: bool) -> bool:
    """Return whether the model was trained, scored and, where that is asked for, attacked."""
    done = {current_value("attack", part.parent.name) for part in run.glob("*/results.json")}
    scored = {"eval", "consistency"} <= done
    return scored and (not attacked or any(set(attacks) <= done for attacks in EITHER))


def collect(runs: Path, attacked: bool = True) -> dict[str, dict[str, list[float]]]:
    """Return {variant: {measure: a value per seed}}; attacked: count only models that were."""
    variants = {}
    for folder in sorted(path for path in runs.iterdir() if path.is_dir()):
        seeds = [measures(run) for run in sorted(folder.iterdir()) if finished(run, attacked)]
        if seeds:
            shared = [key for key in seeds[0] if all(key in one for one in seeds)]
            variants[folder.name] = {key: [one[key] for one in seeds] for key in shared}
    if not variants:
        raise UserError(f"'{runs}' holds no finished runs: scripts/reproduce/ablation.sh makes them")
    return variants


def summary(values: list[float]) -> dict:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": values}


def as_table(variants: dict[str, dict], columns: dict[str, str]) -> Table:
    """Return the table of {variant: {measure: `summary`}}; a column nobody has is left out."""
    columns = {key: label for key, label in columns.items() if any(key in found for found in variants.values())}
    rows = [
        [name.replace("_", " "), len(found["acc1_0"]["values"])]
        + [Measured(found[key]["mean"], found[key]["std"]) if key in found else Measured(None) for key in columns]
        for name, found in variants.items()
    ]
    return Table(["model", "seeds", *columns.values()], rows, "± sample standard deviation over training seeds")


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the ablation")
    parser.add_argument("--data", default="", help="what the models were trained on, in words, kept in STEM.json")
    parser.add_argument("--command", default="", help="what made the runs, kept in STEM.json")
    parser.add_argument("--without_attacks", action="store_true", help="models count that were scored and not attacked")
    parser.add_argument("--output", type=Path, metavar="STEM", help="also write STEM.md, .tex, .csv and .json")
    given = parser.parse_args()
    if not given.runs.is_dir():
        raise UserError(f"'{given.runs}' does not exist: scripts/reproduce/ablation.sh makes it")
    variants = collect(given.runs, not given.without_attacks)
    content = {name: {key: summary(values) for key, values in found.items()} for name, found in variants.items()}
    table = as_table(content, SCORED | ATTACKED)
    print(markdown(table), end="")
    if given.output:
        write_table(given.output, table)
        about = {"data": given.data} | ({"command": given.command} if given.command else {})
        write_json(given.output.with_suffix(".json"), about | {"variants": content})


if __name__ == "__main__":
    run_command(main)
