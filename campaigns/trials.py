"""One attack of an audit on the gradients of its subject: as many iterations as fit into its time, scores, words."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from attacks import ATTACKS, attack_together, worth_together
from attacks.threat_model.applicable import reason
from attacks.threat_model.client import Client
from campaigns.audit_subject import Subject
from campaigns.scoring import score_round
from campaigns.time_budget import TimeIsUp, stopped_after
from utils.errors import UserError
from utils.statistics import RECOVERED, describe
from utils.summary import decibels, level, spread, summarise

MARGIN = 3.0  # dB above a picture in the mean colour from which an attack counts as having recovered something
PILOT = 4  # iterations that tell how long one takes
FEWEST = 10  # iterations below which an attack is left out for want of time
SPARE = 0.8  # share of its time that an attack plans with


class Trial(NamedTuple):
    """An attack as it is measured: its options, on how many batches, and what that is of the paper's budget."""

    attack: str
    options: dict
    batches: int
    budget: str


def fit(subject: Subject, client: Client, trial: Trial, seconds: float) -> Trial | None:
    """Return the trial with no more iterations than fit into `seconds`, None where too few do. Two pilots, of 1 and of
    1 + PILOT iterations, tell what an iteration takes and what there is besides."""
    planned = trial.options.get("iterations")
    if planned is None:
        return trial if seconds > 0 else None
    attack, began = ATTACKS[trial.attack], time.monotonic()
    together, restarts = worth_together(attack, client.model), trial.options.get("restarts", 1)
    rounds = subject.rounds(client, min(together, trial.batches))
    once, times = {"restarts": 1} if "restarts" in trial.options else {}, []
    try:
        with stopped_after(seconds):
            for iterations in (1, 1 + PILOT):
                since = time.monotonic()
                attack_together(attack, rounds, _no_watch, trial.options | once | {"iterations": iterations})
                times.append(time.monotonic() - since)
    except TimeIsUp:
        return None
    repeats = restarts * math.ceil(trial.batches / together)
    each = max((times[1] - times[0]) / PILOT, 1e-6)
    left = seconds - (time.monotonic() - began) - repeats * times[0]
    possible = int(SPARE * left / (each * repeats))
    if possible >= planned:
        return trial
    if possible < FEWEST:
        return None
    words = f"{possible} of {planned} iterations, as many as audit.py --minutes leaves it"
    return trial._replace(options=trial.options | {"iterations": possible}, budget=words)


def attempt(subject: Subject, client: Client, trial: Trial, seconds: float) -> dict:
    """Attack the first batches for at most so many `seconds`: summaries of the scores over images, seconds an image,
    and pictures of the first. stopped: what was left out for want of time."""
    rounds = subject.rounds(client, trial.batches)
    began, attack = time.monotonic(), ATTACKS[trial.attack]
    together, results, stopped = worth_together(attack, client.model), [], ""
    try:
        with stopped_after(seconds):
            for at in range(0, len(rounds), together):
                results += attack_together(attack, rounds[at : at + together], _no_watch, trial.options)
    except UserError as error:
        return {"why": reason(trial.attack, str(error)), "psnr": describe([]), "seconds": 0.0}
    except TimeIsUp:
        stopped = f"{trial.attack}: {len(results)} of {len(rounds)} gradients in the {seconds:.0f} s it had"
        if not results:
            why = f"takes more than the {seconds:.0f} s that audit.py --minutes leaves it"
            return {"why": why, "psnr": describe([]), "seconds": 0.0, "stopped": stopped}
    rounds = rounds[: len(results)]
    seconds = (time.monotonic() - began) / sum(one.leak.batch_size for one in rounds)
    views, rows = zip(*(score_round(one, result, {}) for one, result in zip(rounds, results, strict=True)), strict=True)
    rows = [row for batch in rows for row in batch]
    shown = [(one["originals"][0], one["reconstructions"][0]) for one in views]
    keys = ("psnr", "psnr_visible", "psnr_masked", "psnr_patches", "ssim", "psnr_baseline")
    scores = {key: summarise(rows, key) for key in keys}
    about = {
        "why": "",
        "seconds": seconds,
        "pictures": shown,
        "exact": all(r.diagnostics.get("exact") for r in results),
        "exact_up_to_order": all(r.diagnostics.get("exact_up_to_order", r.diagnostics.get("exact")) for r in results),
        "proved": 100 * sum(row["bits_leaked"] for row in rows) / sum(row["bits"] for row in rows),
        "unmasked": sum(not one.private.mask.any() for one in rounds) if client.jigsaw.mask_ratio else 0,
        "gradients": len(rounds),
        "stopped": stopped,
    }
    return scores | about | {"above": sum(row["psnr"] > RECOVERED for row in rows)}


def _no_watch(iteration: int, iterations: int, snapshot: Callable) -> None:
    """Do nothing: no one follows the attacks of an audit."""


def recovers(row: dict) -> bool:
    """Return whether a measured attack got more out of the gradient than a picture in the mean colour."""
    return level(row["psnr"]) > level(row["psnr_baseline"]) + MARGIN or bool(row["psnr"]["perfect"])


def result_text(row: dict) -> str:
    if row.get("why"):
        return row["why"]
    return f"{spread(row['psnr'])} dB (no leak {decibels(row['psnr_baseline'])}, n = {row['psnr']['n']})"
