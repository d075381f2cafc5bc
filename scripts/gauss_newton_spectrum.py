"""How strongly a shared gradient depends on each direction of the private image: the Gauss-Newton spectrum.

    python scripts/gauss_newton_spectrum.py --case "ViT, photographs" VIT/last.pt CIFAR10/val \
        --case "ConvNet, photographs" CONVNET/last.pt CIFAR10/val --output runs/spectrum

J (P, n) is the derivative of the gradient, divided by its length, with respect to the n normalised pixels, at the
private image, in float64 and exact. An eigenvalue of J^T J (n, n) is the squared relative change of the gradient for a
step of length 1 along its eigenvector: matching by first-order steps sees the large ones. Each case is measured with
the weights of its checkpoint and with random ones of the same network. Per image: the eigenvalues relative to the
largest; the share of the image's energy about its mean colour in directions below 1e-1, 1e-2, ... of it; and the
picture that is left when those directions are set to the mean colour, with its PSNR and what its gradient differs by.
Writes gauss_newton.json image by image (a stopped run continues) and gauss_newton.png, a figure.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.threat_model.client import labels_of
from attacks.threat_model.local_step import client_model, shared_gradient
from data.images import list_images, read_images
from models import build_model
from models.checkpoints import load_model
from reports.charts import line_charts, new_figure
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_atomic, write_json
from utils.ownership import earlier_rows
from utils.statistics import describe
from utils.tool_parser import ToolParser

THRESHOLDS = tuple(10.0**-k for k in range(1, 11))
QUANTILES = 65  # points at which a spectrum is kept


def columns(gradient: Callable[[Tensor], Tensor], image: Tensor, at_once: int = 32) -> tuple[Tensor, Tensor]:
    """Return (values (P,), J^T (n, P)) of `gradient`, a function (C, H, W) -> (P,), at an image of n values, by
    `at_once` of the n together."""
    values, pull = vjp(gradient, image)  # pull(v) = J^T v
    _, push = vjp(lambda v: pull(v)[0], torch.zeros_like(values))  # is linear, and its transpose is push(u) = J u
    units = torch.eye(image.numel(), dtype=image.dtype).view(-1, *image.shape)
    return values.detach(), vmap(lambda unit: push(unit)[0], chunk_size=at_once)(units).detach()


def gauss_newton(gradient: Callable[[Tensor], Tensor], image: Tensor, at_once: int = 32) -> Tensor:
    """Return J^T J (n, n) of `gradient` at an image; arguments as of `columns`."""
    _, along = columns(gradient, image, at_once)  # (n, P)
    return along @ along.T


def flat_gradient(model: nn.Module, target: Tensor, image: Tensor) -> Tensor:
    """Return the gradient (P,) that a client shares for one image (C, H, W) whose classes have probabilities `target`
    (1, classes)."""
    parameters = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        found = shared_gradient(model, parameters, tuple(parameters), image[None], target, None, None)
    return torch.cat([value.flatten() for value in found.values()])


def measure(gradient: Callable[[Tensor], Tensor], image: Tensor, std: Tensor) -> dict:
    """Return the measures of one image (C, H, W), normalised by `std` (C, 1, 1) (see the top of this file)."""
    own = gradient(image)
    length = own.norm()
    values, vectors = torch.linalg.eigh(gauss_newton(gradient, image) / length.square())
    values, vectors = values.flip(0).clamp_min(0) / values[-1], vectors.flip(1)  # the largest first
    mean = image.mean(dim=(1, 2), keepdim=True).expand_as(image)
    parts = vectors.T @ (image - mean).flatten()  # (n,)
    energy = parts.square() / parts.square().sum()
    left = []
    for threshold in THRESHOLDS:
        strong = values > threshold
        picture = mean + (vectors[:, strong] @ parts[strong]).view_as(image)
        other = gradient(picture)
        error = ((picture - image) * std).square().mean().clamp_min(1e-20)
        left.append(
            {
                "threshold": threshold,
                "directions": int(strong.sum()),
                "energy_below": float(energy[~strong].sum()),
                "psnr": float(-10 * error.log10()),
                "residual": float((other - own).norm() / length),
                "cosine_distance": float(1 - other @ own / (other.norm() * length)),
            }
        )
    places = torch.linspace(0, len(values) - 1, QUANTILES).round().long()
    rank = int((values > len(values) * torch.finfo(values.dtype).eps).sum())
    return {"n": len(values), "rank": rank, "spectrum": values[places].tolist(), "left": left}


def networks(checkpoint: str, seed: int) -> dict[str, nn.Module]:
    """Return the network of a checkpoint and one of its shape with random weights, in float64."""
    trained = load_model(checkpoint)
    arguments = dict(trained.arguments)
    random = build_model(arguments.pop("name"), seed=seed, **arguments)
    random.normalize, random.classes = trained.normalize, trained.classes
    return {
        name: model.eval().double().requires_grad_(False) for name, model in (("random", random), ("trained", trained))
    }


def draw(rows: list[dict]) -> object:
    """Return the figure: spectra, the image's energy by curvature, and PSNR against the gradient's residual."""
    lines: dict[str, list[dict]] = {}
    for row in rows:
        lines.setdefault(f"{row['case']}, {row['weights']}", []).append(row)
    panels = [
        {"title": "Spectrum", "xlabel": "place of the eigenvalue / n", "ylabel": "eigenvalue / largest", "lines": {}},
        {"title": "Where the image is", "xlabel": "curvature below", "ylabel": "energy of the image (%)", "lines": {}},
        {"title": "What is left of it", "xlabel": "gradient off by (relative)", "ylabel": "PSNR (dB)", "lines": {}},
    ]
    for name, some in lines.items():
        spectrum = torch.tensor([row["spectrum"] for row in some]).clamp_min(1e-18).log().mean(dim=0).exp()
        mean = {key: torch.tensor([[step[key] for step in row["left"]] for row in some]).mean(dim=0)
                for key in ("energy_below", "psnr", "residual")}  # fmt: skip
        panels[0]["lines"][name] = torch.linspace(0, 1, QUANTILES)[::4].tolist(), spectrum[::4].tolist()
        panels[1]["lines"][name] = THRESHOLDS, (100 * mean["energy_below"]).tolist()
        panels[2]["lines"][name] = mean["residual"].tolist(), mean["psnr"].tolist()
    chart = line_charts(panels, new_figure(13.5, 4.0))
    first, second, third = chart.axes
    first.set(yscale="log", ylim=(1e-14, 3))  # room for the legend
    second.set_xscale("log")
    third.set_xscale("log")
    third.set(xlim=(1e-5, 10), ylim=(0, 45))
    for axes in (second, third):
        axes.get_legend().remove()
    return chart


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--case", nargs=3, action="append", required=True, metavar=("NAME", "CHECKPOINT", "IMAGES"),
        help="a victim of train.py and the pictures of its clients; may be given several times",
    )  # fmt: skip
    parser.add_argument("--num_images", type=int, default=4, help="images of a case (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="folder for gauss_newton.json and gauss_newton.png")
    given = parser.parse_args()
    names = [case[0] for case in given.case]
    if len(set(names)) < len(names):
        raise UserError("--case: two cases have one name: give each its own")
    cases = [
        (name, networks(file, given.seed), list_images(images, given.num_images)) for name, file, images in given.case
    ]
    file = given.output / "gauss_newton.json"
    rows = earlier_rows(file, "spectrum")
    given.output.mkdir(parents=True, exist_ok=True)
    done = {(row["case"], row["weights"], row["image"]) for row in rows}
    for name, models, paths in cases:
        for weights, model in models.items():
            scale = dict(zip(("mean", "std"), model.normalize.values(), strict=False))
            for path in paths:
                image = f"{path.parent.name}/{path.name}"
                if (name, weights, image) in done:
                    continue
                pixels = read_images([path], model.arguments["image_size"], **scale).double()
                label = labels_of(model, [path.parent.name], pixels, model.classes or [])
                target = nn.functional.one_hot(label, model.arguments["num_classes"]).double()
                gradient = partial(flat_gradient, client_model(model, training=False), target)
                std = torch.tensor(scale["std"], dtype=torch.float64).view(-1, 1, 1)
                rows.append({"case": name, "weights": weights, "image": image, **measure(gradient, pixels[0], std)})
                write_json(file, {"images": rows})
                print(f"{name}, {weights}, {image}: rank {rows[-1]['rank']} of {rows[-1]['n']}", flush=True)
    print("| case | weights | n | rank | energy below 1e-2 (%) | 1e-4 | 1e-6 | PSNR without 1e-3 (dB) | residual |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        for weights in ("random", "trained"):
            some = [row for row in rows if (row["case"], row["weights"]) == (name, weights)]
            cells = [100 * describe([row["left"][k]["energy_below"] for row in some])["mean"] for k in (1, 3, 5)]
            psnr, residual = (describe([row["left"][2][key] for row in some])["mean"] for key in ("psnr", "residual"))
            rank = min(row["rank"] for row in some)
            energy = " | ".join(f"{cell:.1f}" for cell in cells)
            print(f"| {name} | {weights} | {len(some)} | {rank} | {energy} | {psnr:.1f} | {residual:.1e} |")
    chart = draw([row for row in rows if row["case"] in names])
    write_atomic(given.output / "gauss_newton.png", lambda handle: chart.savefig(handle, format="png", dpi=110))


if __name__ == "__main__":
    run_command(main, CONTINUES)
