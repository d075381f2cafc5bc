"""What came out of a plan of `choose: claim`: a row for each condition, its table and its figure.

Of each attacker the attack with the most certified images counts, then that with the most certified bits, then the
earlier of the plan: the attacker's own claim chooses, and the truth does not. An image is certified where the attack's
own equations determine it, up to the order of patches that share a position (attacks/exactness.py); of a malicious
server's bins, where the picture lies on the grid of 8-bit values. A claim is about the image as the model was shown it,
and wrong where that is further off than the claim says (60 dB).
"""

import json
import statistics
from collections.abc import Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import torch
from torch import Tensor

from data.images import list_images, read_images
from eval.identifiability import FEWEST, identified
from eval.image_folders import read_image
from eval.membership import binomial_interval
from reports.charts import new_figure
from reports.tables import Table, markdown
from scripts.benchmark_plan import WHO, attack_settings, attacks_of, cells, images_of, trainings
from utils.files import write_atomic
from utils.statistics import describe

CERTAIN = 60.0  # dB: predicted error below which attacks/exactness.py calls an image certain
POOL = 200  # pictures among which a reconstruction is looked for
CAP = 100.0  # dB, in the figure
LOOKS = {"naive": ("o", "#0f766e", 0.17), "adaptive": ("D", "#c2410c", -0.17)}


def refusal(folder: Path, model: str, defense: str, attack: str) -> Path:
    """Return the file of a benchmark's folder that says why an attack could not read a leak of a cell."""
    return folder / f"refused_{model}_{defense}_{attack}.txt"


def certified(row: dict, behind: int) -> float:
    """Return 1 for an image whose attack certifies it, else 0; of bins the share of the `behind` images of a leak."""
    return row["claimed"] / behind if "claimed" in row else float(bool(row.get("exact_up_to_order")))


def order_free(row: dict, *others: str) -> float:
    """Return the PSNR of an image in dB, its patches in the order that suits them best, or one of `others` if that is
    larger; 300 where it is perfect."""
    return max(300.0 if row[key] is None else row[key] for key in ("psnr", "psnr_patches", *others))


def scored(place: Path, behind: int, images: str) -> dict:
    """Return the scores of a finished run of attack.py: `behind` images a leak, pictures from the folder `images`."""
    rows = json.loads((place / "results.json").read_text())["per_image"]
    claims = round(sum(certified(row, behind) for row in rows))
    wrong = sum(certified(row, behind) == 1 and order_free(row, "psnr_shown") < CERTAIN for row in rows)
    values = {
        "psnr": [300.0 if row["psnr"] is None else row["psnr"] for row in rows],
        "psnr_any_order": [order_free(row) for row in rows],
        "ssim": [row["ssim"] for row in rows],
        "lpips": [value for row in rows for key, value in row.items() if key.startswith("lpips")],
        "bits_leaked": [row["bits_leaked"] / row["bits"] for row in rows if "bits_leaked" in row],
    }
    low, high = binomial_interval(claims, len(rows))
    return {
        "n": len(rows),
        "certified": claims,
        "certified_interval": [low, high],
        "wrong_claims": wrong,
        "mean_colour": statistics.fmean(row["psnr_baseline"] for row in rows),
        "identified": identifiability(place, images),
        **{name: describe(found) for name, found in values.items() if found},
    }


def identifiability(place: Path, images: str) -> dict | None:
    """Return how many reconstructions are nearer to their original than to each of POOL others of the folder `images`;
    None where it has fewer than 20."""
    names = sorted(file.name for file in (place / "originals").iterdir())
    own, found = (
        torch.stack([read_image(place / folder / name) for name in names])
        for folder in ("originals", "reconstructions")
    )
    pool = _pool(images, own.shape[-1])
    if len(pool) < FEWEST:
        return None
    hits = int(identified(*((value.double() * 255).round() for value in (found, own, pool))).sum())
    return {"hits": hits, "n": len(names), "pool": len(pool)}


@cache
def _pool(images: str, size: int) -> Tensor:
    count = min(POOL, len(list_images(images)))
    return read_images(list_images(images, count), size, mean=(0, 0, 0), std=(1, 1, 1))


