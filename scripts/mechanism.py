"""What one masked step of MJP gives away: where patches were hidden and what they held, never their order.

    python scripts/mechanism.py --images datasets/photographs --output runs/mechanism

For every image one step of a randomly initialised DeiT-S/16 in float64, with the unknown row and without it (the naive
shuffle). Measured: how much the gradient changes when the masked patches are permuted once more; the rows of the
position-embedding (PE) gradient, from which the mask is read; what `attacks.linear.mjp_aware` makes of the rest. Writes
mechanism.json, of which scripts/results_page.py makes a claim, and mechanism.jpg, a figure of the first image.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks.linear.mjp_aware import mjp_aware
from attacks.threat_model.client import PrivateBatch, prepare, share
from attacks.threat_model.leak import Leak
from attacks.threat_model.victim import build_victim
from data.images import list_images, read_images
from data.transforms import denormalize
from eval.reconstruction import score
from models.jigsaw import Jigsaw, shuffle_patches, unpatchify
from reports.charts import new_figure, picture_grid
from training.pictures import mark_hidden
from utils.errors import run_command
from utils.files import write_json
from utils.progress import track
from utils.seeds import derive_seed
from utils.statistics import describe, finite
from utils.tool_parser import ToolParser

SCALE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def gradient(model: nn.Module, private: PrivateBatch) -> Leak:
    return share(model, private, lambda gradients, step: gradients, True, **SCALE)


def permuted_again(private: PrivateBatch, patch_size: int, generator: torch.Generator) -> PrivateBatch:
    """Return the same step with the masked patches in another order."""
    places = private.mask[0].nonzero().flatten()
    source = private.source.clone()
    source[0, places] = source[0, places[torch.randperm(len(places), generator=generator)]]
    return replace(private, source=source, model_input=shuffle_patches(private.images, source, patch_size))


def change(one: Leak, other: Leak) -> float:
    """Return the largest change of an entry of the gradient, relative to the largest entry of its tensor."""
    pairs = [(one.gradients[name], other.gradients[name]) for name in one.gradients]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def row_norms(leak: Leak) -> Tensor:
    """Return (N,): lengths of the patches' rows of the PE gradient."""
    return leak.gradient("pos_embed", "the mask")[0, 1:].norm(dim=1)


def measure(image: Tensor, models: dict[str, nn.Module], ratio: float, seed: int) -> tuple[dict, list[Tensor]]:
    """Return (measures of one masked step, the pictures of the figure (3, H, W) in [0, 1])."""
    model = models["unknown row"]
    private = prepare(model, image, torch.tensor([0]), Jigsaw(model.grid, ratio, seed=seed), seed)
    generator = torch.Generator().manual_seed(derive_seed(seed, "another order"))
    again = permuted_again(private, model.patch_size, generator)
    leaks = {name: [gradient(each, step) for step in (private, again)] for name, each in models.items()}
    leak, hidden = leaks["unknown row"][0], private.mask
    norms = row_norms(leak)
    found = mjp_aware(leak, generator=generator).images
    views = [denormalize(view, **SCALE) for view in (private.images, private.model_input, again.model_input, found)]
    scores = score(views[0], views[1], views[3], hidden, model.patch_size)
    row = {
        "masked": int(hidden.sum()),
        "order_bits": math.lgamma(int(hidden.sum()) + 1) / math.log(2),
        "order_change": change(*leaks["unknown row"]),
        "naive_order_change": change(*leaks["naive shuffle"]),
        "mask_right": float(((norms == 0) == hidden[0]).all()),
    }
    row |= {name: scores[name].item() for name in ("psnr_visible", "psnr_masked", "psnr", "psnr_baseline")}
    height = (norms / norms.max()).log10().clamp(min=-3) / 3 + 1  # in [0, 1], and 0 also where nothing is
    side = model.patch_size**2 * 3
    rows = unpatchify(height[None, :, None].expand(1, -1, side), model.patch_size, model.grid)
    shown = [mark_hidden(view.float(), hidden, model.patch_size)[0] for view in (*views[1:3], rows)]
    return finite(row), [views[0][0], *shown, views[3][0].clamp(0, 1)]


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--num_images", type=int, default=6, help="how many of them (default: 6)")
    parser.add_argument("--ratio", type=float, default=0.1, help="mask ratio of the step (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and masks (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="folder for mechanism.json and mechanism.jpg")
    given = parser.parse_args()
    paths = list_images(given.images, given.num_images)
    kinds = {"unknown row": True, "naive shuffle": False}
    models = {
        name: build_victim(None, "deit_small", seed=given.seed, image_size=224, unknown=unknown).double()
        for name, unknown in kinds.items()
    }
    rows, pictures = [], []
    for number, path in enumerate(track(paths, len(paths), "step", print)):
        image = read_images([path], 224, **SCALE).double()
        row, views = measure(image, models, given.ratio, given.seed + number)
        rows, pictures = [*rows, row], pictures or views
    summary = {key: describe([row[key] for row in rows if row[key] is not None]) for key in rows[0]}
    given.output.mkdir(parents=True, exist_ok=True)
    write_json(given.output / "mechanism.json", {"ratio": given.ratio, "summary": summary, "images": rows})
    for key, found in summary.items():
        print(f"{key:20s} {found['mean']:.4g} ± {found['std'] or 0:.2g} (n = {found['n']})")
    first = rows[0]
    visible, masked = (round(first[name]) for name in ("psnr_visible", "psnr_masked"))
    titles = [
        "private image",
        f"what the model is shown:\n{first['masked']} masked patches, permuted",
        f"in another order: the gradient\nchanges by {first['order_change']:.0e} of its size",
        "length of the PE gradient's rows\n(log scale): 0 where masked",
        f"from the gradient, order by jigsaw:\nvisible {visible} dB, masked {masked} dB",
    ]
    chart = new_figure(2.5 * len(titles), 3.0)
    columns = [(255 * view.float()).round().byte().permute(1, 2, 0).numpy() for view in pictures]
    picture_grid([columns], titles, chart)
    chart.savefig(given.output / "mechanism.jpg", dpi=110, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    run_command(main)
