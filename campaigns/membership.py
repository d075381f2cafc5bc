"""Ask of pictures whether they are behind a leak, and write what is found: what membership.py does."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from attacks.membership import distances, span_of
from attacks.threat_model.leak import Leak
from campaigns.campaign import LeakSource
from data.images import list_images, read_images
from eval.membership import auc, binomial_interval, tpr_at_fpr
from utils.progress import track
from utils.runs import Run
from utils.statistics import describe

BATCH = 64  # pictures that go through the model at once


def ask_membership(
    run: Run,
    victims: LeakSource,
    *,
    others: str,
    candidates: str | None,
    layer: str | None,
    false_positives: float,
) -> None:
    """Measure how far pictures are from the span of a layer's gradient, and write results.json.

    Args:
        victims: the leaks; of simulated clients the private images are the candidates, one row each.
        others: folder of pictures that took no part, by which the cut is set.
        candidates: folder of pictures that are asked about, for every leak; None: the images behind it.
        layer: name of the layer; None as `span_of` chooses.
        false_positives: rate of others that may fall below the cut.
    """
    asked, strangers = list_images(candidates) if candidates else None, list_images(others)
    run.start()
    rows, rates, areas, spans = [], [], [], []
    leaks = list(_leaks(victims))
    for place, batch in enumerate(track(leaks, len(leaks), "membership, leaks", run.log)):
        private, leak, _ = victims.round(batch)
        span = span_of(leak, layer)
        away = distances(span, leak.model, _read(strangers, leak))
        near = distances(span, leak.model, _read(asked, leak) if asked else private.images.split(BATCH))
        rate = tpr_at_fpr(near, away, false_positives)
        names = [str(path) for path in asked] if asked else [victims.names[index] for index in batch]
        rows += [
            {"leak": place, "image": name, "distance": value, "member": value < rate.cut}
            for name, value in zip(names, near.tolist(), strict=True)
        ]
        rates.append(rate)
        areas.append(auc(near, away))
        about = {"inputs": span.inputs, "rank": len(span.rows), "dimensions": span.rows.shape[1]}
        spans.append({"layer": span.layer} | about)
    hits, asked_of = sum(row["member"] for row in rows), len(rows)
    low, high = binomial_interval(hits, asked_of)
    told = {"false_positives": false_positives, "others": len(strangers), "called_members": hits, "asked": asked_of}
    told |= {"share": hits / asked_of, "low": low, "high": high, "auc": describe(areas)}
    run.log(
        f"membership by span of '{spans[0]['layer']}': {hits} of {asked_of} pictures lie nearer than all but "
        f"{false_positives:g} of {len(strangers)} others ({100 * low:.0f} to {100 * high:.0f} %, 95 % interval); AUC "
        f"{told['auc']['mean']:.3f} over {len(areas)} leak{'s' * (len(areas) > 1)}"
    )
    if any(span["inputs"] > span["rank"] for span in spans):
        run.log(f"the gradient has rank {spans[0]['rank']} for {spans[0]['inputs']} inputs: members lie in it in part")
    if dropout := getattr(leak.model, "lora_dropout", 0):
        run.log(
            f"its adapter was trained with lora_dropout {dropout:g}: what was dropped is not in the gradient, and "
            "members of a step in training mode may lie outside the span"
        )
    run.results({"threat_model": victims.threat_model, "membership": told, "leaks": spans, "per_image": rows})


def _leaks(victims: LeakSource) -> Iterator[range]:
    """Yield the places of the images behind every leak."""
    number, sizes = len(victims.names), victims.sizes
    if isinstance(sizes, int):
        sizes = [min(sizes, number - first) for first in range(0, number, sizes)]
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        yield range(end - size, end)


def _read(paths: Sequence[Path], leak: Leak) -> Iterator[Tensor]:
    """Yield pictures (B, C, H, W) as the client of the leak normalised its own."""
    scale = {"mean": leak.mean, "std": leak.std}
    like = next(leak.model.parameters())
    for first in range(0, len(paths), BATCH):
        yield read_images(paths[first : first + BATCH], leak.image_shape[-1], **scale).to(like)
