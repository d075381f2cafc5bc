"""What the server of a real Flower run reconstructs from the updates it receives: by local steps, batch size and MJP.

    python scripts/flower_study.py --images PHOTOGRAPHS --output runs/flower [--plan photographs|small]

Every cell is a federated training over loopback (examples/flower/run.py) of two clients on the same eight photographs,
whose server writes leak files, and then attack.py on these. Finished cells are not repeated. FLOWER_PYTHON: the
interpreter that has flwr, if it is another one. Leak files are deleted once attacked: they are as large as two models.
--local calls the app's own functions here instead of sending anything, for a fraction of the time: what a client
answers is the same, bit for bit (tests/examples/test_flower.py).
"""

import copy
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.images import list_images
from leak_file import save
from reports.charts import new_figure, picture_grid
from utils.errors import CONTINUES, UserError, run_command
from utils.ownership import refuse_others
from utils.progress import track
from utils.tool_parser import ToolParser

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, IMAGES = 2, 8
OWN = ("clients", ".clients", "*_leaks", "*_originals", "*_flower.log", "table.md", "figure.jpg")  # beside the runs


class Cell(NamedTuple):
    """One federated run, and the attacks on what its server received."""

    title: str
    steps: int = 1
    batch: int = 1
    mask_ratio: float = 0.0
    attacks: tuple[str, ...] = ("closed_form",)


CELLS = {
    "steps_1": Cell("1 step, 1 image"),
    "steps_2": Cell("2 steps", steps=2),
    "steps_5": Cell("5 steps", steps=5),
    "batch_2": Cell("2 images", batch=2),
    "batch_4": Cell("4 images", batch=4),
    "mjp": Cell("MJP 0.27", mask_ratio=0.27, attacks=("closed_form", "mjp_aware")),
}
MATCHING = ["--attack_options.iterations", "1000", "--attack_options.tv", "1e-3"]
# Options of the app, of attack.py beside them, and the attacks that stand for closed_form where it is not enough.
PLANS = {
    "photographs": ({"model": "deit_small", "lr": 0.01}, ["--model", "deit_small"], ()),
    "small": (
        {
            "model": "vit", "image-size": 32, "classes": 10, "lr": 0.01, "min-block": 2, "max-block": 8,
            "model-options": json.dumps({"embed_dim": 96, "depth": 3, "num_heads": 4, "patch_size": 8}),
        },
        ["--model", "vit", "--model_options.embed_dim", "96", "--model_options.depth", "3", "--model_options.num_heads",
         "4", "--model_options.patch_size", "8", "--model_options.num_classes", "10", "--image_size", "32"],
        ("inverting_gradients",),
    ),
}  # fmt: skip


def share_out(images: Path, folder: Path) -> None:
    """Copy IMAGES photographs, spread over the folder, to client_0 and client_1."""
    for place, path in enumerate(list_images(images, IMAGES)):
        target = folder / f"client_{place % CLIENTS}" / f"class_{place // CLIENTS}"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / f"{place:02d}{path.suffix}")


