"""Image identifiability: how often a reconstruction is nearer to its own original than to any other of a pool.

    python -m eval.identifiability --source_dir RECONSTRUCTIONS --target_dir ORIGINALS --pool DIR

Source: image identifiability precision (IIP) of Yin et al., "See Through Gradients", CVPR 2021; here by pixels. The
pool is what an attacker would search; the smaller, the easier, so its size is part of the result.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.images import list_images
from eval.image_folders import command_line, read_image, shared_names
from eval.membership import binomial_interval
from utils.errors import UserError, run_command
from utils.files import write_json

FEWEST = 20  # pictures of a pool: chance finds 1 of 21


def identified(reconstructions: Tensor, originals: Tensor, pool: Tensor) -> Tensor:
    """Return (B,) bool: which of (B, C, H, W) in [0, 1] are nearer to their original than to every picture of the pool.

    pool (M, C, H, W): other pictures; an equal of an original in it counts as the original. Raises UserError for a pool
    of fewer than FEWEST pictures.
    """
    if len(pool) < FEWEST:
        raise UserError(f"a pool of {len(pool)} pictures says little of identifiability: give {FEWEST} or more")
    found, own, others = (value.double().flatten(1) for value in (reconstructions, originals, pool))
    away = torch.cdist(found, others)  # (B, M)
    away[(torch.cdist(own, others) == 0)] = torch.inf
    return (found - own).norm(dim=1) < away.amin(dim=1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line("identifiability", __doc__)
    parser.add_argument("--pool", type=Path, required=True, metavar="DIR", help="folder of other pictures of that size")
    args = parser.parse_args(argv)
    names, missing = shared_names(args.source_dir, args.target_dir, args.allow_missing)
    paths = [root / name for root in (args.source_dir, args.target_dir) for name in names]
    shape = tuple(read_image(paths[0]).shape)
    found, own = torch.stack([_read(path, shape) for path in paths]).chunk(2)
    pool = torch.stack([_read(path, shape) for path in list_images(args.pool)])
    hits = identified(found, own, pool)
    low, high = binomial_interval(int(hits.sum()), len(hits))
    print(
        f"identifiability: {float(hits.double().mean()):.4g} of {len(hits)} images, 95 % interval {low:.3g} to "
        f"{high:.3g}, among {len(pool)} others (higher is closer; chance {1 / (len(pool) + 1):.2g})"
    )
    if missing:
        print(f"{missing} images without a partner were passed over", file=sys.stderr)
    if args.json:
        row = {"mean": float(hits.double().mean()), "low": low, "high": high, "n": len(hits), "pool": len(pool)}
        write_json(args.json, {"identifiability": row, "missing": missing})


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return a picture (3, H, W). Raises UserError where it has another size than the first."""
    image = read_image(path)
    if tuple(image.shape) != shape:
        raise UserError(f"'{path}' is {tuple(image.shape)}, the first picture {shape}: bring all to one size")
    return image


if __name__ == "__main__":
    run_command(main)
