"""docs/servers.md and its figure, from the JSON of the three studies: every number and verdict on the page is computed.

    python scripts/servers_page.py [--output DIR]

Reads docs/results/servers.json, detector.json and membership.json; writes servers.md and figures/servers.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.membership import binomial_interval
from reports.charts import line_charts
from utils.errors import run_command
from utils.files import write_atomic, write_text
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT = 0.8  # of what comes back without MJP, from which on MJP is said to protect nothing of it

HEAD = """\
# Servers that do not play fair, and clients that share a part

Written by `python scripts/servers_page.py` from `docs/results/servers.json`, `detector.json` and `membership.json`.
Attack only what you own or were asked to test: [SECURITY.md](../SECURITY.md).

## Threat models

| `--server` | power | what it does before it sends the model | read by |
|---|---|---|---|
| `honest` | honest but curious | nothing | all other attacks |
| `class_fishing`, `feature_fishing` | changes weights | sets the classifier so that one image reaches the network | `fishing` |
| `adapter_imprint` | changes weights | turns the adapters of a frozen ViT into bins of patches by place | `adapter_imprint` |
| `imprint` | changes layers | puts rows in front that are bins of brightness | `imprint` |
| `trap_weights` | changes layers | puts rows in front that few images activate | `imprint` |

| `--share` | what a client trains and shares | what is left to attack |
|---|---|---|
| `all` | every parameter | everything |
| `head` | the classifier | labels and features (`--attack_options.labels class_features`), membership by span |
| `lora` | LoRA's two matrices | membership by span of the first matrix, once the second is not zero |
| `adapters` | the adapters | `adapter_imprint`; matching |
| `without_positions` | all but position embeddings | `token_span`, `first_block`, `joint`, matching |

`--clients K` sums K clients, `--mask_ratio R` is MJP, `--server_images DIR` are pictures that the server has. Every
report states the server, what is trained and shared, and what the server has.

What a server can do beside the models A to H of Carletti et al. (SoK, USENIX Security 2025): A to E only listen, with
more and more knowledge (B the model, C training details, D similar pictures, E their statistics); F also manipulates, G
with similar pictures, H with a choice of clients.

| SoK | here |
|---|---|
| A, B | `honest`, `--labels hidden`, `--attacker_knowledge none` |
| C | `honest`, `--labels known`, `--attacker_knowledge method`, `mask` or `permutation` |
| D, E | `honest` with a prior or statistics (`gradvit`, `gradinversion`) |
| F | `class_fishing`, `trap_weights`; `imprint` without `--server_images` |
| G | `imprint`, `adapter_imprint`, `feature_fishing` with `--server_images` |
| H | not simulated: `--clients 1` is what a chosen client gives |
"""  # noqa: E501, tables

HOW = """\
## Do it yourself

    python attack.py --config configs/attack/imprint.yaml --images DIR --server_images DIR2 --output runs/imprint
    python attack.py --config configs/attack/adapter_imprint.yaml --images DIR --server_images DIR2 --output runs/adapters
    python attack.py --config configs/attack/fishing.yaml --images DIR --output runs/fishing
    python audit.py --check RECEIVED.pt --reference BEFORE.pt --images OWN --output runs/check
    python -m eval.registered_psnr --source_dir runs/imprint/reconstructions --target_dir runs/imprint/originals
    python -m eval.identifiability --source_dir runs/imprint/reconstructions --target_dir runs/imprint/originals --pool DIR2

## What each claim rests on

An image is claimed if all of its pixels are whole 8-bit values: decoded pictures are, and mixtures of several are not.
Clients that train on pictures of other precision (crops resized in floating point, MixUp) get no claim. `fishing` reads
from the leak how many images passed, and claims what its base attack's own equations determine. Guarantees count how
often an image is alone in a bin whose thresholds are quantiles of the server's pictures; they assume private pictures
of the same kind.

