"""Peak memory against the number of images: evaluation and attack campaigns hold a constant part of their data.

    python -m benchmarks.memory --output runs/memory
    python -m benchmarks.memory --output runs/memory --victims     # of one iteration of an attack, per victim

Every row is a process of its own: eval.py on links to a few pictures, attack.py (closed form) on small ones. Reported
are the peak resident memory of the process, the open files and the segments of shared memory it had at its end, and
how large the campaign's report is. One thread, no loader workers unless stated.

--victims: the tensors that one iteration of Inverting Gradients (float32) has alive at its peak, for one victim and for
each one more of a vectorised group, and how many `--victims_at_once auto` would take in so much free memory.
"""

import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attacks.presets.inverting_gradients import inverting_gradients
from attacks.threat_model.leak import Leak
from campaigns.memory import SHARE, peak_bytes
from models import build_model
from models.checkpoints import save_checkpoint
from utils.errors import run_command
from utils.files import write_json
from utils.ownership import refuse_others
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"num_classes": 10, "image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
VICTIMS = {  # name -> model and side of its images
    "LeNet": ("lenet", 32),
    "ConvNet": ("convnet", 32),
    "ViT-Ti/16": ("deit_tiny", 224),
    "DeiT-S/16": ("deit_small", 224),
}
CARDS = {"24 GiB": 24 * 2**30, "141 GB": 141 * 10**9}  # a common card, and an H200
# Runs a script as a user does and prints what it has used, its last line.
MEASURED = """
import json, os, resource, runpy, sys
from pathlib import Path
script = sys.argv.pop(1)
sys.argv[0] = script
main = runpy.run_path(script)["main"]
main()
found = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
found |= {"files": len(os.listdir("/proc/self/fd")), "shared": len(os.listdir("/dev/shm"))}
print(json.dumps(found))
"""


def write_pictures(folder: Path, count: int, distinct: int = 50) -> Path:
    """Write `count` image entries in ten class folders, links to a few 16 x 16 pictures."""
    rng = np.random.default_rng(0)
    stock = folder.parent / "stock"
    stock.mkdir(parents=True, exist_ok=True)
    for number in range(distinct):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stock / f"{number}.png")
    for number in range(count):
        place = folder / f"class_{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        link = place / f"{number:06d}.png"
        if not link.exists():
            os.link(stock / f"{number % distinct}.png", link)
    return folder


def measure(script: str, *options: object) -> dict:
    command = [sys.executable, "-c", MEASURED, script, *map(str, options)]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": round(time.monotonic() - began, 1)}


def measure_victims(name: str, model: str, side: int) -> dict:
    network = build_model(model, image_size=side, num_classes=10 if side < 224 else 1000).eval()
    parameters = dict(network.named_parameters())

    def leak(label: int) -> Leak:
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(label))
        loss = torch.nn.functional.cross_entropy(network(image), torch.tensor([label]))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {key: value for key, value in zip(parameters, found, strict=True) if value is not None}
        return Leak(network, gradients, (3, side, side), 1, labels=torch.tensor([label]))

    def iterate(number: int) -> None:
        generators = [torch.Generator().manual_seed(k) for k in range(number)]
        inverting_gradients([leak(k) for k in range(number)], generator=generators, iterations=1)

    one, two, three = (peak_bytes(partial(iterate, number), torch.device("cpu")) for number in (1, 2, 3))
    fit = {card: 2 + int((SHARE * size - two) // (three - two)) for card, size in CARDS.items()}
    return {"victim": name, "side": side, "first_mb": one / 1e6, "more_mb": (three - two) / 1e6, "fit": fit}


def victim_table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"| victim | side (px) | one alone (MB) | each more (MB) | {' | '.join(f'fit in {card}' for card in CARDS)} |"
    ]
    lines += ["| --- |" + " ---: |" * (3 + len(CARDS))]
    for row in rows:
        cells = [f"{row['first_mb']:.1f}", f"{row['more_mb']:.1f}", *(f"{number:,}" for number in row["fit"].values())]
        lines.append(f"| {row['victim']} | {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures, runs and results.json")
    text = "image entries evaluated (default: %(default)s)"
    parser.add_argument("--evaluate", type=int, nargs="*", default=[1000, 10_000, 100_000], help=text)
    text = "images attacked (default: %(default)s)"
    parser.add_argument("--attack", type=int, nargs="*", default=[50, 500, 5000], help=text)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the evaluation (default: 0)")
    parser.add_argument("--victims", action="store_true", help="measure victims of an attack instead")
    given = parser.parse_args()
    refuse_others(given.output, ("entries_*", "model.pt", "results.json", "victims.json"), "this benchmark")
    given.output.mkdir(parents=True, exist_ok=True)
    if given.victims:
        torch.set_num_threads(1)
        rows = [measure_victims(name, *about) for name, about in VICTIMS.items()]
        write_json(given.output / "victims.json", {"rows": rows, "share": SHARE})
        return print(victim_table(rows))
    output, rows = given.output.resolve(), []

    model, checkpoint = build_model("vit", **MODEL), output / "model.pt"
    classes = [f"class_{label}" for label in range(10)]
    save_checkpoint(checkpoint, {"arguments": model.arguments, "model": model.state_dict(), "classes": classes})
    common = ["--checkpoint", checkpoint, "--device", "cpu", "--overwrite"]
    for count in given.evaluate:
        data = write_pictures(output / f"entries_{count}" / "val", count).parent
        options = [*common, "--data.path", data, "--data.workers", given.workers, "--data.batch_size", 100]
        row = measure("eval.py", *options, "--output", output / f"eval_{count}")
        (score,) = json.loads((output / f"eval_{count}" / "results.json").read_text())["accuracy"]
        assert score["images"] == count
        rows.append({"script": "eval.py", "count": count} | row)
        print(rows[-1], flush=True)
    for count in given.attack:
        data, run = write_pictures(output / f"entries_{count}" / "val", count), output / f"attack_{count}"
        row = measure("attack.py", *common, "--images", data, "--attack", "closed_form", "--output", run)
        row |= {"report_mb": (run / "report.html").stat().st_size / 2**20}
        rows.append({"script": "attack.py", "count": count} | row)
        print(rows[-1], flush=True)
    load = [round(value, 1) for value in os.getloadavg()]
    write_json(output / "results.json", {"rows": rows, "workers": given.workers, "load": load})
    print(f"load average {load}, peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB")


if __name__ == "__main__":
    run_command(main)
