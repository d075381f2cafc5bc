"""attack.py --audit: what one shared gradient of a model gives away, measured within minutes, as one page for people.

Introduces the attacks, the defences and the page to each other. Photographs stand in for private images; every choice
of images, masks, noise and iterations depends on the seed and the model alone, never on the clock.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from attacks import ATTACKS, attack_together
from attacks.label_recovery import recover_class_features, recover_labels
from attacks.security import security, security_text
from attacks.threat_model.applicable import applicable, preview_leak, reason, unmet_requirement
from attacks.threat_model.client import Client, Round
from attacks.threat_model.knowledge import hidden_rows
from attacks.threat_model.local_step import describe_frozen
from attacks.threat_model.rehearsal import rehearse
from campaigns.sources import folder_labels, score_round
from data.demo import write_photographs
from data.images import list_images, read_images
from defenses import build_defense
from models.jigsaw import Jigsaw
from models.position import new_pos_embed
from models.vit import VisionTransformer
from reports.audit import write_audit
from utils.channels import channels_of
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes
from utils.progress import duration
from utils.runs import Run
from utils.statistics import RECOVERED, describe
from utils.summary import decibels, level, spread, summarise

BUDGET = 6e11  # floating-point operations of a matching attack in all: about half a minute on two cores
PASSES = 8  # a matching step in forward passes, its second derivative included
MOST = 300  # iterations of a matching attack at most
ENOUGH = 200  # fewer iterations are too few to match gradients, whatever the network
MARGIN = 3.0  # dB above a picture in the mean colour from which an attack counts as having recovered something
RATIO = 0.27  # mask ratio at which MJP is measured where the audit does not set one (the paper's)
EQUATIONS = (
    "closed_form",
    "mjp_aware",
    "token_span",
    "joint",
    "april",
    "rgap",
)  # attacks by equations, which take seconds
DEFENCES = (
    ("noise", {"std": 1e-4}, "Gaussian, standard deviation 1e-4"),
    ("noise", {"std": 1e-2}, "Gaussian, standard deviation 1e-2"),
    ("dp_sgd", {"clip": 1.0, "noise_multiplier": 0.5}, "clip 1, noise multiplier 0.5"),
    ("prune", {"ratio": 0.9}, "smallest 90 % set to zero"),
    ("quantize", {"bits": 8}, "8 bits"),
    ("withhold", {"names": "pos_embed"}, "position-embedding gradient not sent"),
)
# Who knows the defence brings this, beside the attack that worked without one. Of its options: what it was told.
MATCHING: dict[str, dict] = {  # where gradients are matched
    "noise": {"tv": 0.2},
    "dp_sgd": {"tv": 0.2},
    "prune": {"objective": "masked_cosine", "tv": 5e-2},
    "quantize": {"tv": 0.2},
}
EQUATION: dict[str, tuple[str, Callable[[dict], dict]]] = {  # where the closed form applies
    "noise": ("closed_form", lambda told: {"noise": told["std"]}),
    "dp_sgd": ("closed_form", lambda told: {"noise": told["noise_multiplier"] * told["clip"]}),
    "withhold": ("token_span", lambda told: {"match_steps": 0, "prior_steps": 25, "underdetermined": True}),
    "MJP": ("mjp_aware", lambda told: {}),
}


class Trial(NamedTuple):
    """An attack as it is measured: its options, on how many batches, and what that is of the paper's budget."""

    attack: str
    options: dict
    batches: int
    budget: str


def write_security(run: Run, model: nn.Module, **shapes) -> None:
    """Say and write what linear equations leave open: options of attacks.security.security."""
    found = security(model, **shapes)
    run.log(security_text(found))
    run.results({"security": found})


