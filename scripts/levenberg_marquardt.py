"""Does a second-order polish gain anything behind attacks that end near the image?

    python scripts/levenberg_marquardt.py --checkpoint VIT/last.pt --images CIFAR10/val --num_images 10 \
        --case noise '{"std": 1e-5}' --case quantize '{"bits": 8}' --output runs/levenberg_marquardt

Levenberg-Marquardt with the exact derivative J of the gradient g in float64, from the reconstruction of `closed_form`
and from that of `defense_aware`, never from the truth. Minimised is

    sum_k (g_k(x) - h_k)^2 / (2 s_k^2) + sum (neighbouring pixels' difference)^2 / (2 * 0.12^2)

with the shared gradient h, s_k the error of an entry that the defence is known to make (attacks/matching/likelihood.py)
and pixels in [0, 1]: the most probable image under independent errors. A step solves (J^T S J + prior + mu diag) d =
-slope by a dense factorisation, as no matrix-free step can do better; mu grows until the sum falls. Networks have
random weights (--trained for the checkpoint's). PSNR in dB per image, images clamped to [0, 1]; a stopped run
continues.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.matching.likelihood import Likelihood
from attacks.threat_model.client import Client
from attacks.threat_model.local_step import client_model
from data.images import list_images, read_images
from defenses import build_defense
from models import build_model
from models.checkpoints import load_model
from models.jigsaw import Jigsaw
from scripts.gauss_newton_spectrum import columns, flat_gradient
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_json
from utils.ownership import earlier_rows
from utils.statistics import describe
from utils.tool_parser import ToolParser

SMOOTH = 0.12  # standard deviation of the difference of neighbouring pixels in [0, 1]
STEPS, TRIALS = 8, 10  # of a polish, and values of mu tried for each
SHOWN = {"mean_colour": "mean colour", "closed_form": "closed_form", "polished_closed_form": "polished",
         "defense_aware": "defense_aware", "polished_defense_aware": "polished"}  # fmt: skip


def roughness(shape: tuple[int, ...], std: Tensor) -> Tensor:
    """Return the matrix R (n, n) with x^T R x / 2 the prior of an image x, normalised by `std` (C, 1, 1)."""
    places = torch.arange(shape[0] * shape[1] * shape[2]).view(shape)
    pairs = [(places[:, 1:], places[:, :-1]), (places[:, :, 1:], places[:, :, :-1])]
    one, other = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    differences = torch.zeros(len(one), places.numel(), dtype=torch.float64)
    rows = torch.arange(len(one))
    differences[rows, one], differences[rows, other] = 1, -1
    differences *= std.double().expand(shape).flatten() / SMOOTH
    return differences.T @ differences


def polish(
    gradient: Callable[[Tensor], Tensor], shared: Tensor, weights: Tensor, start: Tensor, prior: Tensor
) -> tuple[Tensor, list[float]]:
    """Return (image, what is minimised after every step), from `start` (C, H, W). shared, weights (P,): h, 1 / s^2."""

    def cost(image: Tensor) -> float:
        error = (weights * (gradient(image) - shared).square()).sum()
        return float(error + image.flatten() @ prior @ image.flatten()) / 2

    image, costs, mu = start, [cost(start)], 1e-3
    for _ in range(STEPS):
        values, along = columns(gradient, image)
        curvature = (along * weights) @ along.T + prior  # (n, n)
        slope = along @ (weights * (values - shared)) + prior @ image.flatten()
        for _ in range(TRIALS):
            step = torch.linalg.solve(curvature + mu * curvature.diagonal().diag(), -slope).view_as(image)
            if (lower := cost(image + step)) < costs[-1]:
                break
            mu *= 8
        else:
            break
        image, mu = image + step, mu / 8
        costs.append(lower)
        if costs[-2] - lower < 1e-6 * costs[-2]:
            break
    return image, costs


def measure(model: nn.Module, image: Tensor, folder: str, case: tuple[str, dict], seed: int) -> dict:
    """Return the scores of one image (C, H, W), normalised as the model's, under one defence."""
    scale = {key: tuple(model.normalize[key]) for key in ("mean", "std")}
    mean, std = (torch.tensor(scale[key], dtype=torch.float64).view(-1, 1, 1) for key in ("mean", "std"))
    name, options = case
    terms = scale | {"reveal_labels": True}
    client = Client(model, Jigsaw(model.grid, 0.0), build_defense(name, options), seed, terms, model.classes or [])
    leak = client.round(seed, image[None], [folder]).leak

    def score(found: Tensor) -> float:
        pixels = (found * std + mean).clamp(0, 1)
        return float(-10 * (pixels - (image * std + mean)).square().mean().clamp_min(1e-20).log10())

    spread = Likelihood(name, options, batch_size=1, softness=0.1).spread(leak.gradients)
    shared = torch.cat([value.flatten() for value in leak.gradients.values()])
    errors = [spread[key].expand_as(value).flatten() for key, value in leak.gradients.items()]
    weights = torch.cat(errors).double().square().reciprocal()
    fixed = client_model(model, training=False).requires_grad_(False)
    target = nn.functional.one_hot(leak.labels, model.arguments["num_classes"]).double()
    gradient, prior = partial(flat_gradient, fixed, target), roughness(image.shape, std)
    row = {"mean_colour": score(image.mean(dim=(1, 2), keepdim=True).expand_as(image))}
    for attack, known in (("closed_form", {}), ("defense_aware", {"defense": name, "defense_options": options})):
        start = ATTACKS[attack](leak, generator=torch.Generator().manual_seed(seed), **known).images[0]
        low, high = -mean / std, (1 - mean) / std
        found, costs = polish(gradient, shared, weights, start.double().clamp(low, high), prior)
        row |= {attack: score(start), f"polished_{attack}": score(found)}
        row |= {f"cost_{attack}": costs[0], f"cost_polished_{attack}": costs[-1], f"steps_{attack}": len(costs) - 1}
    return row | {"entries": len(shared)}


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="ViT of train.py with position embeddings")
    parser.add_argument("--trained", action="store_true", help="its weights; random ones of its shape without")
    parser.add_argument("--images", required=True, help="folder of pictures")
    parser.add_argument("--num_images", type=int, default=10, help="pictures of a case (default: 10)")
    parser.add_argument("--image_size", type=int, default=8, help="side in pixels (default: 8)")
    parser.add_argument("--case", nargs=2, action="append", required=True, metavar=("DEFENCE", "OPTIONS"),
                        help="a defence and its options as JSON; may be given several times")  # fmt: skip
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
            if any(about.items() <= row.items() for row in rows):
                continue
            image = read_images([path], given.image_size, **model.normalize).double()[0]
            rows.append(about | measure(model, image, path.parent.name, case, number))
            write_json(file, {"images": rows})
            print(about | {key: round(rows[-1][key], 2) for key in SHOWN}, flush=True)
    print(
        "| weights | defence | n | " + " | ".join(SHOWN.values()) + " |\n| --- | --- |" + " ---: |" * (1 + len(SHOWN))
    )
    for key in dict.fromkeys((row["weights"], row["defence"], json.dumps(row["options"])) for row in rows):
        some = [row for row in rows if (row["weights"], row["defence"], json.dumps(row["options"])) == key]
        found = [describe([row[name] for row in some]) for name in SHOWN]
        cells = " | ".join(f"{one['mean']:.1f} ± {one['std'] or 0:.1f}" for one in found)
        print(f"| {key[0]} | {key[1]} {key[2]} | {len(some)} | {cells} |")


if __name__ == "__main__":
    run_command(main, CONTINUES)
