"""What defences, batches, aggregates and local steps leave to `joint`, and what it costs; one resumable table a study.

    python scripts/joint_study.py --study defenses --images DIR --output docs/results/joint_defenses.json

Photographs at 64 pixels behind a random ViT of D = 192, 16 patches, 6 blocks; `cost` also other sizes. Studies:

    defenses   a naive attacker (closed_form, which knows of no defence and takes a batch for one image), joint, and,
               where there is one, another attack by equations that knows the defence; float64 and float32
    clients    joint on the mean over 1 to 4 clients (secure aggregation), of plain gradients and of FedAvg updates
    cost       processor seconds and peak memory of joint against the tokens behind the gradient

A file is written after every cell, and cells that it holds are not measured again. Cost: of `clients` 6 minutes of a
core, of the others one. Scores: PSNR in dB over the patches of an image as a set (psnr_patches) and in their places
(psnr), and the share of patches above 25 dB.
"""

import hashlib
import json
import math
import multiprocessing
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.threat_model.client import Client
from attacks.threat_model.victim import build_victim
from campaigns.scoring import score_round
from data.images import list_images, read_images
from defenses import build_defense
from eval.report import read_results, summarised
from models.jigsaw import Jigsaw
from reports.charts import line_charts
from reports.tables import Table, markdown
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.statistics import describe, finite
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
VICTIM = {"patch_size": 16, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 1000}
MEASURES = ("psnr", "psnr_patches", "patches_recovered", "psnr_baseline")
DEFENSES = (  # of single entries, on batches of two
    ("noise", "std", (1e-8, 1e-6, 1e-4)),
    ("prune", "ratio", (0.1, 0.5, 0.9)),
    ("quantize", "bits", (16, 8)),
    ("dp_sgd", "noise_multiplier", (1e-6, 1e-3, 1e-1)),
    ("half_precision", "format", ("float16", "bfloat16")),
)


@dataclass(frozen=True)
class Cell:
    """One entry of a table. attack, options: of ATTACKS; model, size: options of the victim and its pixels; the rest
    is the client's."""

    key: str
    attack: str = "joint"
    options: dict = field(default_factory=dict)
    name: str = "vit"
    model: dict = field(default_factory=lambda: dict(VICTIM))
    size: int = 64
    dtype: str = "float64"
    images: int = 1
    together: tuple | None = None
    ratio: float = 0.0
    defense: str = "none"
    strength: dict = field(default_factory=dict)
    local: tuple | None = None
    withhold: tuple[str, ...] = ()
    attacker_knowledge: str = "method"


def defenses() -> Iterator[Cell]:
    """Return the cells of the table of defences: naive, joint, and told, in both precisions.

    Defences of single entries leave an error in every token, from where a polish leads nowhere: joint goes without.
    """
    rows: list[tuple[str, dict, dict, tuple | None]] = []
    for number in (2, 4, 5, 8):
        rows.append((f"batch of {number}", {"images": number}, {}, None))
    for ratio in (0.27, 0.5):
        rows.append((f"MJP {ratio:g}", {"ratio": ratio}, {}, ("mjp_aware", {})))
    for name, option, strengths in DEFENSES:
        for value in strengths:
            strength = {option: value} | ({"clip": 1.0} if name == "dp_sgd" else {})
            client = {"images": 2, "defense": name, "strength": strength}
            shown = value if isinstance(value, str) else f"{value:g}"
            rows.append((f"batch of 2, {name} {option} {shown}", client, {"polish": False}, None))
    for kind in ("rotary", "none", "sinusoidal"):
        rows.append((f"batch of 2, positions {kind}", {"images": 2, "model": VICTIM | {"positions": kind}}, {}, None))
    prior = {"match_steps": 0, "prior_steps": 25, "underdetermined": True}
    rows.append(("PE gradient withheld", {"withhold": ("pos_embed",)}, {}, ("token_span", prior)))
    for dtype in ("float64", "float32"):
        for label, client, options, told in rows:
            naive = {"attack": "closed_form", "options": {"underdetermined": True}, "attacker_knowledge": "none"}
            yield Cell(f"{label} | {dtype} | naive", dtype=dtype, **client, **naive)
            yield Cell(f"{label} | {dtype} | joint", dtype=dtype, options=options, **client)
            if told:
                yield Cell(f"{label} | {dtype} | told: {told[0]}", told[0], told[1], dtype=dtype, **client)


