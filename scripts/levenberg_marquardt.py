"""What a second-order polish gains behind attacks that end near the image.

    python scripts/levenberg_marquardt.py --checkpoint VIT/last.pt --images CIFAR10/val --num_images 10 \
        --case noise '{"std": 1e-5}' --case quantize '{"bits": 8}' --output runs/levenberg_marquardt

The attack levenberg_marquardt (attacks/presets/levenberg_marquardt.py) from what `closed_form` and `defense_aware` have
found, never from the truth. Networks have random weights (--trained for the checkpoint's), in float64. PSNR in dB per
image, images clamped to [0, 1]; a stopped run continues. Writes levenberg_marquardt.json and prints a table.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.threat_model.client import Client
from attacks.threat_model.terms import Terms
from data.images import list_images, read_images
from defenses import build_defense
from models import build_model
from models.checkpoints import load_model
from models.jigsaw import Jigsaw
from reports.tables import Measured, Table, markdown
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_json
from utils.ownership import earlier_rows
from utils.statistics import describe
from utils.tool_parser import ToolParser

COMMAND = (
    "python scripts/levenberg_marquardt.py --checkpoint VIT/last.pt --images CIFAR10/val --num_images 10 "
    """--case noise '{"std": 1e-5}' --case quantize '{"bits": 8}' --output DIR; then with --steps 20 """
    """--case prune '{"ratio": 0.1}' --case prune '{"ratio": 0.3}', and with --trained --steps 20 """
    """--case prune '{"ratio": 0.1}' --case noise '{"std": 1e-5}', to the same DIR"""
)
USUAL = 8  # steps at most, of rows that do not say it
SHOWN = {"mean_colour": "mean colour", "closed_form": "closed_form", "polished_closed_form": "polished",
         "defense_aware": "defense_aware", "polished_defense_aware": "polished"}  # fmt: skip


def measure(model: nn.Module, image: Tensor, folder: str, case: tuple[str, dict], steps: int, seed: int) -> dict:
    """Return the scores of one image (C, H, W), normalised as the model's, under one defence."""
    scale = {key: tuple(model.normalize[key]) for key in ("mean", "std")}
    mean, std = (torch.tensor(scale[key], dtype=torch.float64).view(-1, 1, 1) for key in ("mean", "std"))
    name, options = case
    terms = Terms(**scale)
    client = Client(model, Jigsaw(model.grid, 0.0), build_defense(name, options), seed, terms, model.classes or [])
    leak = client.round(seed, image[None], [folder]).leak

    def score(found: Tensor) -> float:
        pixels = (found * std + mean).clamp(0, 1)
        return float(-10 * (pixels - (image * std + mean)).square().mean().clamp_min(1e-20).log10())

    row = {"mean_colour": score(image.mean(dim=(1, 2), keepdim=True).expand_as(image))}
    told, seeded = {"defense": name, "defense_options": options}, torch.Generator().manual_seed
    for base, known in (("closed_form", {}), ("defense_aware", told)):
        row[base] = score(ATTACKS[base](leak, generator=seeded(seed), **known).images[0])
        found = ATTACKS["levenberg_marquardt"](leak, generator=seeded(seed), base=base, steps=steps, **told)
        row[f"polished_{base}"] = score(found.images[0])
        row |= {f"{key}_{base}": found.diagnostics[key] for key in ("start", "objective", "steps")}
    return row


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="ViT of train.py with position embeddings")
    parser.add_argument("--trained", action="store_true", help="its weights; random ones of its shape without")
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument("--num_images", type=int, default=10, help="pictures of a case (default: 10)")
    parser.add_argument("--image_size", type=int, default=8, help="side in pixels (default: 8)")
    parser.add_argument("--case", nargs=2, action="append", required=True, metavar=("DEFENCE", "OPTIONS"),
                        help="a defence and its options as JSON; may be given several times")  # fmt: skip
    parser.add_argument("--steps", type=int, default=USUAL, help=f"second-order steps at most (default: {USUAL})")
    parser.add_argument("--output", type=Path, required=True, help="folder for levenberg_marquardt.json")
    given = parser.parse_args()
    try:
        cases = [(name, json.loads(options)) for name, options in given.case]
    except ValueError as error:
        raise UserError(f"--case: options are JSON, as in '{{\"std\": 1e-5}}' ({error})") from error
    model = load_model(given.checkpoint, image_size=given.image_size)
    if model.normalize is None or getattr(model, "pos_embed", None) is None:
        raise UserError(f"--checkpoint '{given.checkpoint}' is no ViT of train.py with positions and a normalisation")
    if not given.trained:
        said = model.normalize, model.classes
        model = build_model(**model.arguments, seed=0)
        model.normalize, model.classes = said
    model = model.eval().double()
    file = given.output / "levenberg_marquardt.json"
    rows = earlier_rows(file, "polished_closed_form")
    given.output.mkdir(parents=True, exist_ok=True)
    paths = list_images(given.images, given.num_images)
    weights = "trained" if given.trained else "random"
    for case in cases:
        for number, path in enumerate(paths):
            about = {"weights": weights, "defence": case[0], "options": case[1]}
            about |= {"image": f"{path.parent.name}/{path.name}", "side": given.image_size}
            about |= {"most_steps": given.steps}
            if any(about.items() <= ({"most_steps": USUAL} | row).items() for row in rows):
                continue
            image = read_images([path], given.image_size, **model.normalize).double()[0]
            rows.append(about | measure(model, image, path.parent.name, case, given.steps, number))
            write_json(file, {"command": COMMAND, "images": rows})
            print(about | {key: round(rows[-1][key], 2) for key in SHOWN}, flush=True)
    print(markdown(as_table(rows)))


def as_table(rows: Sequence[dict]) -> Table:
    """Return the scores under each defence, mean and standard deviation over pictures, in dB."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        case = row["weights"], f"{row['defence']} {json.dumps(row['options'])}", row.get("most_steps", USUAL)
        cases.setdefault(case, []).append(row)
    lines = []
    for case, some in cases.items():
        found = [describe([row[name] for row in some]) for name in SHOWN]
        lines.append([*case, len(some), *(Measured(one["mean"], one["std"]) for one in found)])
    return Table(["weights", "defence", "steps", "n", *SHOWN.values()], lines, "PSNR in dB")


if __name__ == "__main__":
    run_command(main, CONTINUES)
