"""Attacks by defences by models: train under every defence, attack what came out, one table and one figure.

    torchrun --nproc_per_node 2 scripts/benchmark.py --plan configs/benchmark/small.yaml --output runs/benchmark

A plan names models (options of train.py), defences (options of train.py and attack.py) and attacks (options of
attack.py). A cell is a model under a defence: one training per seed, then attacks. The naive attacker has all of the
plan's `naive` that apply to the cell; the adaptive one also those that know the defence (`defense_aware` is told the
defence of the cell). Of either the strongest by mean PSNR counts, in any order of the patches. Cells are shared out
over the processes; a finished run is never repeated, an interrupted one continues. Every run folder is that of train.py
or attack.py.

With `choose: claim` the plan is one of conditions (batch, local steps, precision, ... beside defences), and the table
counts what attackers certify (scripts/benchmark_conditions.py). A condition says its `factor`, and `weights: NAME`
where it attacks what another one has trained. A model with `victim` (options of attack.py) is not trained, may have its
own `images` and `attack` options, and is attacked by its `attacks` alone; of a condition it takes `victim` in place of
`train`. --finished: no work, only the table of what is there. --only: a part of the attacks. --kept: what is not
finished here keeps its scores of an earlier results.json, and its row says so.
"""

import json
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.threat_model.leak import RefusalError
from reports.charts import color_of, new_figure
from reports.tables import Table, markdown
from scripts import benchmark_conditions as by_claim
from scripts.benchmark_plan import (
    OF_ATTACK,
    WHO,
    attack_settings,
    attacks_of,
    cells,
    cells_of,
    images_of,
    merged,
    options,
    read_plan,
    shares,
    trainings,
)
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_atomic, write_text
from utils.ownership import refuse_others
from utils.progress import track
from utils.run_once import run_once
from utils.tool_parser import ToolParser

TOGETHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
METRICS = ("psnr", "psnr_patches", "psnr_shown", "ssim", "lpips_alex")


def run_cells(
    plan: dict, mine: list[tuple[str, str]], output: Path, data: str, extra: list[str], name: str
) -> list[str]:
    """Run these cells, one after the other, and return which were refused, and why: the others need not wait."""
    refused = []
    for model, defense in track(mine, len(mine), name, print):
        try:
            run_cell(plan, model, defense, output, data, extra)
        except UserError as error:
            refused.append(f"{model}, {defense}: {error}")
    return refused


def run_cell(plan: dict, model: str, defense: str, output: Path, data: str, extra: list[str]) -> None:
    attacks = {name: attack for name, attack in attacks_of(plan, defense, model).items()
               if wanted(plan, f"{model}/{defense}/{name}")}  # fmt: skip
    if not attacks:
        return
    trained = trainings(plan, model, defense, output)
    own = {key: value for key, value in plan["models"][model].items() if key not in OF_ATTACK}
    cell = plan["defenses"][plan["defenses"][defense].get("weights", defense)]
    for seed, folder in enumerate(trained):
        training = merged(plan["train"], own, cell.get("train", {}), {"seed": seed})
        run_once("train.py", [*options(training), f"--data.path={data}"], folder)
    for name, attack in attacks.items():
        given = [f"--checkpoint={trained[0] / 'last.pt'}"] if trained else []
        given += [f"--images={images_of(plan, model, data)}", *extra]
        settings = options(merged(attack_settings(plan, model, defense), attack))
        place = output / model / defense / name
        why = by_claim.refusal(output, model, defense, name)
        why.unlink(missing_ok=True)  # of an earlier plan or version: it is quickly said again
        try:
            run_once("attack.py", [*settings, *given], place)
        except RefusalError as error:  # a result; wrong options are none
            write_text(why, f"{error}\n")


def wanted(plan: dict, attack: str) -> bool:
    """Return whether MODEL/DEFENCE/ATTACK is among those asked for (--only)."""
    return any(fnmatch(attack, pattern) for pattern in plan["only"])