def clients() -> Iterator[Cell]:
    """Return the cells of aggregates of one image a client, over steps and learning rates; after local steps joint goes
    without its polish, which takes minutes where the steps are noise."""
    for number in (1, 2, 3, 4):
        together = (number, 1, None) if number > 1 else None
        for steps, rate in ((1, 0.0), *((steps, rate) for steps in (2, 4) for rate in (1e-8, 1e-7, 1e-6, 1e-5, 1e-3))):
            local = (steps, rate, 1) if steps > 1 else None
            key = f"clients {number} | steps {steps}" + (f" | rate {rate:g}" if local else "")
            yield Cell(key, images=number, together=together, local=local, options={"polish": local is None})


def cost() -> Iterator[Cell]:
    """Return the cells of batches and masked images, by rising number of tokens."""
    for number in (1, 2, 3, 4, 5):
        yield Cell(f"D 192, {17 * number} tokens", images=number, withhold=("pos_embed",) if number == 1 else ())
    small = {"name": "deit_small", "size": 224}
    for number in (1, 2, 3):
        model = {"patch_size": 32}
        withhold = ("pos_embed",) if number == 1 else ()
        yield Cell(f"D 384, {50 * number} tokens", images=number, model=model, withhold=withhold, **small)
    for ratio in (0.27, 0.5):
        yield Cell(f"D 384, one image of 197 tokens, MJP {ratio:g}", model={}, ratio=ratio, **small)


STUDIES = {"defenses": defenses, "clients": clients, "cost": cost}


def names_of(paths: list[Path]) -> str:
    """Return what two sets of photographs are told apart by: a hash over their names and sizes, in order."""
    listing = "".join(f"{path.name} {path.stat().st_size}\n" for path in paths)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def client_of(cell: Cell, paths: list[Path]) -> Client:
    """Return the client of a cell; labels are places in the listing."""
    positions = cell.model.get("positions", "learned")
    hides = {"unknown": True} if cell.ratio and positions == "learned" else {}
    options = cell.model | hides
    model = build_victim(None, cell.name, seed=0, image_size=cell.size, **options).to(getattr(torch, cell.dtype))
    jigsaw = Jigsaw(model.grid, cell.ratio, "uniform", seed=0)
    terms = SCALE | {"reveal_labels": False, "local": cell.local, "withhold": cell.withhold}
    terms["attacker_knowledge"] = cell.attacker_knowledge
    classes = {str(path): place for place, path in enumerate(paths)}
    defense = build_defense(cell.defense, dict(cell.strength))
    return Client(model, jigsaw, defense, 0, terms, classes, together=cell.together)


def measure(cell: Cell, paths: list[Path], number: int) -> dict:
    """Return {"leaks", "seconds", "megabytes", measure: {mean, std, n}} of `number` leaks, or why it was refused."""
    client = client_of(cell, paths)
    rows, seconds, exact = [], [], 0
    like = next(client.model.parameters())
    for start in range(0, number * cell.images, cell.images):
        chosen = [paths[place % len(paths)] for place in range(start, start + cell.images)]
        images = read_images(chosen, cell.size, **SCALE).to(like)
        one = client.round(start, images, [str(path) for path in chosen])
        began = time.process_time()
        try:
            result = ATTACKS[cell.attack](one.leak, generator=one.generator, **cell.options)
        except UserError as error:
            return {"why": str(error)}
        seconds.append(time.process_time() - began)
        exact += bool(result.diagnostics.get("exact"))
        rows += score_round(one, result, {})[1]
    found = {"leaks": number, "images": len(rows), "exact": exact, "seconds": describe(seconds)}
    for key in MEASURES:
        values = [row[key] for row in map(finite, rows) if row[key] is not None and math.isfinite(row[key])]
        found[key] = describe(values)
    return found


