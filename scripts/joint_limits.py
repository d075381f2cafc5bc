"""How much of a masked photograph the equations of `joint` hold in single precision, seen with the truth at hand.

    python scripts/joint_limits.py --images DIR --output docs/results/joint_limits.json \\
        --beside docs/results/joint_paper.json

The cases DeiT-S/16, MJP 0.27 and 0.5 of scripts/joint_table.py. Every patch is solved from its true pixels and from
what attention truly returned: for a patch that the solver leads away from them no better start helps. resolved:
of the 197 tokens, how many directions stand above rounding in the gradients of the first MLP's two layers, the fewer of
both, which an attacker sees too; of some batches this share alone. --beside: a result of joint_table.py, whose patches
are put beside. A diagnosis, no attack: nothing here is used by one. What is measured is kept.
"""

import copy
import json
import sys
import time
from pathlib import Path

import scipy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.joint.block import first_block
from attacks.joint.joint import shown
from attacks.joint.masked import masked_equations
from attacks.joint.rounded import masked_solver
from attacks.joint.token_solver import FITS
from attacks.linear.layer_scale import fold_layer_scale
from attacks.threat_model.client import PrivateBatch
from attacks.threat_model.leak import Leak
from models.jigsaw import patchify
from scripts.joint_cases import presets
from scripts.joint_table import decibels
from scripts.joint_victims import victims
from utils.errors import UserError, no_such_path, run_command
from utils.files import write_json
from utils.progress import track
from utils.statistics import finite
from utils.tool_parser import ToolParser

LIMIT = 55.0  # dB
CASES = ("DeiT-S/16, MJP 0.27", "DeiT-S/16, MJP 0.5")
BATCHES = ("S/32, B = 2", "S/32, B = 3", "D = 192, B = 5")


def inside(leak: Leak, private: PrivateBatch) -> tuple[Tensor, Tensor]:
    """Return what enters the first attention's projection (N, D) and the second layer of the first MLP (N, H) of every
    patch of a masked image."""
    model, given = copy.deepcopy(leak.model).double(), []
    for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
        layer.register_forward_hook(lambda module, inputs, output: given.append(inputs[0][0]))
    with torch.no_grad():
        model(private.model_input.double(), private.mask)
    mixed, active = (part[model.num_prefix_tokens :] for part in given)
    return mixed, active


def nearest(active: Tensor) -> Tensor:
    """Return how far the nearest other token is from each (N,), in parts of its own length."""
    unit = active / active.norm(dim=1, keepdim=True)
    return torch.cdist(unit, unit).fill_diagonal_(torch.inf).amin(dim=1)


def measure(leak: Leak, private: PrivateBatch) -> dict:
    """Return the share of visible and of hidden patches that the equations hold to LIMIT dB, `resolved`, and the median
    distance of a token to the nearest other one, of those that are held and of those that are not."""
    began, generator = time.process_time(), torch.Generator().manual_seed(0)
    leak = fold_layer_scale(leak)
    true = patchify(private.model_input.double(), leak.model.patch_size)[0]  # (N, P)
    hidden, (mixed, active) = private.mask[0], inside(leak, private)
    solver, shift, positions = masked_solver(leak, masked_equations(leak), generator)
    solver = solver.spread(mixed[~hidden], generator)
    within = true.clone()
    within[~hidden] -= shift
    outputs = (mixed - solver.mean) @ (solver.mixes / solver.scale.square()[:, None]).T  # (N, s)
    patches = (within - solver.point) @ solver.basis.T  # (N, r)
    ends, fits = [], []
    for start, position in zip(torch.cat([patches, outputs], dim=1), positions, strict=True):
        unknowns, misfit, _ = solver.solve(start, position)
        ends.append(solver.patches(unknowns))
        fits.append(misfit < FITS[False])
    moved = torch.zeros_like(true)
    moved[~hidden] = shift
    held = (decibels(torch.stack(ends) + moved, true) > LIMIT) & torch.tensor(fits)
    apart = nearest(active)
    return {
        "resolved": min(shown(solver.block), len(true) + 1),
        "tokens": len(true) + 1,
        "visible": float(held[~hidden].double().mean()),
        "hidden": float(held[hidden].double().mean()),
        "nearest_held": float(apart[held].median()) if bool(held.any()) else None,
        "nearest_lost": float(apart[~held].median()) if not bool(held.all()) else None,
        "seconds": time.process_time() - began,
    }


def seen(leak: Leak) -> float:
    """Return the share of a batch's tokens, which are all different, that stand above rounding."""
    leak = fold_layer_scale(leak)
    tokens = leak.batch_size * (leak.model.grid[0] * leak.model.grid[1] + leak.model.num_prefix_tokens)
    return min(1.0, shown(first_block(leak)) / tokens)


def beside(rows: list[dict], measured: list[dict]) -> dict:
    """Return the rank correlation of what the attack found with what a row says, over photographs that both have."""
    number = min(len(rows), len(measured))
    if number < 3:
        return {"n": number}
    found = {part: [row[f"{part}_above_55"] for row in measured[:number]] for part in ("visible", "hidden")}
    told = {"n": number}
    for part, shares in found.items():
        for key in ("resolved", part):
            value = scipy.stats.spearmanr([row[key] for row in rows[:number]], shares).statistic
            told[f"{part} found, {'held' if key == part else key}"] = float(value)
    return finite(told)


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--beside", type=Path, help="result of joint_table.py --preset paper")
    parser.add_argument("--batches", type=int, default=10, help="photographs of each case, at most 10")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; photographs that are in it are kept")
    options = parser.parse_args()
    if not 1 <= options.batches <= 10:
        raise UserError(f"--batches {options.batches}: 1 to 10")
    if options.beside and not options.beside.exists():
        raise UserError(f"--beside {no_such_path(options.beside)}")
    found = json.loads(options.beside.read_text())["batches"] if options.beside else {}
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows, batches = kept.get("photographs", {}), kept.get("batches", {})
    cases = presets()["paper"]
    work = [(name, n) for name in CASES + BATCHES for n in range(min(options.batches, cases[name].batches))]
    for name, number in track(work, len(work), "limits", print):
        done = (rows if name in CASES else batches).setdefault(name, [])
        if len(done) <= number:
            leak, private = victims(cases[name], number, options.images)
            done.append(measure(leak, private) if name in CASES else seen(leak))
        ranks = {name: beside(rows[name], found.get(name, [])) for name in rows}
        told = {"command": COMMAND, "rank_correlations": ranks, "photographs": rows, "batches": batches}
        write_json(options.output, told)
    print(json.dumps(ranks, indent=2))


COMMAND = "python scripts/joint_limits.py --images PHOTOGRAPHS --beside docs/results/joint_paper.json"

if __name__ == "__main__":
    run_command(main)