def audit(
    run: Run,
    peers: Processes,
    model: nn.Module,
    paths: Sequence[Path],
    scale: dict,
    *,
    name: str,
    mask_ratio: float,
    batch_size: int,
    seed: int,
    puzzle: dict,
    success_psnr: float,
    root: str | None,
) -> None:
    """Measure and write audit.html and results.json. paths: images to stand in for private ones, else the photographs
    embedded in the project; root: the folder they lie in; scale: mean and std of the inputs; the rest as in
    config.AttackConfig."""
    run.start()
    if not peers.is_main:
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if not paths:
            write_photographs(Path(folder))
        notes = run.notes if paths else Notes()  # of photographs that belong to the project there is nothing to say
        subject = Subject(model, paths or list_images(folder), scale, batch_size, seed, puzzle)
        subject.label(root if paths else folder, notes)
        run.log(f"audit of {name}: {len(subject.images)} images, {batch_size} a gradient")
        if line := describe_frozen(model):
            run.log(line)
        rehearse(subject.client(), [batch_size])
        found = {"model": _facts(model, name, subject, mask_ratio), "shapes": _shapes(model, mask_ratio, batch_size)}
        client = subject.client(mask_ratio=mask_ratio)
        found["labels"] = subject.labels_read(
            client, "bias_corrected", "yin", "class_features", singles=len(subject.images)
        )
        found["features"] = subject.features_open(client)
        run.log(f"labels: {_labels_text(found['labels'])}")
        found["attacks"] = _measure(run, subject, client)
        best = max((row for row in found["attacks"] if row["psnr"]["n"]), key=_quality, default=None)
        found["best"] = best and best["attack"]
        found["mask"] = subject.mask_read(mask_ratio or RATIO)
        found["defences"] = _defend(run, subject, found["attacks"], best, mask_ratio)
    found["seconds"], found["success_psnr"] = time.monotonic() - began, success_psnr
    write_audit(run.folder, found)
    for row in (*found["attacks"], *(cell for line in found["defences"] for cell in line["cells"])):
        row.pop("pictures", None)
    run.log(f"audit.html written after {duration(found['seconds'])}")
    run.results({"audit": found})


class Subject:
    """The model and the images it is measured on. Labels are places of the class folders, or all different."""

    def __init__(self, model: nn.Module, paths: Sequence[Path], scale: dict, batch_size: int, seed: int, puzzle: dict):
        self.model, self.scale, self.batch_size, self.seed, self.puzzle = model, scale, batch_size, seed, puzzle
        self._client: Client | None = None
        self._rounds: dict[tuple[int, int], Round] = {}
        self.paths = list(paths)[: max(4 * batch_size, 4)]
        if len(self.paths) < batch_size:
            raise UserError(
                f"--batch_size {batch_size} is more than the {len(self.paths)} images of this audit: lower it, or give "
                f"--images a folder of more"
            )
        self.images = read_images(self.paths, model.arguments["image_size"], **scale).to(next(model.parameters()))
        self.folders: list[str] = []
        self.classes: dict[str, int] = {}

    def label(self, root: str, notes: Notes) -> None:
        """Label the images by their folders below `root`, or all differently where those name no classes."""
        self.folders = [str(path.parent) for path in self.paths]
        self.classes = folder_labels(self.model, root, notes, "labelled differently, each from every other")
        if not self.classes:
            self.folders = [str(path) for path in self.paths]
            self.classes = {path: place for place, path in enumerate(self.folders)}

    def client(self, defence: str = "none", options: dict | None = None, mask_ratio: float = 0.0) -> Client:
        """A client that shares one gradient of the model, or of its MJP variant, and keeps the labels to itself."""
        model = masked_variant(self.model) if mask_ratio else self.model
        jigsaw = Jigsaw(self.model.grid, mask_ratio, **self.puzzle, seed=self.seed)
        terms = self.scale | {"reveal_labels": False}
        return Client(model, jigsaw, build_defense(defence, options or {}), self.seed, terms, self.classes)

    def rounds(self, client: Client, batches: int, size: int | None = None) -> list[Round]:
        """Rounds of the client on the first `batches` batches of the images; those of the last client are kept."""
        if self._client is not client:
            self._client, self._rounds = client, {}
        size = size or self.batch_size
        starts = range(0, max(1, len(self.images) - size + 1), size)[:batches]
        for at in starts:
            if (at, size) not in self._rounds:
                own = client.round(at, self.images[at : at + size], self.folders[at : at + size])
                self._rounds[at, size] = own
        fresh = [self._rounds[at, size] for at in starts]  # each attack draws from the start of its generator
        return [one._replace(generator=one.generator.clone_state()) for one in fresh]

    def labels_read(self, client: Client, *rules: str, singles: int) -> list[dict]:
        """For `singles` gradients of one image and one of all: the share of labels the rules find, in percent."""
        rows = []
        for size in sorted({1, len(self.images)}):
            for rule in rules:
                shares, why = [], ""
                try:
                    for one in self.rounds(client, singles, size):
                        left = recover_labels(one.leak, rule, one.generator).tolist()
                        hits = [left.remove(label) is None for label in one.private.labels.tolist() if label in left]
                        shares.append(100 * len(hits) / size)
                except UserError as error:
                    shares, why = [], str(error)
                rows.append({"images": size, "rule": rule, "read": describe(shares), "why": why})
        return rows

    def features_open(self, client: Client) -> list[dict]:
        """For a gradient of one image and one of all: how many images the classifier's gradient gives the features,
        logits and labels of, proved without the truth."""
        rows = []
        for size in sorted({1, len(self.images)}):
            (one, *_) = self.rounds(client, 1, size)
            try:
                rows.append({"images": size, "open": recover_class_features(one.leak, one.generator).found, "why": ""})
            except UserError as error:
                rows.append({"images": size, "open": None, "why": str(error)})
        return rows

    def mask_read(self, mask_ratio: float) -> dict | None:
        """Of a step that MJP masks: the share of patches for which the gradient tells whether they were hidden."""
        if masked_variant(self.model) is None:
            return None
        right = []
        for one in self.rounds(self.client(mask_ratio=mask_ratio), 4):
            right.append(100 * float((hidden_rows(one.leak).cpu() == one.private.mask[0]).double().mean()))
        return {"mask_ratio": mask_ratio, "right": describe(right)}


