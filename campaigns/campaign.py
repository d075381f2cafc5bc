"""The campaign of attack.py: attack one victim after another, score what came out, and write the report.

Images and sentences, simulated clients and leak files go through the same loop: a `LeakSource` says whom to attack
(campaigns/sources.py, campaigns/sentences.py), a `Scoring` how close a reconstruction is and what the report shows.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from attacks import ATTACKS, attack_together, is_vectorized, worth_together
from attacks.threat_model.applicable import CROSS_ENTROPY, applicable, applicable_text, require
from attacks.threat_model.client import Round
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.uses import used
from campaigns.memory import LARGEST, free_bytes, how_many
from data.images import check_images
from reports.attack import save_pictures
from reports.watch import stage_lines, watcher
from utils.campaign import Campaign
from utils.distributed import Processes
from utils.progress import listening, track
from utils.runs import Run


@dataclass(frozen=True)
class LeakSource:
    """Whom to attack.

    names: of all images or sentences, in order. sizes: how many of them are behind each leak, one number for all but
    the last. round(batch): the Round of these indices, whose `private` is None where the images are not at hand.
    threat_model: who knows what, for people. preview: a leak, or the shapes of one, to say which attacks apply; None
    for sentences. loss: the clients', as leak files name it. files: of the private images, as far as they are at hand.
    behind: of each image the files that its leak rests on beside the picture's own.
    scale: mean and std of the model's input, to picture a running optimisation; None for what is no picture.
    kind: what is attacked, in words.
    """

    names: list[str]
    sizes: int | list[int]
    round: Callable[[range], Round]
    threat_model: dict[str, str]
    preview: Leak | None = None
    loss: str = CROSS_ENTROPY
    files: Sequence[Path] = ()
    behind: Sequence[Sequence[Path]] = ()
    scale: Mapping[str, Sequence[float]] | None = None
    kind: str = "images"


@dataclass(frozen=True)
class Scoring:
    """How reconstructions are scored and reported.

    score(round, reconstruction): (pictures by the folder they are saved in, a row of scores for each image).
    report(run, rows, attack, threat_model): writes the report, and returns what results.json holds.
    """

    score: Callable[[Round, Reconstruction], tuple[dict[str, Tensor], list[dict]]]
    report: Callable[[Run, Sequence[dict], str, Mapping[str, object]], dict]


def run_campaign(
    run: Run,
    peers: Processes,
    source: LeakSource,
    scoring: Scoring,
    *,
    name: str,
    options: dict,
    at_once: int | str | None,
    watch_every: int,
) -> None:
    """Attack the victims of `source` one group after another; write results.json, pictures and report into the run.

    Args:
        name: the attack.
        options: its options.
        at_once: victims attacked as one problem, 'auto', or None for the default (see victims_at_once in options).
        watch_every: iterations between pictures of a running optimisation; 0 takes none.
    """
    attack = ATTACKS[name]
    check_attack_applies(run, source, name, options)
    campaign = open_campaign(run, peers, source)
    groups = batch_victims(run, source, campaign, at_once, attack, options)
    for place, group in enumerate(track(groups, len(groups), "attack", run.log if peers.is_main else None), 1):
        rounds = [source.round(batch) for batch in group]
        watch = watcher(run, watch_every, [batch[0] for batch in group], source.scale, len(groups) - place)
        with listening(stage_lines(run.log, group[0][0], len(groups) - place)):
            results, seconds = peers.timed(attack_together, attack, rounds, watch, options)
        for batch, one, result in zip(group, rounds, results, strict=True):
            views, scores = scoring.score(one, result)
            rows = campaign.rows(batch, scores, {"seconds": seconds / sum(map(len, group))} | result.diagnostics)
            save_pictures(run.folder, rows, views)
            campaign.add(rows)
    if rows := campaign.merge():
        run.results(scoring.report(run, rows, name, used(source.threat_model, name, options)))
        campaign.close()


def check_attack_applies(run: Run, source: LeakSource, attack: str, options: dict) -> None:
    """Log what is not shared, which attacks apply and why not, before work starts. Raises RefusalError if the chosen
    one does not, another UserError for its options."""
    for key in ("frozen", "last batch"):
        if key in source.threat_model:
            run.log(f"{key}: {source.threat_model[key]}")
    if source.preview is None:
        return
    run.log(applicable_text(applicable(source.preview, source.loss)))
    require(attack, source.preview, options, source.loss)


def open_campaign(run: Run, peers: Processes, source: LeakSource) -> Campaign:
    """Return the campaign in the run folder, new or continued.

    Raises UserError naming an image of this process's share that cannot be read: better now than after days.
    """
    shared = [path for path in run.inputs if path.is_file()]  # such as the checkpoint
    own = zip_longest(source.files, source.behind)  # of both as many as there are images, or none
    files = [[*filter(None, [file]), *(behind or []), *shared] for file, behind in own]
    campaign = Campaign(run.folder, source.names, peers, files)
    if campaign.finished:
        run.log(f"continuing: {len(campaign.finished)} of {len(source.names)} {source.kind} are done{run.changes}")
    left = [index for group in campaign.todo(source.sizes) for batch in group for index in batch]
    check_images([source.files[index] for index in left] if source.files else [], run.log if peers.is_main else None)
    run.start()
    return campaign


def batch_victims(
    run: Run, source: LeakSource, campaign: Campaign, at_once: int | str | None, attack: Callable, options: dict
) -> list[list[range]]:
    """Return this process's unfinished batches, `at_once` victims in a group. None: as `worth_together` says. 'auto':
    on a GPU as many as fit in its free memory; on a CPU, which gains from small networks only, as None but no more than
    fit.

    Raises UserError in one line where a network from outside fails in one iteration of the first group.
    """
    if source.preview is None:
        return campaign.todo(source.sizes, at_once or 1)
    groups = _grouped(run, source, campaign, at_once, attack, options)
    if groups and is_vectorized(attack) and getattr(source.preview.model, "spec", None):
        attack_together(attack, [source.round(batch) for batch in groups[0]], None, _short(options))
    return groups


def _short(options: dict) -> dict:
    """Return the options of one iteration; compiled, it would take a minute, and less memory."""
    return options | {"iterations": 1, "compile": False}


def _grouped(
    run: Run, source: LeakSource, campaign: Campaign, at_once: int | str | None, attack: Callable, options: dict
) -> list[list[range]]:
    left, model = campaign.todo(source.sizes), source.preview.model
    usual, device = worth_together(attack, model), next(model.parameters()).device
    if at_once != "auto":
        return campaign.todo(source.sizes, at_once or usual)
    most = LARGEST if device.type == "cuda" and is_vectorized(attack) else usual
    if most == 1 or not left:
        run.log("1 victim at a time: this attack, or a network of this size on a CPU, gains nothing from more")
        return left
    largest = max((batch for group in left for batch in group), key=len)

    def iterate(number: int) -> None:
        attack_together(attack, [source.round(largest) for _ in range(number)], None, _short(options))

    free = free_bytes(device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    number, sentence = how_many(iterate, device, min(most, len(left)), free=free)
    run.log(sentence)
    return campaign.todo(source.sizes, number)
