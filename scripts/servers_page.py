"""docs/servers.md and its figure, from the JSON of the studies: every number and verdict on the page is computed.

    python scripts/servers_page.py [--output DIR]

Reads servers.json, breaching_bins.json, detector.json, detector_large.json, membership.json, joint_clients.json and
decepticons.json in docs/results; writes servers.md and figures/servers.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reports.charts import line_charts
from reports.prose import wrap_markdown
from scripts.servers_tables import (
    by_kind,
    chosen,
    content,
    of_batches,
    of_breaching,
    of_clients,
    of_decepticons,
    of_detector,
    of_dropout,
    of_fishing,
    of_joint,
    of_large,
    of_masks,
    of_membership,
    verdicts,
)
from utils.errors import run_command
from utils.files import write_atomic, write_text
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
STUDIES = ("servers", "breaching_bins", "detector", "detector_large", "membership", "joint_clients", "decepticons")

HEAD = """\
# Servers that do not play fair, and clients that share a part

Written by `python scripts/servers_page.py` from the studies in `docs/results`; each section names its command.
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
| `head` | the classifier | labels and features (`--attack class_features`, or as a label rule `--attack_options.labels class_features`), membership by span |
| `lora` | LoRA's two matrices | membership by span of the first matrix, once the second is not zero |
| `adapters` | the adapters | `adapter_imprint`; matching |
| `without_positions` | all but position embeddings | `token_span`, `first_block`, `joint`, matching |

`--clients K` sums K clients, of whom `--client_dropout P` drop out of a round, `--mask_ratio R` is MJP, `--server_images DIR` are pictures that the server has. Every
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

    python attack.py --config configs/attack/imprint.yaml --images DIR --server_images DIR2 --num_images 640 \\
        --output runs/imprint  # 20 s
    python attack.py --config configs/attack/adapter_imprint.yaml --images DIR --server_images DIR2 --num_images 64 \\
        --output runs/adapters  # 20 s
    python attack.py --config configs/attack/fishing.yaml --images DIR --num_images 640 --output runs/fishing  # 20 s
    python attack.py --config configs/attack/imprint.yaml --images DIR --server_images DIR2 --batch_size 8 \\
        --clients 16 --num_images 640 --client_dropout 0.25 --mask_ratio 0.5 --output runs/sum
    python audit.py --check RECEIVED.pt --reference BEFORE.pt --images OWN --output runs/check
    python membership.py --model deit_tiny --share head --num_images 64 --batch_size 32 --images DIR --others DIR2 \\
        --output runs/members  # 1 min with 540 others
    python membership.py --model timm:vit_tiny_patch16_224 --share lora --share_options.rank 64 \\
        --leak STEP.safetensors --layer blocks.0.attn.qkv --candidates DIR --others DIR2 --output runs/lora
    python -m eval.registered_psnr --source_dir runs/imprint/reconstructions --target_dir runs/imprint/originals
    python -m eval.identifiability --source_dir runs/imprint/reconstructions --target_dir runs/imprint/originals \\
        --pool DIR2

## What each claim rests on

An image is claimed if all of its pixels are whole 8-bit values: decoded pictures are, and mixtures of several are not.
Clients that train on pictures of other precision (crops resized in floating point, MixUp) get no claim. `fishing` reads
from the leak how many images passed, and claims what its base attack's own equations determine. Guarantees count how
often an image is alone in a bin whose thresholds are quantiles of the server's pictures; they assume private pictures
of the same kind.