def rounds_of(cell: Cell, most: int) -> int:
    """Return the rounds until every client has trained on all its photographs, or for `most` rounds."""
    return min(most, IMAGES // CLIENTS // cell.batch)


def order(cell: Cell, rounds: int) -> list[int]:
    """Return numbers of the photographs in the order of the leak files and of the images behind each."""
    own = [[client + CLIENTS * place for place in range(IMAGES // CLIENTS)] for client in range(CLIENTS)]
    return [number for r in range(rounds) for mine in own for number in mine[r * cell.batch : (r + 1) * cell.batch]]


def train_here(app: dict, cell: Cell, rounds: int, clients: Path, leaks: Path) -> None:
    """Return the leak files of a cell by the functions of the Flower app, without Flower."""
    sys.path.insert(0, str(ROOT / "examples/flower"))
    from federation.task import about, local_batch, new_model, train

    defaults = {"model-options": "{}", "image-size": 224, "classes": 1000, "min-block": 8, "max-block": 75, "seed": 0}
    own = {"local-steps": cell.steps, "batch-size": cell.batch, "mask-ratio": cell.mask_ratio}
    config, folders = defaults | app | own, [clients / f"client_{client}" for client in range(CLIENTS)]
    model = new_model(config)
    leaks.mkdir(parents=True, exist_ok=True)
    for number in range(1, rounds + 1):
        sent, answers = copy.deepcopy(model.state_dict()), []
        for client, folder in enumerate(folders):
            model.load_state_dict(sent)
            train(model, *local_batch(str(folder), number, config), number, str(folder), config)
            answers.append(copy.deepcopy(model.state_dict()))
            name = f"round_{number:03d}_client_{client}.safetensors"
            save(leaks / name, before=sent, after=answers[-1], **about(config))
        model.load_state_dict({name: sum(answer[name] for answer in answers) / CLIENTS for name in sent})


def call(command: list, log: Path) -> None:
    with open(log, "w") as file:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = log.read_text().strip().splitlines()[-1:]
        raise UserError(f"{Path(str(command[1])).name} failed ({' '.join(last)[:200]}): see {log}")


def run_cell(
    name: str, cell: Cell, rounds: int, plan: tuple, folder: Path, clients: Path, local: bool
) -> dict[str, Path]:
    """Return the finished run folders of the cell's attacks, by name."""
    app, victim, more = plan
    attacks = [*cell.attacks, *more]
    runs = {attack: folder / f"{name}_{attack}" for attack in attacks}
    leaks, originals = folder / f"{name}_leaks", folder / f"{name}_originals"
    todo = [attack for attack, run in runs.items() if not (run / "results.json").exists()]
    if not todo:
        return runs
    if local:
        train_here(app, cell, rounds, clients, leaks)
    elif len(list(leaks.glob("*.safetensors"))) < rounds * CLIENTS:
        config = app | {"local-steps": cell.steps, "batch-size": cell.batch, "mask-ratio": cell.mask_ratio}
        options = [f"{key}={value}" for key, value in config.items()]
        python = os.environ.get("FLOWER_PYTHON", sys.executable)
        folders = [clients / f"client_{client}" for client in range(CLIENTS)]
        command = [python, ROOT / "examples/flower/run.py", "--images", *folders, "--leaks", leaks, "--rounds", rounds]
        call([*command, "--config", *options], folder / f"{name}_flower.log")
    files = {int(path.stem): path for path in list_images(clients)}
    originals.mkdir(exist_ok=True)
    for place, number in enumerate(order(cell, rounds)):
        shutil.copy(files[number], originals / f"{place:02d}{files[number].suffix}")
    masked = ["--model_options.unknown", "true"] if cell.mask_ratio else []
    for attack in todo:
        options = MATCHING if attack in more else []
        command = ["--attack", attack, *victim, *masked, *options, "--resume", "auto", "--leak", leaks]
        command += ["--images", originals, "--output", runs[attack]]
        runpy.run_path(str(ROOT / "attack.py"), run_name="study")["main"](list(map(str, command)))
    shutil.rmtree(leaks)
    return runs


def table(results: dict[str, dict]) -> str:
    """Return one line an attack: mean and standard deviation over images."""

    def cell(summary: dict, key: str) -> str:
        row = summary.get(key, {"mean": None})
        return "–" if row["mean"] is None else f"{row['mean']:.3g} ± {row['std'] or 0:.2g}"

    keys = {"psnr": "PSNR (dB)", "psnr_visible": "visible (dB)", "psnr_masked": "masked (dB)", "ssim": "SSIM"}
    keys |= {"psnr_baseline": "no leak (dB)", "seconds": "seconds"}
    lines = [
        "| update | attack | n | " + " | ".join(keys.values()) + " |",
        "| --- | --- | ---: |" + " ---: |" * len(keys),
    ]
    for (title, attack), summary in results.items():
        values = " | ".join(cell(summary, key) for key in keys)
        lines.append(f"| {title} | {attack} | {summary['psnr']['n']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs, table.md and figure.jpg")
    parser.add_argument("--plan", choices=PLANS, default="photographs", help="DeiT-S at 224 px, or a small ViT at 32")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a federated run at most (default: 4)")
    parser.add_argument("--local", action="store_true", help="train in this process instead of through Flower")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="cells to run (default: all)")
    given = parser.parse_args()
    refuse_others(given.output, OWN, "this study")
    clients = given.output / "clients"
    if not clients.exists():
        shutil.rmtree(clients.with_name(".clients"), ignore_errors=True)  # of a study that was stopped here
        share_out(given.images, clients.with_name(".clients"))
        clients.with_name(".clients").rename(clients)
    results, pictured = {}, []
    for name in track(given.cells, len(given.cells), "cells", print):
        cell = CELLS[name]
        rounds = rounds_of(cell, given.rounds)
        runs = run_cell(name, cell, rounds, PLANS[given.plan], given.output, clients, given.local)
        for attack, run in runs.items():
            results[cell.title, attack] = json.loads((run / "results.json").read_text())["summary"]
            if attack != "closed_form" or given.plan != "small":
                pictured.append((cell, attack, run, order(cell, rounds)))
        (given.output / "table.md").write_text(table(results) + "\n")
    figure(pictured, results, given.output / "figure.jpg")
    print((given.output / "table.md").read_text())


def figure(pictured: list[tuple], results: dict[str, dict], path: Path) -> None:
    """Return the photographs that all runs have reconstructed, at most three: originals, then a column for each run."""
    shown = sorted(set.intersection(*(set(numbers) for *_, numbers in pictured)))[:3]
    columns, titles = [], []
    for cell, attack, run, numbers in pictured:
        for kind in ("originals", "reconstructions")[bool(columns) :]:
            files = sorted((run / kind).glob("*.png"))
            columns.append([np.asarray(Image.open(files[numbers.index(number)])) for number in shown])
            titles.append("private image")
        who = {"mjp_aware": ", knows it"}.get(attack, ", naive") if cell.mask_ratio else ""
        titles[-1] = f"{cell.title}{who}\n{results[cell.title, attack]['psnr']['mean']:.1f} dB"
    chart = new_figure(1.9 * len(columns), 1.9 * len(shown) + 0.5)
    picture_grid(list(zip(*columns, strict=True)), titles, chart)
    chart.savefig(path, dpi=80)


if __name__ == "__main__":
    run_command(main, CONTINUES)
