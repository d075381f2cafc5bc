"""Score one checkpoint at several mask ratios and average over mask draws: what eval.py and consistency.py share."""

import statistics
from collections.abc import Callable, Sequence

from timm.data import ImageNetInfo

from data.loaders import open_eval
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models.checkpoints import load_model
from models.jigsaw import Jigsaw
from utils.distributed import Processes
from utils.errors import UserError


def score_over_ratios(
    score: Callable[..., list[dict]],
    peers: Processes,
    *,
    checkpoint: str,
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
    """One row per mask ratio: the mean over mask `seeds` of each `averaged` key, its standard deviation `<key>_std`.

    score: `accuracy` or `consistency`. data: the options of `open_eval`; image_size, mean and std left at None come
    from the checkpoint. blocks: mask_sampler, min_block and max_block of `Jigsaw`. The spread of a single seed is 0.
    """
    model = load_model(checkpoint, ema=ema, image_size=data["image_size"], num_heads=num_heads)
    known = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | (model.normalize or {})
    data = data | {"image_size": model.arguments.get("image_size", 224)}
    data |= {key: data[key] or known[key] for key in ("mean", "std")}
    batches = open_eval(peers, limit=limit, **data)
    dataset = batches.dataset
    dataset.label_map = class_outputs(model.classes, model.arguments["num_classes"], dataset.base.classes)
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


def class_outputs(trained: Sequence[str] | None, outputs: int, names: Sequence[str]) -> list[int]:
    """For each class of the data, the model output that stands for it.

    trained: class names in the order of the outputs, or None when the checkpoint did not record them; then a model of
    1000 outputs and class folders named like ImageNet's synsets (n01440764) are matched by name, others by order.
    Raises UserError when the data's classes cannot be those of the model.
    """
    synsets = ImageNetInfo().label_names()
    if trained is None and outputs == len(synsets) and set(names) <= set(synsets):
        trained = synsets
    if trained is None:
        if len(names) != outputs:
            raise UserError(f"{len(names)} classes of data do not fit a checkpoint of {outputs} outputs: use its data")
        return list(range(outputs))
    output = {name: position for position, name in enumerate(trained)}
    new = [name for name in names if name not in output]
    if new:
        raise UserError(
            f"{len(new)} of the data's {len(names)} classes are not among the checkpoint's {len(trained)}: "
            f"'{new[0]}' is new to it; use the data set it was trained on"
        )
    return [output[name] for name in names]