def collect(plan: dict, folder: Path) -> list[dict]:
    """Return one row per cell: strength, accuracy over seeds, and for both kinds of attacker the scores."""
    rows = []
    for model, defense in cells(plan):
        place = folder / model / defense
        trained = trainings(plan, model, defense, folder)
        runs = [json.loads((one / "results.json").read_text()) for one in trained]
        scores = [run["acc1"] for run in runs]
        found, refused = {}, {}
        for name in attacks_of(plan, defense):
            if (why := by_claim.refusal(folder, model, defense, name)).exists():
                refused[name] = why.read_text().strip()
                continue
            summary = json.loads((place / name / "results.json").read_text())["summary"]
            found[name] = {key: summary[key]["mean"] for key in METRICS if key in summary}
            found[name] |= {"success": summary["success"]["mean"], "std": summary["psnr"]["std"]}
            found[name] |= {"n": summary["success"]["n"], "no_leak": summary["psnr_baseline"]["mean"]}
            if found[name]["psnr"] is None:  # every reconstruction is perfect
                found[name]["psnr"] = 300.0
        simple = [name for name in found if name in plan["naive"]]
        if not simple:
            reasons = "; ".join(refused.values())
            raise UserError(f"every naive attack refuses the leaks of {model}, {defense}: {reasons}")
        naive = max(simple, key=lambda name: strength(found[name]))
        best = max(found, key=lambda name: strength(found[name]))
        shown = max(score["psnr_shown"] or 300.0 for score in found.values())
        rows.append(
            {
                "model": model,
                "defense": defense,
                "strength": plan["defenses"][defense].get("strength", "–"),
                "weights": plan["defenses"][defense].get("weights", defense),
                "acc1": statistics.fmean(scores),
                "acc1_std": statistics.stdev(scores) if len(scores) > 1 else None,
                "epsilon": runs[0].get("epsilon"),
                "naive": {"attack": naive, **found[naive]},
                "adaptive": {"attack": best, **found[best], "psnr_shown": shown},
                "psnr_by_attack": {name: score["psnr"] for name, score in found.items()},
                **({"refused": refused} if refused else {}),
            }
        )
    return rows