def masked_variant(model: nn.Module) -> nn.Module | None:
    """The model with an unknown position embedding, as MJP trains it; None for models that cannot hide positions."""
    if getattr(model, "hides_positions", False):
        return model
    if not isinstance(model, VisionTransformer) or not isinstance(model.pos_embed, nn.Parameter):
        return None
    if model.pos_embed_rows is not None:
        return None
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model.unknown_pos_embed = new_pos_embed(1, model.embed_dim).to(model.pos_embed)
    return model


def _facts(model: nn.Module, name: str, subject: Subject, mask_ratio: float) -> dict:
    side = model.arguments["image_size"]
    return {
        "name": name,
        "parameters": sum(value.numel() for value in model.parameters()),
        "frozen": describe_frozen(model),
        "image": f"{side} x {side} pixels, {3 * side * side} values",
        "values": 3 * side * side,
        "classes": model.arguments["num_classes"],
        "images": [path.name for path in subject.paths],
        "batch_size": subject.batch_size,
        "mask_ratio": mask_ratio,
        "flops": flops(model),
    }


def _shapes(model: nn.Module, mask_ratio: float, batch_size: int) -> dict:
    """Return what `security` says, or why it says nothing."""
    variant = masked_variant(model) if mask_ratio else model
    try:
        return security(variant or model, mask_ratio=mask_ratio, batch_size=batch_size)
    except UserError as error:
        return {"why": str(error)}