Updates of several local steps are differences of weights: in single precision the small gradients of an imprint block
are lost in the rounding of its large biases, and nothing is claimed. Leak files of peft's LoRA are opened by its own
names (`lora_A`, `base_layer`, `modules_to_save`), and `--share_options.config FOLDER` reads rank, alpha and layers from
its `adapter_config.json`. The server of
sentences is one of Python (`attacks.malicious.decepticons`) and not of `--server`, since `attack.py` attacks sentences
one by one. Not done: Decepticons on GPT-2, on causal models and on clients' updates of several steps, and several rounds
of fishing with the same batch. Adapters stand behind whole blocks here; PEFTLeak's stand inside them.
"""  # noqa: E501, commands


def page(found: dict[str, dict]) -> str:
    """Return the page. found: what each JSON of STUDIES holds, by its name."""
    study = found["servers"]
    good = f"{study['recovered_above_db']:g} dB"
    text = "\n".join(
        [
            HEAD,
            "## What MJP changes\n",
            verdicts(study, found["membership"]),
            "![What comes back by mask ratio and by clients, and the detector's ROC](figures/servers.png)\n",
            f"*Means over {study['cells'][0]['n']} repetitions (n = {study['cells'][0]['n']}); lines of equal values "
            "lie on each other.*\n",
            f"Recovered means above {good}; CIFAR-10 at 32 pixels, {study['public']} pictures of the server, "
            f"{study['cells'][0]['n']} repetitions with other images, masks and weights: mean and range, in percent. "
            "`in place` is against the picture, `pictures` against what the model saw. Command: "
            f"`{study['command']}`.\n",
            "## Imprint, by batch size\n",
            of_batches(study),
            "### Beside breaching\n",
            of_breaching(found["breaching_bins"]),
            "## Imprint and adapters under MJP\n",
            "Batch 64 for bins of images (512), 8 for bins of places (64 each) and adapters (rank 128, 6 blocks). "
            "At ratio 0.1 one of 16 patches is hidden, which moves none.\n",
            of_masks(study),
            "## Sums over clients\n",
            "The server sees the mean of all clients, each of which draws a mask of its own.\n",
            of_clients(study),
            "Clients that drop out before the round ends take their images along; the server sees the mean of the "
            "others (MJP 0.5):\n",
            of_dropout(study),
            "Nothing malicious: `joint` on the sum over clients of one image each (docs/results.md, "
            "`scripts/joint_study.py`):\n",
            of_joint(found["joint_clients"]),
            "## Fishing\n",
            "Batch 64 a client, 100 classes; the image alone is attacked by `closed_form`, or `mjp_aware` under MJP. "
            "`detected`: models set up like this, by the detector below. At weaker settings other images reach the "
            "network too, and what comes back is no picture.\n",
            of_fishing(study, found["detector"]),
            "## Sentences\n",
            of_decepticons(found["decepticons"]),
            "## The client's side: is this model honest?\n",
            of_detector(found["detector"]),
            "Each layer is compared with itself before, so that what stands out in a trained model is no alarm.\n",
            of_large(found["detector_large"]),
            "Measure thresholds of your own with `scripts/detector_study.py`. Rounds of a larger step than these, or "
            "a layer that the reference has not, raise an alarm.\n",
            "## Clients that share a head or LoRA: membership by span\n",
            of_membership(found["membership"]),
            HOW,
        ]
    )
    return wrap_markdown(text)


def figure(study: dict, detector: dict, path: Path) -> None:
    """Draw what comes back by mask ratio for each kind of bins and by clients, and the detector's ROC."""
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
    weakest = {row["attack"]: row for row in reversed(detector["weights_only"]["attacks"])}
    lines = {f"{name}, {row['strength']}": ramp(row["roc"]) for name, row in reversed(weakest.items())}
    panels.append(
        {"title": "detector, weakest settings", "xlabel": "false alarms", "ylabel": "detected", "lines": lines}
    )
    chart = line_charts([panel | {"ylim": (-0.03, 1.05)} for panel in panels], across=2)
    clients, roc = chart.axes[-2:]
    for bars in (bars for bars in clients.containers if bars.get_label().endswith("ratio 0.5")):
        bars.lines[0].set_linestyle("--")  # those of bins of images lie on each other
    clients.legend(frameon=False, loc="lower left", fontsize=9)
    clients.set_xscale("log", base=2)
    clients.set_xlim(0.003, 1024)  # room for the legend on the left of the lines
    clients.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    roc.set_xlim(-0.01, 0.2)
    write_atomic(path, lambda file: chart.savefig(file, format="png", dpi=110, metadata={"Software": None}))


def ramp(roc: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return false and true positive rates of an ROC, from no alarm at all to alarms always."""
    points = [[0.0, roc[0][1] if roc[0][0] == 0 else 0.0], *roc, [1.0, 1.0]]
    return [point[0] for point in points], [point[1] for point in points]


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the page (default: docs)")
    args = parser.parse_args(argv)
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in STUDIES}
    write_text(args.output / "servers.md", page(found))
    (args.output / "figures").mkdir(exist_ok=True)
    figure(found["servers"], found["detector"], args.output / "figures" / "servers.png")


if __name__ == "__main__":
    run_command(main)