def tables(rows: list[dict]) -> str:
    """Return the rows as Markdown: success, scores without order, every attack. A single model is not named."""
    several = len({row["model"] for row in rows}) > 1
    names = [[row["model"], row["defense"]] if several else [row["defense"]] for row in rows]
    heads = ["model", "defence"] if several else ["defence"]
    lpips = ["lpips_alex"] if any("lpips_alex" in row["naive"] for row in rows) else []
    every = list(dict.fromkeys(name for row in rows for name in row["psnr_by_attack"]))
    success, content, attacks = [], [], []
    for row, name in zip(rows, names, strict=True):
        spread = "" if row["acc1_std"] is None else f" ± {row['acc1_std']:.1f}"
        success.append([*name, str(row["strength"]), f"{row['acc1']:.1f}{spread}"])
        content.append([*name, row["adaptive"]["attack"], number(row["adaptive"].get("psnr_shown"), 1)])
        attacks.append([*name, *(number(row["psnr_by_attack"].get(attack), 1) for attack in every)])
        for score in (row[who] for who in WHO):
            success[-1] += [f"{100 * score['success']:.0f}", f"{score['psnr']:.1f} ± {score['std'] or 0:.1f}"]
            content[-1] += [number(score.get("psnr_patches"), 1)]
            content[-1] += [number(score.get(key), 2) for key in ("ssim", *lpips)]
    scores = [f"{who}: {what}" for who in WHO for what in ("any order (dB)", "SSIM", *["LPIPS"] * len(lpips))]
    shown = [*heads, "strength", "accuracy (%)"]
    shown += [f"{who}: {what}" for who in WHO for what in ("success (%)", "PSNR (dB)")]
    parts = {
        "Success and PSNR:": Table(shown, success),
        "The strongest attack, patches in any order, and structure:": Table(
            [*heads, "strongest attack", "best to model's input (dB)", *scores], content
        ),
        "PSNR (dB) by attack:": Table([*heads, *(f"`{name}`" for name in every)], attacks),
    }
    texts = [f"{caption}\n\n{markdown(part)}" for caption, part in parts.items()]
    refused = [(row["defense"], *one) for row in rows for one in row.get("refused", {}).items()]
    texts += ["What an attack refuses:\n"] * bool(refused)
    texts += [f"- `{attack}`, {defense}: {why}\n" for defense, attack, why in refused]
    return "\n".join(texts)


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def draw(rows: list[dict], path: Path) -> None:
    """Draw accuracy against PSNR, a panel per model: a defence is a ring (naive) joined to a full point (adaptive)."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    chart = new_figure(6.6 * len(models), 6.4)
    names = {"naive": "best attack of one who does not know the defence", "adaptive": "best of one who does"}
    looks = {
        "naive": {"facecolor": "none", "edgecolor": color_of("naive"), "s": 72},
        "adaptive": {"color": color_of("adaptive"), "s": 28},
    }
    for place, model in enumerate(models):
        axes = chart.add_subplot(1, len(models), place + 1)
        own = [row for row in rows if row["model"] == model]
        for row in own:
            axes.plot([shown(row, who) for who in WHO], [row["acc1"]] * 2, color="#cbd5e1", linewidth=1, zorder=1)
        for who in WHO:
            ends = [shown(row, who) for row in own], [row["acc1"] for row in own]
            axes.scatter(*ends, zorder=2, label=names[who], **looks[who])
        axes.set_xscale("log")
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
        axes.minorticks_off()
        spread_labels(axes, own)
        level = statistics.fmean(row["naive"]["no_leak"] for row in own)
        axes.axvline(level, color="#64748b", linestyle=":", linewidth=1)
        axes.text(level, axes.get_ylim()[0], " mean colour", color="#64748b", fontsize=8, va="bottom")
        axes.set_xlabel("PSNR, patches in any order (dB, capped at 100); left is private")
        axes.set_ylabel("clean accuracy (%)")
        axes.set_title(model, loc="left")
        axes.legend(loc="lower center", bbox_to_anchor=(0.55, 1.0), ncol=2, fontsize=7, frameon=False)
    write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=120, bbox_inches="tight"))


def strength(score: dict) -> float:
    """Return PSNR with the patches in the order that suits them best: what they show leaks wherever they stand."""
    return max(score["psnr"], score.get("psnr_patches") or 0)


def shown(row: dict, who: str) -> float:
    return min(strength(row[who]), 100.0)


def spread_labels(axes, rows: list[dict]) -> None:
    """Write the names of the defences on the right, in order of accuracy, apart from each other and near their own."""
    low, high = axes.get_ylim()
    step = (high - low) / 34
    rows = sorted(rows, key=lambda row: (row["acc1"], -shown(row, "adaptive")))
    for row, height in zip(rows, spread_out([row["acc1"] for row in rows], step), strict=True):
        axes.annotate(
            row["defense"],
            (shown(row, "adaptive"), row["acc1"]),
            (135, height),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#cbd5e1", "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)},
        )
    axes.set_xlim(4.5, 280)


def spread_out(heights: Sequence[float], step: float) -> list[float]:
    """Return the heights nearest to rising ones (least squares) that stand at least `step` apart."""
    from scipy.optimize import isotonic_regression

    places = [step * place for place in range(len(heights))]
    rising = isotonic_regression([height - place for height, place in zip(heights, places, strict=True)]).x
    return [base + place for base, place in zip(rising.tolist(), places, strict=True)]


def check_inputs(plan: dict, given: Namespace, data: str) -> None:
    """Keep only the models asked for. Raises UserError for unknown ones, files that are not there, and --finished of a
    plan whose table needs all cells."""
    for name in given.models or ():
        if name not in plan["models"]:
            raise UserError(f"--models: plan '{given.plan}' has {', '.join(plan['models'])}, and no '{name}'")
    if given.models:
        plan["models"] = {name: plan["models"][name] for name in given.models}
        for cell in plan["defenses"].values():
            cell["models"] = [name for name in cell.get("models", plan["models"]) if name in plan["models"]]
    for name in ("finished", "only", "kept"):
        if getattr(given, name) and plan["choose"] != "claim":
            raise UserError(f"--{name} needs a plan of 'choose: claim', and '{given.plan}' has none")
    plan["only"] = given.only or ["*"]
    every = [f"{model}/{cell}/{name}" for model, cell in cells(plan) for name in attacks_of(plan, cell, model)]
    for pattern in plan["only"]:
        if not any(fnmatch(attack, pattern) for attack in every):
            raise UserError(f"--only '{pattern}' matches no attack of the plan: they are called as '{every[0]}'")
    if not Path(data).is_dir():
        raise UserError(f"data folder '{data}' does not exist: make it with 'python -m data.demo --output datasets'")
    for name, model in plan["models"].items():
        for file in (model.get("images", data), model.get("victim", {}).get("checkpoint", data)):
            if not Path(file).exists():
                raise UserError(
                    f"model '{name}' needs '{file}', which does not exist: make it, or choose others (--models)"
                )


def write_conditions(rows: list[dict], output: Path) -> None:
    if not rows:
        raise UserError(f"no cell of the plan is finished in '{output}': run it without --finished")
    write_text(output / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(output / "table.md", by_claim.table(rows) + "\n")
    by_claim.draw(rows, output / "conditions.png")
    print(by_claim.table(rows))


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--plan", required=True, help="YAML file of models, defences and attacks")
    parser.add_argument("--data", help="image folder with train/ and val/ (default: the plan's)")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs, results.json and the figure")
    parser.add_argument(
        "--lpips", help="also score LPIPS with this network (alex, vgg, squeeze); downloads its weights"
    )
    parser.add_argument("--lpips_trunk", help="file with the weights of the LPIPS network, in place of the download")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models of the plan")
    parser.add_argument(
        "--only", nargs="+", metavar="GLOB", help="run only these attacks, as 'vit96_random/float16/closed_form'"
    )
    parser.add_argument("--kept", type=Path, metavar="FILE", help="results.json of earlier runs, for what is not run")
    parser.add_argument(
        "--finished", action="store_true", help="run nothing: write the table of the cells that are done"
    )
    given = parser.parse_args()
    plan = read_plan(given.plan)
    data = given.data or plan["data"]
    check_inputs(plan, given, data)
    kept = cells_of(given.kept) if given.kept else []
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for key in TOGETHER:  # the runs below are each of one process
        os.environ.pop(key, None)
    if given.finished:
        return write_conditions(by_claim.conditions(plan, given.output, data, kept), given.output)
    written = ("results.json", "table.md", "privacy_accuracy.png", "conditions.png", "done_*", "refused_*")
    refuse_others(given.output, written, "a benchmark")
    given.output.mkdir(parents=True, exist_ok=True)
    extra = [f"--{key}={value}" for key in ("lpips", "lpips_trunk") if (value := getattr(given, key))]
    mine = [cell for group in shares(plan)[rank::world] for cell in group]
    refused = run_cells(plan, mine, given.output, data, extra, f"cells of process {rank}")
    (given.output / f"done_{rank}").touch()
    if refused:
        raise UserError(f"{len(refused)} cells were refused: {'; '.join(refused)}")
    if rank:
        return
    while not all((given.output / f"done_{other}").exists() for other in range(world)):
        time.sleep(2)  # shares take different times; nothing is exchanged but files
    for other in range(world):
        (given.output / f"done_{other}").unlink()
    if plan["choose"] == "claim":
        return write_conditions(by_claim.conditions(plan, given.output, data, kept), given.output)
    rows = collect(plan, given.output)
    write_text(given.output / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(given.output / "table.md", tables(rows))
    draw(rows, given.output / "privacy_accuracy.png")
    print(tables(rows))


if __name__ == "__main__":
    run_command(main, CONTINUES)