def apart(cell: Cell, paths: list[Path], number: int) -> dict:
    """Measure a cell in a process of its own, whose memory beyond this one's is the attack's; `peak` in MB."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = measure(cell, paths, number)
        except UserError as error:
            return theirs.send(error)
        theirs.send(found | {"peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024})

    child = context.Process(target=work)
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError as error:
        raise UserError(f"the process that measured '{cell.key}' ended with status {child.exitcode}") from error
    child.join()
    if isinstance(found, UserError):
        raise found
    return found


def table_of(study: str, cells: dict[str, dict]) -> Table:
    """Return the measured cells as rows for people: PSNR of the patches as a set, share above 25 dB, exact leaks."""
    rows = []
    for key, cell in cells.items():
        if "why" in cell:
            rows.append([key, "refused", *[""] * (3 + (study == "cost"))])
            continue
        shares = [summarised(cell[name], ".3g") for name in ("psnr_patches", "patches_recovered")]
        more = [f"{cell['peak']:.0f}"] if study == "cost" else []
        rows.append([key, *shares, f"{cell['exact']} of {cell['leaks']}", summarised(cell["seconds"], ".2g"), *more])
    header = [study, "PSNR of patches (dB)", "above 25 dB (%)", "exact", "processor s"]
    return Table(
        header + ["peak MB"] * (study == "cost"), rows, "± sample standard deviation over images; s over leaks"
    )


def draw_cost(cells: dict[str, dict], path: Path) -> None:
    """Draw processor seconds and peak memory against tokens, a line for each width."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for key, cell in cells.items():
        width, _, rest = key.partition(",")
        if rest.endswith("tokens"):
            row = int(rest.split()[0]), cell["seconds"]["mean"], cell["peak"]
            lines.setdefault(width.replace("D", "D ="), []).append(row)
    panels = [
        {"title": title, "xlabel": "tokens behind the gradient, B (N + 1)", "ylabel": unit,
         "lines": {name: ([row[0] for row in rows], [row[place] for row in rows]) for name, rows in lines.items()}}
        for title, unit, place in (("Time of joint, one core", "s", 1), ("Memory beyond the model's process", "MB", 2))
    ]  # fmt: skip
    line_charts(panels).savefig(path, dpi=110)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--study", choices=sorted(STUDIES), required=True, help="which table")
    parser.add_argument("--images", required=True, help="folder of photographs")
    parser.add_argument("--number", type=int, default=4, help="leaks of every cell (default: 4)")
    parser.add_argument("--only", default="", help="measure only cells whose key contains this")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, continued where it exists")
    parser.add_argument("--figure", type=Path, help="cost: also draw it to this file")
    given = parser.parse_args()
    if given.number < 1:
        raise UserError(f"--number must be at least 1, got {given.number}")
    paths = list_images(given.images)
    torch.set_num_threads(1)
    about = {"study": given.study, "leaks": given.number, "photographs": len(paths), "set": names_of(paths)}
    held = read_results(given.output, "cells") if given.output.exists() else {"about": about, "cells": {}}
    if about | held.get("about", {}) != about:  # files from before there was a set have none
        raise UserError(f"'{given.output}' is of another study, number or set of photographs: choose another --output")
    held["command"] = shlex.join(["python", "scripts/joint_study.py", "--study", given.study, "--images", "DIR",
                                  "--number", str(given.number), "--output", given.output.name])  # fmt: skip
    for cell in STUDIES[given.study]():
        options = json.loads(json.dumps(asdict(cell)))
        if held["cells"].get(cell.key, {}).get("options", options) != options:
            raise UserError(f"'{given.output}' has '{cell.key}' with other options: choose another --output")
        if cell.key in held["cells"] or given.only not in cell.key:
            continue
        found = (apart if given.study == "cost" else measure)(cell, paths, given.number)
        held["cells"][cell.key] = found | {"options": options}
        write_json(given.output, held)
        says = found.get("why") or f"{found['psnr_patches']['mean']:.1f} dB, {found['seconds']['mean']:.2f} s"
        print(f"{cell.key}: {says}", flush=True)
    print(markdown(table_of(given.study, held["cells"])), end="")
    if given.figure and given.study == "cost":
        draw_cost(held["cells"], given.figure)


if __name__ == "__main__":
    run_command(main)
