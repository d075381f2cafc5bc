"""Attacks by defences by models: train under every defence, attack what came out, one table and one figure.

    torchrun --nproc_per_node 2 scripts/benchmark.py --plan configs/benchmark/small.yaml --output runs/benchmark

A plan names models (options of train.py), defences (options of train.py and attack.py) and attacks (options of
attack.py). A cell is a model under a defence: one training per seed, then attacks. The naive attacker has all of the
plan's `naive` that apply to the cell; the adaptive one also those that know the defence (`defense_aware` is told the
defence of the cell). Of either the strongest by mean PSNR counts, in any order of the patches. Cells are shared out
over the processes; a finished run is never repeated, an interrupted one continues. Every run folder is that of train.py
or attack.py.
"""

import json
import os
import runpy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reports.charts import color_of, new_figure
from reports.tables import Table, markdown
from utils.errors import CONTINUES, UserError, reason, run_command
from utils.files import write_atomic, write_text
from utils.ownership import refuse_others
from utils.progress import track
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
KEYS = {"data", "seeds", "train", "models", "attack", "naive", "adaptive", "defenses"}
WHO = ("naive", "adaptive")
METRICS = ("psnr", "psnr_patches", "psnr_shown", "ssim", "lpips_alex")


def read_plan(path: str) -> dict:
    """The plan, checked for what it must and may hold."""
    try:
        plan = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"plan '{path}' cannot be read as YAML: {reason(error)}") from error
    if isinstance(plan, dict) and "defences" in plan:  # as plans wrote it before
        plan["defenses"] = plan.pop("defences")
    if not isinstance(plan, dict) or set(plan) != KEYS:
        odd = sorted(set(plan or {}) ^ KEYS)
        raise UserError(f"plan '{path}' must hold {', '.join(sorted(KEYS))}; look at {', '.join(odd)}")
    for name, cell in plan["defenses"].items():
        unknown = set(cell) - {"train", "attack", "strength", "naive", "adaptive", "models"}
        missing = [name for who in WHO for name in cell.get(who, []) if name not in plan[who]]
        if unknown or missing:
            raise UserError(f"defence '{name}' of plan '{path}': unknown {', '.join(sorted(unknown) + missing)}")
    return plan