def claims_of(score: dict) -> tuple[int, float]:
    """Return what an attack claims: certified images, then the share of all 8-bit values' bits that it certifies."""
    return score["certified"], score.get("bits_leaked", {"mean": 0.0})["mean"]


def row_of(where: dict, trained: Sequence[dict], scores: dict[str, dict], naive: Sequence[str]) -> dict:
    """Return the row of a condition.

    Args:
        where: model, factor, defense (its name) and strength.
        trained: results of train.py by seed; none for given weights.
        scores: by attack, in the order of the plan, those who know the defence first.
        naive: names of the attacks of one who does not know the defence.
    """
    accuracy = [run["acc1"] for run in trained]
    row = where | {
        "acc1": statistics.fmean(accuracy) if accuracy else None,
        "acc1_std": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
        "seeds": len(accuracy),
        "epsilon": trained[0].get("epsilon") if trained else None,
    }
    for who, names in zip(WHO, ([name for name in scores if name in naive], list(scores)), strict=True):
        best = max(names, key=lambda name: claims_of(scores[name]))  # the first of equals
        row[who] = {"attack": best, **scores[best]}
    return row | {"attacks": scores}


def conditions(plan: dict, folder: Path, data: str, kept: Sequence[dict] = ()) -> list[dict]:
    """Return a row for each cell of the plan that is finished, attacks that know the defence before the others.

    kept: rows of earlier runs. An attack or training that is not finished in `folder` has what these say, and the row
    names such attacks under `kept`.
    """
    rows, earlier = [], {(row["model"], row["defense"]): row for row in kept}
    for model, defense in cells(plan):
        names, before = attacks_of(plan, defense, model), earlier.get((model, defense), {})
        order = sorted(names, key=lambda name: name in plan["naive"])
        places = {name: folder / model / defense / name for name in order}
        found = {name: place for name, place in places.items() if (place / "results.json").exists()}
        known = {name: score for name, score in before.get("attacks", {}).items() if name in names}
        whys = {name: refusal(folder, model, defense, name) for name in order if name not in found}
        refused = {name: file.read_text().strip() for name, file in whys.items() if file.exists()}
        refused = {name: why for name, why in before.get("refused", {}).items() if name not in found} | refused
        old = [name for name in order if name in known and name not in found and name not in refused]
        runs = [place / "results.json" for place in trainings(plan, model, defense, folder)]
        trained = all(file.exists() for file in runs)
        finished = (trained and len(found) + len(old) + len(refused) == len(order)) or before
        if not finished or not any(name in plan["naive"] for name in (*found, *old)):
            continue
        behind, images = _behind(plan, model, defense), images_of(plan, model, data)
        scores = {name: scored(place, behind, images) for name, place in found.items()} | {n: known[n] for n in old}
        where = _where(plan, model, defense)
        results = [json.loads(file.read_text()) for file in runs if trained]
        row = row_of(where, results, {name: scores[name] for name in order if name in scores}, list(plan["naive"]))
        if before and not results:
            row |= {key: before[key] for key in ("acc1", "acc1_std", "seeds", "epsilon")}
        rows.append(row | ({"refused": refused} if refused else {}) | ({"kept": old} if old else {}))
    return rows


def _behind(plan: dict, model: str, defense: str) -> int:
    """Return the number of images behind one leak of a cell."""
    settings = attack_settings(plan, model, defense)
    return settings.get("batch_size", 1) * settings.get("clients", 1)


def _where(plan: dict, model: str, defense: str) -> dict:
    cell = plan["defenses"][defense]
    where = {"model": model, "factor": cell.get("factor", "defence"), "defense": defense}
    return where | {"strength": cell.get("strength", "–")}


def table(rows: Sequence[dict]) -> str:
    """Return a Markdown table of 8 columns for each model."""
    head = ["condition", "accuracy (%)", "naive: certified", "PSNR (dB)", "adaptive: certified", "PSNR (dB)"]
    head += ["SSIM, LPIPS, IIP", "adaptive attack"]
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = [_line(row) for row in rows if row["model"] == model]
        parts.append(f"**{model}**\n\n{markdown(Table(head, lines))}")
    return "\n".join(parts)