Updates of several local steps are differences of weights: in single precision the small gradients of an imprint block
are lost in the rounding of its large biases, and nothing is claimed. Not done: Decepticons and other attacks on text
models, several rounds of fishing with the same batch, and a comparison with breaching on the same bins. Adapters stand
behind whole blocks here; PEFTLeak's stand inside them.
"""  # noqa: E501, commands


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def entry(cell: dict, key: str) -> str:
    """Return a score of a cell in percent, with its range over repetitions."""
    row = cell.get(key)
    if row is None:
        return "–"
    low, high = percent(row["smallest"]), percent(row["largest"])
    return percent(row["mean"]) if low == high else f"{percent(row['mean'])} ({low}–{high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def chosen(cells: list[dict], **wanted) -> list[dict]:
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]


def kind(cell: dict) -> str:
    """Return what a cell's server reads, in words."""
    if cell["server"] == "adapter_imprint":
        return "adapter bins"
    return "bins of places" if cell["options"].get("reads") == "place" else "bins of images"


def by_kind(cells: list[dict], part: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for cell in chosen(cells, part=part):
        found.setdefault(kind(cell), []).append(cell)
    return found


def content(cell: dict) -> float:
    """Return the share of all patches that come back, visible or hidden, in whatever place."""
    ratio = cell["ratio"]
    hidden = cell["hidden"]["mean"] if cell.get("hidden") else 0.0
    return (1 - ratio) * cell["visible"]["mean"] + ratio * hidden


def verdict(cells: list[dict]) -> str:
    """Return what MJP changes for one kind of bins, from its cells by mask ratio."""
    plain, masked = cells[0], cells[-1]
    before, after = content(plain), content(masked)
    says = "MJP protects no content" if after >= KEPT * before else "MJP protects content"
    if plain["in_place"]["mean"] < 0.5:  # pictures hardly ever came back whole
        return f"{says}: {percent(before)} % of the patches without, {percent(after)} % at ratio {masked['ratio']:g}"
    places = "and hides places" if masked["in_place"]["mean"] < 0.2 * plain["in_place"]["mean"] else "nor places"
    return (
        f"{says} {places}: patches {percent(before)} % without, {percent(after)} % at ratio {masked['ratio']:g}; "
        f"pictures in place {percent(plain['in_place']['mean'])} % and {percent(masked['in_place']['mean'])} %"
    )


def verdicts(study: dict) -> str:
    rows = [[name, verdict(cells)] for name, cells in by_kind(study["cells"], "mask").items()]
    plain, masked = (
        next(row for row in study["fishing"] if row["server"] == "class_fishing" and bool(row["ratio"]) == hides)
        for hides in (False, True)
    )
    same = "MJP does not change how often one image is alone"
    if masked["alone"] < KEPT * plain["alone"]:
        same = "MJP makes it rarer that one image is alone"
    rows.append(
        [
            "fishing",
            f"{same}: {plain['alone']} and {masked['alone']} of {plain['rounds']} rounds; the image comes back at "
            f"{plain['psnr_median']:.0f} dB without, its visible patches at {masked['psnr_median']:.0f} dB at ratio "
            f"{masked['ratio']:g}",
        ]
    )
    return table(["server", "what MJP changes"], rows)


def of_batches(study: dict) -> str:
    cells = chosen(study["cells"], part="batch")
    rows = []
    for batch in sorted({cell["batch"] for cell in cells}):
        cnn, vit = (chosen(cells, batch=batch, victim=name)[0] for name in ("cnn", "vit"))
        false = sum(round(cell["false_claims"]["mean"] * cell["n"]) for cell in (cnn, vit))
        rows.append(
            [str(batch), percent(vit["promised"]["mean"]), entry(cnn, "images"), entry(vit, "images")]
            + [entry(cnn, "claimed"), entry(vit, "claimed"), str(false)]
        )
    head = ["batch", "guarantee", "CNN", "ViT", "CNN, claimed", "ViT, claimed", "false claims"]
    kinds = [
        [f"`{c['server']}`: " + ", ".join(f"{k} {v}" for k, v in c["options"].items())]
        + [percent(c["promised"]["mean"]), entry(c, "images")]
        for c in chosen(study["cells"], part="kind")
    ]
    return table(head, rows) + "\n" + table(["ViT, batch 64", "guarantee", "recovered"], kinds)


def of_masks(study: dict) -> str:
    rows = []
    for name, cells in by_kind(study["cells"], "mask").items():
        for cell in cells:
            promise = cell.get("promised") or cell.get("promised_visible")
            rows.append(
                [name, f"{cell['ratio']:g}", percent(promise and promise["mean"]), entry(cell, "visible")]
                + [percent((cell.get("promised_hidden") or {}).get("mean")), entry(cell, "hidden")]
                + [entry(cell, "images"), entry(cell, "in_place")]
            )
    head = ["server", "ratio", "guarantee", "visible", "hidden: guarantee", "hidden", "pictures", "in place"]
    return table(head, rows)


def of_clients(study: dict) -> str:
    rows = []
    for name, cells in by_kind(study["cells"], "clients").items():
        for clients in sorted({cell["clients"] for cell in cells}):
            plain, masked = (chosen(cells, clients=clients, ratio=ratio)[0] for ratio in (0.0, 0.5))
            promise = plain.get("promised") or plain.get("promised_visible")
            rows.append(
                [name, str(clients), str(plain["batch"]), percent(promise["mean"]), entry(plain, "visible")]
                + [entry(masked, "visible"), entry(masked, "hidden")]
            )
    head = ["server", "clients", "images each", "guarantee", "patches", "MJP 0.5: visible", "MJP 0.5: hidden"]
    return table(head, rows)


def of_fishing(study: dict) -> str:
    rows = []
    for row in study["fishing"]:
        low, high = binomial_interval(row["alone"], row["rounds"])
        rows.append(
            [f"`{row['server']}`", f"{row['ratio']:g}", str(row["clients"]), percent(row["promised"])]
            + [f"{row['alone']} of {row['rounds']} ({percent(low)}–{percent(high)} %)"]
            + [f"{row['exact']}", f"{row['psnr_median']:.0f} ({row['psnr_smallest']:.0f})" if row["alone"] else "–"]
        )
    head = ["server", "ratio", "clients", "promised, %", "one image alone", "exact", "dB, median (smallest)"]
    return table(head, rows)


def of_detector(found: dict) -> str:
    every, weights = found["all"], found["weights_only"]
    lines = []
    for told, name in ((every, "all statistics"), (weights, "weights alone")):
        alarms, number = told["honest"]["false_alarms"], told["honest"]["n"]
        low, high = binomial_interval(alarms, number)
        lines.append(f"{alarms} of {number} with {name} (95 % interval {100 * low:.1f} to {100 * high:.1f} %)")
    rows = []
    for with_all, alone in zip(every["attacks"], weights["attacks"], strict=True):
        seen = [
            key for key, count in with_all["seen_by"].items() if count > 0.9 * with_all["n"] and key != "new_values"
        ]
        rows.append(
            [with_all["attack"], with_all["strength"], f"{with_all['auc']:.3f}", f"{alone['auc']:.3f}"]
            + [f"{with_all['detected']} of {with_all['n']}", ", ".join(f"`{key}`" for key in seen) or "–"]
        )
    head = ["attack", "strength", "AUC", "AUC, weights alone", "detected", "seen on 9 of 10 by"]
    return (
        f"Honest models: {found['honest_models']}, neighbouring rounds of short trainings of five architectures and "
        f"eight seeds; half of the seeds set the thresholds, the other half gives false alarms: {'; '.join(lines)}.\n\n"
        + table(head, rows)
    )


def of_membership(found: dict) -> str:
    def cells(row: dict) -> list[str]:
        rate = row["tpr_at_0.0001"]
        spread = f" ± {row['auc']['std']:.3f}" if row["auc"]["std"] else ""
        interval = f"{percent(rate['low'])}–{percent(rate['high'])}"
        return [f"{row['auc']['mean']:.3f}{spread}", f"{percent(rate['mean'])} ({interval}, n {rate['members']})"]

    heads = [
        [str(row["batch"]), f"{row['noise_multiplier']:g}"]
        + ["none" if row["epsilon"] is None else f"{row['epsilon']:.3g}", *cells(row)]
        for row in found["head"]
    ]
    lora = [[str(row["rank"]), str(row["batch"]), str(row["tokens"]), *cells(row)] for row in found["lora"]]
    names = ["AUC", "TPR at FPR 1e-4, %"]
    return (
        f"Non-members: {found['non_members']}; {found['seeds']} seeds, and exact binomial intervals over all of them."
        + "\n\n"
        + table(["head: images", "DP-SGD noise", "epsilon, one update", *names], heads)
        + "\n"
        + table(["LoRA: rank", "images", "tokens", *names], lora)
    )


def page(study: dict, detector: dict, membership: dict) -> str:
    """Return the page."""
    good = f"{study['recovered_above_db']:g} dB"
    return "\n".join(
        [
            HEAD,
            "## What MJP changes\n",
            verdicts(study),
            "![Share of patches and pictures that come back, by mask ratio and by clients](figures/servers.png)\n",
            f"Recovered means above {good}; CIFAR-10 at 32 pixels, {study['public']} pictures of the server, "
            f"{study['cells'][0]['n']} repetitions with other images, masks and weights: mean and range, in percent. "
            "`in place` is against the picture, `pictures` against what the model saw. Command: "
            f"`{study['command']}`.\n",
            "## Imprint, by batch size\n",
            of_batches(study),
            "## Imprint and adapters under MJP\n",
            "Batch 64 for bins of images (512), 8 for bins of places (64 each) and adapters (rank 128, 6 blocks). "
            "At ratio 0.1 one of 16 patches is hidden, which moves none.\n",
            of_masks(study),
            "## Sums over clients\n",
            "The server sees the mean of all clients, each of which draws a mask of its own.\n",
            of_clients(study),
            "## Fishing\n",
            "Batch 64 a client, 100 classes; the image alone is attacked by `closed_form`, or `mjp_aware` under MJP.\n",
            of_fishing(study),
            "## The client's side: is this model honest?\n",
            of_detector(detector),
            "The thresholds are those of small models in their first rounds; measure your own "
            "with `scripts/detector_study.py`. An honest model with one large bias raises an alarm.\n",
            "## Clients that share a head or LoRA: membership by span\n",
            of_membership(membership),
            HOW,
        ]
    )


def figure(study: dict, path: Path) -> None:
    """Draw what comes back by mask ratio for each kind of bins, and by clients."""
    panels = []
    for name, cells in by_kind(study["cells"], "mask").items():
        ratios = [cell["ratio"] for cell in cells]
        lines = {"visible patches": (ratios, [cell["visible"]["mean"] for cell in cells])}
        masked = [cell for cell in cells if cell.get("hidden")]
        lines["hidden patches"] = ([cell["ratio"] for cell in masked], [cell["hidden"]["mean"] for cell in masked])
        lines["whole pictures, in place"] = (ratios, [cell["in_place"]["mean"] for cell in cells])
        panels.append({"title": name, "xlabel": "mask ratio of MJP", "ylabel": "share recovered", "lines": lines})
    lines = {}
    for name, cells in by_kind(study["cells"], "clients").items():
        for ratio in (0.0, 0.5):
            own = chosen(cells, ratio=ratio)
            number = [cell["clients"] * cell["batch"] for cell in own]
            lines[f"{name}, ratio {ratio:g}"] = (number, [content(cell) for cell in own])
    panels.append({"title": "clients", "xlabel": "images in the sum", "ylabel": "share recovered", "lines": lines})
    chart = line_charts([panel | {"ylim": (-0.03, 1.05)} for panel in panels])
    chart.axes[-1].set_xscale("log", base=2)
    chart.axes[-1].set_xlim(0.003, 1024)  # room for the legend on the left of the lines
    chart.axes[-1].set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=110, metadata={"Software": None}))


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page (default: docs)")
    args = parser.parse_args(argv)
    study, detector, membership = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("servers", "detector", "membership")
    )
    write_text(args.output / "servers.md", page(study, detector, membership))
    (args.output / "figures").mkdir(exist_ok=True)
    figure(study, args.output / "figures" / "servers.png")


if __name__ == "__main__":
    run_command(main)