def options(tree: dict, prefix: str = "") -> list[str]:
    """{"optim": {"lr": 1}} -> ["--optim.lr", "1"]; lists as YAML."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += options(value, f"{prefix}{key}.")
        else:
            text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            found.append(f"--{prefix}{key}={text.replace(' ', '') if isinstance(value, list) else text}")
    return found


def launch(script: str, given: list[str], output: Path) -> None:
    """Run an entry script with these options unless its results are there."""
    if not (output / "results.json").exists():
        runpy.run_path(str(ROOT / script), run_name="benchmark")["main"](
            [*given, "--resume=auto", f"--output={output}"]
        )


def merged(*trees: dict) -> dict:
    """Later values win, sections are merged."""
    result: dict = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def cells(plan: dict) -> list[tuple[str, str]]:
    """(model, defence) pairs of the plan; a defence may be for some models only."""
    return [
        (model, name)
        for name, cell in plan["defenses"].items()
        for model in plan["models"]
        if model in cell.get("models", plan["models"])
    ]


def attacks_of(plan: dict, defense: str) -> dict[str, dict]:
    """Attack name -> its options: the naive ones that apply, then those who know the defence, and are told it."""
    cell = plan["defenses"][defense]
    found = {name: plan["naive"][name] for name in cell.get("naive", plan["naive"])}
    for name in cell.get("adaptive", []):
        known = {key: value for key, value in cell.get("attack", {}).items() if key in ("defense", "defense_options")}
        told = {"attack_options": known} if plan["adaptive"][name]["attack"] == "defense_aware" else {}
        found[name] = merged(plan["adaptive"][name], told)
    return found


def run_cell(plan: dict, model: str, defense: str, folder: Path, data: str, extra: list[str]) -> None:
    cell = plan["defenses"][defense]
    for seed in range(plan["seeds"]):
        training = merged(plan["train"], plan["models"][model], cell.get("train", {}), {"seed": seed})
        launch("train.py", [*options(training), f"--data.path={data}"], folder / f"train_{seed}")
    for name, attack in attacks_of(plan, defense).items():
        given = merged(plan["attack"], cell.get("attack", {}), attack)
        victim = [f"--checkpoint={folder / 'train_0' / 'last.pt'}", f"--images={data}/val"]
        launch("attack.py", [*options(given), *victim, *extra], folder / name)


def collect(plan: dict, folder: Path) -> list[dict]:
    """Return one row per cell: strength, accuracy over seeds, and for both kinds of attacker the scores."""
    rows = []
    for model, defense in cells(plan):
        place = folder / model / defense
        runs = [json.loads((place / f"train_{seed}" / "results.json").read_text()) for seed in range(plan["seeds"])]
        scores = [run["acc1"] for run in runs]
        found = {}
        for name in attacks_of(plan, defense):
            summary = json.loads((place / name / "results.json").read_text())["summary"]
            found[name] = {key: summary[key]["mean"] for key in METRICS if key in summary}
            found[name] |= {"success": summary["success"]["mean"], "std": summary["psnr"]["std"]}
            found[name] |= {"n": summary["success"]["n"], "no_leak": summary["psnr_baseline"]["mean"]}
            if found[name]["psnr"] is None:  # every reconstruction is perfect
                found[name]["psnr"] = 300.0
        naive = max((name for name in found if name in plan["naive"]), key=lambda name: strength(found[name]))
        best = max(found, key=lambda name: strength(found[name]))
        shown = max(score["psnr_shown"] or 300.0 for score in found.values())
        rows.append(
            {
                "model": model,
                "defense": defense,
                "strength": plan["defenses"][defense].get("strength", "–"),
                "acc1": statistics.fmean(scores),
                "acc1_std": statistics.stdev(scores) if len(scores) > 1 else None,
                "epsilon": runs[0].get("epsilon"),
                "naive": {"attack": naive, **found[naive]},
                "adaptive": {"attack": best, **found[best], "psnr_shown": shown},
                "psnr_by_attack": {name: score["psnr"] for name, score in found.items()},
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
    return "\n".join(f"{caption}\n\n{markdown(part)}" for caption, part in parts.items())


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy against PSNR, a panel per model: a defence is a ring (naive) joined to a full point (adaptive)."""
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
    """PSNR with the patches in the order that suits them best: what they show leaks wherever they stand."""
    return max(score["psnr"], score.get("psnr_patches") or 0)


def shown(row: dict, who: str) -> float:
    return min(strength(row[who]), 100.0)


def spread_labels(axes, rows: list[dict]) -> None:
    """Names of the defences on the right, in order of accuracy, apart from each other and near their own."""
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


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--plan", required=True, help="YAML file of models, defences and attacks")
    parser.add_argument("--data", help="image folder with train/ and val/ (default: the plan's)")
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs, results.json and the figure")
    parser.add_argument(
        "--lpips", help="also score LPIPS with this network (alex, vgg, squeeze); downloads its weights"
    )
    given = parser.parse_args()
    plan = read_plan(given.plan)
    data = given.data or plan["data"]
    if not Path(data).is_dir():
        raise UserError(f"data folder '{data}' does not exist: make it with 'python -m data.demo --output datasets'")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for key in TOGETHER:  # the runs below are each of one process
        os.environ.pop(key, None)
    refuse_others(given.output, ("results.json", "table.md", "privacy_accuracy.png", "done_*"), "a benchmark")
    given.output.mkdir(parents=True, exist_ok=True)
    todo, extra = cells(plan), [f"--lpips={given.lpips}"] if given.lpips else []
    mine = todo[rank::world]
    for model, defense in track(mine, len(mine), f"cells of process {rank}", print):
        run_cell(plan, model, defense, given.output / model / defense, data, extra)
    (given.output / f"done_{rank}").touch()
    if rank:
        return
    while not all((given.output / f"done_{other}").exists() for other in range(world)):
        time.sleep(2)  # shares take different times; nothing is exchanged but files
    for other in range(world):
        (given.output / f"done_{other}").unlink()
    rows = collect(plan, given.output)
    write_text(given.output / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(given.output / "table.md", tables(rows))
    draw(rows, given.output / "privacy_accuracy.png")
    print(tables(rows))


if __name__ == "__main__":
    run_command(main, CONTINUES)
