"""Score one checkpoint at several mask ratios and average over mask draws: what eval.py and consistency.py share."""

import statistics
from collections.abc import Callable, Sequence

from data.loaders import open_eval
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.checkpoints import load_model
from models.jigsaw import Jigsaw
from utils.distributed import Processes
from utils.errors import UserError


def score_over_ratios(
    score: Callable[..., list[dict]],
    checkpoint: str,
    peers: Processes,
    *,
    mask_ratios: Sequence[float],
    seeds: Sequence[int],
    averaged: Sequence[str],
    data: dict,
    blocks: dict,
    limit: int | None,
    ema: bool,
    num_heads: int | None,
    log: Callable[[str], None] | None,
) -> list[dict]:
    """One row per mask ratio: the mean over mask `seeds` of each `averaged` key, and its standard deviation `<key>_std`.

    score: `accuracy` or `consistency`. data: the options of `open_eval`; image_size, mean and std left at None come
    from the checkpoint. blocks: mask_sampler, min_block and max_block of `Jigsaw`. The spread of a single seed is 0.
    """
    model = load_model(checkpoint, ema=ema, image_size=data["image_size"], num_heads=num_heads)
    known = model.normalize or {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    data = data | {"image_size": model.arguments.get("image_size", 224)}
    data |= {key: data[key] or known[key] for key in ("mean", "std")}
    batches = open_eval(peers, limit=limit, **data)
    check_classes(model.classes, model.arguments["num_classes"], batches.dataset.base.classes)
    jigsaws = [Jigsaw(model.grid, ratio, seed=seed, **blocks) for ratio in mask_ratios for seed in seeds]
    rows = score(model.to(peers.device), batches, peers, jigsaws, log)
    groups = [rows[first : first + len(seeds)] for first in range(0, len(rows), len(seeds))]
    return [average(group, averaged) for group in groups]


def average(rows: Sequence[dict], keys: Sequence[str]) -> dict:
    """Rows of one ratio that differ in the mask seed -> one row of means, with `seeds` and `<key>_std` (sample std)."""
    merged = dict(rows[0], seeds=len(rows))
    for key in keys:
        values = [row[key] for row in rows]
        merged[key] = statistics.fmean(values)
        merged[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return merged


def check_classes(trained: Sequence[str] | None, outputs: int, names: Sequence[str]) -> None:
    """Raise UserError when the data's class `names` cannot be those a model was `trained` on (None: not recorded)."""
    if trained and list(trained) != list(names):
        odd = next((name for name in names if name not in trained), None)
        detail = f"'{odd}' is new to it" if odd else f"it knows {len(trained)}, the data has {len(names)}"
        raise UserError(f"the data's classes are not those the checkpoint was trained on ({detail}): use its data set")
    if len(names) > outputs:
        raise UserError(f"the data has {len(names)} classes, the checkpoint only {outputs} outputs: use its data set")