@torch.no_grad()
def flops(model: nn.Module) -> int:
    """Floating-point operations of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton, where there is one

    side = model.arguments["image_size"]
    blank = next(model.parameters()).new_zeros(1, channels_of(model), side, side)
    with FlopCounterMode(display=False) as counter:
        model(blank)
    return counter.get_total_flops()


def _measure(run: Run, subject: Subject, client: Client) -> list[dict]:
    """Every attack: measured, or why it was not."""
    preview = preview_leak(client.model, subject.batch_size, local=None, **client.terms)
    iterations = int(min(MOST, BUDGET / (PASSES * subject.batch_size * flops(client.model))))
    rows = []
    solved = False  # by equations; a few iterations of matching could then only mislead
    for name in sorted(applicable(preview), key=lambda name: name not in EQUATIONS):
        trial = _trial(name, iterations, bool(client.jigsaw.mask_ratio), subject.batch_size)
        if trial and solved and name not in EQUATIONS and iterations < ENOUGH:
            trial = None
        why = unmet_requirement(name, preview, trial.options if trial else {})
        if why or trial is None:
            left_out = "applies, and takes more time than an audit has"
            left_out = "without a mask it is the closed form" if name == "mjp_aware" else left_out
            rows.append({"attack": name, "why": reason(name, why) or left_out, "psnr": describe([])})
            continue
        row = attempt(subject, client, trial)
        # What keeps the attack from an exact answer here, where it was run although it can have none.
        short = trial.options.get("underdetermined", False)
        limits = unmet_requirement(name, preview, trial.options | {"underdetermined": False}) if short else ""
        rows.append(row | {"attack": name, "budget": trial.budget, "limits": reason(name, limits).partition("; --")[0]})
        solved = solved or (row["psnr"]["n"] > 0 and _recovers(row))
        run.log(f"{name}: {_result_text(row)} ({trial.budget}, {row['seconds']:.0f} s an image)")
    return rows


def _trial(name: str, iterations: int, masked: bool, images: int) -> Trial | None:
    """Return how an audit measures an attack; None where it leaves it out."""
    if name in EQUATIONS:
        if name == "mjp_aware" and not masked:
            return None  # without a mask it is the closed form
        if name == "joint" and not masked and images == 1:
            return None  # mostly the closed form again
        options = {
            "token_span": {"match_steps": 0, "prior_steps": 25, "underdetermined": True},
            "rgap": {"keep_saturated": True},
        }.get(name, {})
        batches = {"mjp_aware": 2, "token_span": 1, "joint": 1}.get(name, 4)
        return Trial(name, options, batches, "linear equations and, where they end, a prior")
    steps = max(4, iterations)
    if name == "inverting_gradients":
        batches = 4 if iterations >= ENOUGH else 1
        return Trial(name, {"iterations": steps, "tv": 5e-2}, batches, f"{steps} of the paper's 24,000 iterations")
    if name == "idlg" and iterations >= ENOUGH:
        return Trial(name, {"iterations": steps, "restarts": 2}, 4, f"2 starts of {steps} of 6,000 iterations")
    return None


def attempt(subject: Subject, client: Client, trial: Trial) -> dict:
    """Attack the first batches: summaries of the scores over images, seconds an image, and pictures of the first."""
    rounds = subject.rounds(client, trial.batches)
    began, attack = time.monotonic(), ATTACKS[trial.attack]
    try:
        results = attack_together(attack, rounds, _no_watch, trial.options)
    except UserError as error:
        return {"why": reason(trial.attack, str(error)), "psnr": describe([]), "seconds": 0.0}
    seconds = (time.monotonic() - began) / sum(one.leak.batch_size for one in rounds)
    views, rows = zip(*(score_round(one, result, {}) for one, result in zip(rounds, results, strict=True)), strict=True)
    rows = [row for batch in rows for row in batch]
    shown = [(one["originals"][0], one["reconstructions"][0]) for one in views]
    scores = {key: summarise(rows, key) for key in ("psnr", "psnr_visible", "psnr_masked", "ssim", "psnr_baseline")}
    about = {
        "why": "",
        "seconds": seconds,
        "pictures": shown,
        "exact": all(r.diagnostics.get("exact") for r in results),
        "exact_up_to_order": all(r.diagnostics.get("exact_up_to_order", r.diagnostics.get("exact")) for r in results),
        "unmasked": sum(not one.private.mask.any() for one in rounds) if client.jigsaw.mask_ratio else 0,
        "gradients": len(rounds),
    }
    return scores | about | {"above": sum(row["psnr"] > RECOVERED for row in rows)}


def _no_watch(iteration: int, iterations: int, snapshot: Callable) -> None:
    """Do nothing: no one follows the attacks of an audit."""


def _quality(row: dict) -> float:
    return level(row["psnr"])


def _recovers(row: dict) -> bool:
    """Return whether a measured attack got more out of the gradient than a picture in the mean colour."""
    return level(row["psnr"]) > level(row["psnr_baseline"]) + MARGIN or bool(row["psnr"]["perfect"])


def _defend(run: Run, subject: Subject, attacks: list[dict], best: dict | None, mask_ratio: float) -> list[dict]:
    """What every defence leaves: to the attack that was best without one, to one who knows of it, and of labels."""
    worth = best is not None and _recovers(best)
    iterations = int(min(MOST, BUDGET / (PASSES * subject.batch_size * flops(subject.model))))
    naive = worth and _trial(best["attack"], iterations, bool(mask_ratio), subject.batch_size)
    cases = [("none", {}, "", mask_ratio), *((*case, mask_ratio) for case in DEFENCES)]
    if not mask_ratio and masked_variant(subject.model) is not None:
        cases.append(("MJP", {}, f"mask ratio {RATIO:g}, a step that is masked", RATIO))
    lines = []
    for name, options, strength, ratio in cases:
        try:
            client = subject.client("none" if name == "MJP" else name, options, ratio)
        except UserError as error:
            lines.append({"defence": name, "strength": strength, "why": str(error), "cells": [], "labels": []})
            continue
        cells = []
        if naive and name != "none":
            cells = [_cell(subject, client, naive), _answer(subject, client, name, options, naive, iterations)]
        elif naive:
            cells = [dict(best)]
        if name == "MJP" and (idle := next((cell for cell in cells if cell.get("unmasked")), None)):
            counts = f"{idle['unmasked']} of {idle['gradients']} masks drawn hide no patch"
            strength += f"; {counts}, and that gradient leaks as without MJP (smaller blocks: --min_block)"
        labels = subject.labels_read(client, "bias_corrected", singles=2)
        lines.append({"defence": name, "strength": strength, "why": "", "cells": cells, "labels": labels})
        text = ", ".join(f"{cell['attack']} {_result_text(cell)}" for cell in cells) or "images not attacked"
        run.log(f"defence {name} {strength}: {text}; labels {_labels_text(labels)}")
    return lines


def _cell(subject: Subject, client: Client, trial: Trial) -> dict:
    """One attack on one defence, or why it does not apply."""
    trial = trial._replace(batches=min(trial.batches, 2))
    terms = client.terms | {"withhold": client.defense.withheld()}
    preview = preview_leak(client.model, subject.batch_size, local=None, **terms)
    if why := unmet_requirement(trial.attack, preview, trial.options):
        return {"attack": trial.attack, "why": reason(trial.attack, why), "psnr": describe([])}
    return {"attack": trial.attack, "budget": trial.budget} | attempt(subject, client, trial)


def _answer(subject: Subject, client: Client, name: str, told: dict, naive: Trial, iterations: int) -> dict:
    """The attacker who knows the defence `name` and its options `told`; why not, where nothing fits into an audit."""
    if name in EQUATION and naive.attack in ("closed_form", "mjp_aware", "token_span", "joint"):
        attack, options = EQUATION[name]
        return _cell(subject, client, Trial(attack, options(told), 2 - (attack == "token_span"), "linear equations"))
    if name not in MATCHING or iterations < ENOUGH:
        steps = f"an attack that knows it matches gradients: more than the {iterations} iterations there is time for"
        return {"attack": "inverting_gradients", "why": steps, "psnr": describe([])}
    options = {"iterations": iterations} | MATCHING[name]
    return _cell(subject, client, Trial("inverting_gradients", options, naive.batches, f"{iterations} iterations"))


def _result_text(row: dict) -> str:
    if row.get("why"):
        return row["why"]
    return f"{spread(row['psnr'])} dB (no leak {decibels(row['psnr_baseline'])}, n = {row['psnr']['n']})"


def _labels_text(rows: Sequence[dict]) -> str:
    return ", ".join(f"{row['read']['mean']:.0f} % of {row['images']}" if row["read"]["n"] else "–" for row in rows)