def _line(row: dict) -> list[str]:
    accuracy = "–" if row["acc1"] is None else f"{row['acc1']:.1f}"
    accuracy += "" if row["acc1_std"] is None else f" ± {row['acc1_std']:.1f}"
    if row["epsilon"] is not None:
        accuracy += f", ε {row['epsilon']:.1f}"
    line = [f"{row['defense']}" + (f" ({row['strength']})" if row["strength"] != "–" else ""), accuracy]
    for who in WHO:
        score = row[who]
        low, high = (100 * end for end in score["certified_interval"])
        bits = score.get("bits_leaked", {"mean": 0.0})["mean"]
        shown = f", {100 * bits:.0f} % of bits" if bits > 0 and who == "adaptive" else ""
        line.append(f"{score['certified']} of {score['n']} [{low:.0f}, {high:.0f}] %{shown}")
        spread = score["psnr_any_order"]
        line.append(f"{spread['mean']:.1f} ± {spread['std'] or 0:.1f}")
    score = row["adaptive"]
    lpips, found = score.get("lpips"), score["identified"]
    looks = [f"{score['ssim']['mean']:.2f}", f"{lpips['mean']:.2f}" if lpips else "–"]
    looks.append(f"{found['hits']} of {found['n']}" if found else "–")
    attacks = [f"`{score['attack']}`", *(f"`{name}` refuses" for name in row.get("refused", {}))]
    return [*line, ", ".join(looks), ", ".join(attacks)]


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw a panel per model, a line for each condition, a mark for each attacker at the PSNR of what it got. A mark is
    full where all images are certified, pale where some are, empty where none is."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ordered(rows)
    chart = new_figure(1.8 + 2.9 * len(models), 1.6 + 0.26 * len(lines))
    panels = chart.subplots(1, len(models), sharey=True, squeeze=False)[0]
    factors = {row["defense"]: row["factor"] for row in rows}
    for axes, model in zip(panels, models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for row in own:
            height, score = lines.index(row["defense"]), row["adaptive"]
            ends = [min(row[who]["psnr_any_order"]["mean"], CAP) for who in WHO]
            axes.plot(ends, [height] * 2, color="#cbd5e1", linewidth=1, zorder=1)
            for who, end in zip(WHO, ends, strict=True):
                _mark(axes, who, end, height, row[who]["certified"] / row[who]["n"])
            axes.text(CAP + 6, height, f"{score['certified']}/{score['n']}", fontsize=7, va="center", color="#c2410c")
        level = statistics.fmean(row["naive"]["mean_colour"] for row in own)
        axes.axvline(level, color="#64748b", linestyle=":", linewidth=1)
        axes.text(level + 2, -0.9, "mean colour", color="#64748b", fontsize=7, va="center")
        for edge in range(1, len(lines)):
            if factors[lines[edge]] != factors[lines[edge - 1]]:
                axes.axhline(edge - 0.5, color="#e2e8f0", linewidth=0.8, zorder=0)
        axes.set(xlim=(0, CAP + 24), ylim=(len(lines) - 0.4, -1.4))
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.tick_params(labelsize=8)
        axes.set_title(model, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(lines)), lines, fontsize=8)
    for who, name in zip(WHO, ("does not know the defence", "knows it; right: images it certifies"), strict=True):
        panels[0].scatter([], [], marker=LOOKS[who][0], color=LOOKS[who][1], s=32, label=name)
    panels[0].scatter([], [], marker="o", facecolor="none", edgecolor="#475569", s=32, label="empty: none certified")
    chart.supxlabel("PSNR, patches in any order (dB, capped at 100)", fontsize=8)
    chart.legend(loc="outside upper left", ncol=3, fontsize=8, frameon=False)
    write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=120, bbox_inches="tight"))


def ordered(rows: Sequence[dict]) -> list[str]:
    """Return the conditions of all models in the order of the plan, which each model's rows keep."""
    after: dict[str, set[str]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        names = [row["defense"] for row in rows if row["model"] == model]
        for place, name in enumerate(names):
            after.setdefault(name, set()).update(names[:place])
    return list(TopologicalSorter(after).static_order())


def _mark(axes, who: str, end: float, height: float, share: float) -> None:
    marker, color, apart = LOOKS[who]
    fill = color if share == 1 else "#ffffff" if share == 0 else color + "66"
    axes.scatter([end], [height - apart], marker=marker, facecolor=fill, edgecolor=color, s=30, zorder=2)
