"""Peak memory against the number of images: evaluation and attack campaigns hold a constant part of their data.

    python -m benchmarks.memory --output runs/memory

Every row is a process of its own: eval.py on links to a few pictures, attack.py (closed form) on small ones. Reported
are the peak resident memory of the process, the open files and the segments of shared memory it had at its end, and
how large the campaign's report is. One thread, no loader workers unless stated.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from models import build_model
from models.checkpoints import save_checkpoint
from utils.errors import run_command
from utils.files import write_json

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"num_classes": 10, "image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
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
    """`count` image entries in ten class folders, links to a few 16 x 16 pictures."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures, runs and results.json")
    text = "image entries evaluated (default: %(default)s)"
    parser.add_argument("--evaluate", type=int, nargs="*", default=[1000, 10_000, 100_000], help=text)
    text = "images attacked (default: %(default)s)"
    parser.add_argument("--attack", type=int, nargs="*", default=[50, 500, 5000], help=text)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the evaluation (default: 0)")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
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
