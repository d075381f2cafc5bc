"""Score one model at several mask ratios and average over mask draws: what eval.py and consistency.py share."""

import math
import statistics
from collections.abc import Callable, Sequence

from data.options import DataOptions
from eval.options import SubjectOptions
from eval.subject import open_model, outputs_of
from models.jigsaw import Jigsaw
from models.token_jigsaw import TokenJigsaw
from utils.distributed import Processes
from utils.errors import UserError, not_empty
from utils.notes import Notes

SHARES = ("acc1", "acc5", "consistency")  # keys of rows that are percentages of the images
Z = 1.959963984540054  # of 95 % intervals: the quantile 0.975 of the normal distribution


def score_over_ratios(
    score: Callable[..., list[dict]],
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    mask_ratios: Sequence[float],
    seeds: Sequence[int],
    averaged: Sequence[str],
    puzzle: dict,
    limit: int | None,
    log: Callable[[str], None] | None,
    notes: Notes | None = None,
) -> list[dict]:
    """Return a row of `average` per mask ratio, over the mask `seeds`, with the puzzle's cells as patch_size (pixels).

    Args:
        score: `accuracy` or `consistency`.
        model, data: what is opened; see `open_model`.
        averaged: keys of the rows of `score` that are averaged.
        puzzle: options of `Jigsaw` beside ratio and seed; for sentences of `TokenJigsaw`.
        limit: use so many images, spread evenly over the set.
        notes: get what the model's files left open.
    """
    network, inputs = open_model(peers, model, data, seed=seeds[0], notes=notes)
    draws = [(ratio, seed) for ratio in mask_ratios for seed in seeds]
    if inputs.encoder is not None:
        jigsaws = [TokenJigsaw(ratio, seed=seed, **puzzle) for ratio, seed in draws]
    else:
        _check_cells(inputs.data.image_size, network.patch_size, any(mask_ratios))
        jigsaws = [Jigsaw(network.grid, ratio, seed=seed, **puzzle) for ratio, seed in draws]
    batches = inputs.open(peers, limit)
    batches.dataset.label_map = outputs_of(network, batches, notes)
    rows = score(network, batches, peers, jigsaws, log)
    groups = [rows[first : first + len(seeds)] for first in range(0, len(rows), len(seeds))]
    return [average(group, averaged) | {"patch_size": network.patch_size} for group in groups]


def _check_cells(side: int, patch_size: int, shuffled: bool) -> None:
    """Raise UserError where images of `side` pixels are to be shuffled and cannot be cut into the model's patches."""
    if shuffled and side % patch_size:
        raise UserError(
            f"images of {side} pixels cannot be cut into patches of {patch_size} to shuffle: choose another "
            "--data.image_size or, for a timm model, --patch_size"
        )


def average(rows: Sequence[dict], keys: Sequence[str]) -> dict:
    """Average rows of one ratio that differ in the mask seed -> one row of means, and `seeds`, how many there were.

    `<key>_std` is the sample standard deviation over the mask seeds, 0 for one. `<key>_low` and `<key>_high` bound a
    95 % interval over images: Wilson's for the keys of SHARES, else the normal one for a key whose rows carry
    `<key>_image_std`, its standard deviation over images. They are those of a single mask draw around the mean of all;
    averaging over draws of the same images can only narrow them.
    """
    not_empty(rows, "the mean over mask draws")
    merged = dict(rows[0], seeds=len(rows))
    for key in keys:
        values = [row[key] for row in rows]
        merged[key] = mean = statistics.fmean(values)
        merged[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        if key in SHARES:
            merged[f"{key}_low"], merged[f"{key}_high"] = wilson(mean, merged["images"])
        elif f"{key}_image_std" in merged:
            spread = math.sqrt(statistics.fmean(row[f"{key}_image_std"] ** 2 for row in rows))
            reach = Z * spread / math.sqrt(merged["images"])
            merged |= {f"{key}_image_std": spread, f"{key}_low": mean - reach, f"{key}_high": mean + reach}
    return merged


def wilson(percent: float, number: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval, in percent, of a share of `percent` among `number` images (Wilson, 1927)."""
    not_empty(range(number), "a share")
    share, weight = percent / 100, Z * Z / number
    middle, reach = share + weight / 2, Z * math.sqrt((share * (1 - share) + weight / 4) / number)
    low, high = (100 * (middle + side * reach) / (1 + weight) for side in (-1, 1))
    return max(0.0, low), min(100.0, high)
