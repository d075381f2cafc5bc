"""attack.py --audit: what one shared gradient of a model gives away, measured within minutes, as one page for people.

Introduces the attacks, the defences and the page to each other. Photographs stand in for private images; every choice
of images, masks and noise depends on the seed and the model alone. The clock stops what takes more than its share of
the time, or gives it fewer iterations, and the page says of which.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from attacks import FEATURES as WITHOUT_IMAGES
from attacks.security import security, security_text
from attacks.threat_model.applicable import applicable, preview_leak, reason, unmet_requirement
from attacks.threat_model.client import Client
from attacks.threat_model.local_step import describe_frozen, multi_label
from attacks.threat_model.rehearsal import rehearse
from campaigns.audit_subject import ATTRIBUTES, Subject, masked_variant
from campaigns.time_budget import TimeBudget
from campaigns.trials import Trial, attempt, fit, recovers, result_text
from data.demo import write_photographs
from data.images import list_images
from reports.audit import write_audit
from utils.channels import channels_of
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes
from utils.progress import duration
from utils.runs import Run
from utils.statistics import describe
from utils.summary import level

BUDGET = 6e11  # floating-point operations of a matching attack in all: about half a minute on two cores
PASSES = 8  # a matching step in forward passes, its second derivative included
MOST = 300  # iterations of a matching attack at most
ENOUGH = 200  # fewer iterations are too few to match gradients, whatever the network
RATIO = 0.27  # mask ratio at which MJP is measured where the audit does not set one (the paper's)
READING = 0.3  # share of the time in which labels are read
FEATURES = 0.2  # share of what is left then in which class features are solved for
ATTACKING = 0.5  # share of what is left then for attacks where there is no defence
# Attacks by equations, which take seconds, fastest first.
EQUATIONS = ("closed_form", "mjp_aware", "april", "rgap", "token_span", "joint")
LABEL_RULES = ("bias_corrected", "yin", "class_features")
LEFT_OUT = "applies, and is none of those that an audit runs: attack.py --attack runs it"
ORDER = (*EQUATIONS, "inverting_gradients", "idlg")  # by what they tell per second
DEFENSES = (
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
    victim: dict[str, str],
    minutes: float = 5.0,
) -> None:
    """Measure and write audit.html and results.json. paths: images to stand in for private ones, else the photographs
    embedded in the project; root: the folder they lie in; scale: mean and std of the inputs; victim: the options that
    name it, as `as_typed`; minutes: what all of it may take; the rest as in options.audit.AuditConfig."""
    run.start()
    if not peers.is_main:
        return
    budget = TimeBudget(minutes)
    with tempfile.TemporaryDirectory() as folder:
        if not paths:
            write_photographs(Path(folder))
        notes = run.notes if paths else Notes()  # of photographs that belong to the project there is nothing to say
        subject = Subject(model, paths or list_images(folder), scale, batch_size, seed, puzzle)
        subject.label(root if paths else folder, notes)
        run.log(f"audit of {name}: {len(subject.images)} images, {batch_size} a gradient, at most {minutes:g} minutes")
        if line := describe_frozen(model):
            run.log(line)
        rehearse(subject.client(), [batch_size])
        about = _facts(model, name, subject, mask_ratio) | victim
        found = {"model": about, "shapes": _shapes(model, mask_ratio, batch_size)}
        client = subject.client(mask_ratio=mask_ratio)
        rules, singles = label_rules(model), len(subject.images)
        found["labels"] = subject.labels_read(client, rules, singles=singles, seconds=READING * budget.left)
        if len(found["labels"]) < len(rules) * len({1, singles}):
            budget.cut.append("labels: not every rule was tried")
        found["features"] = subject.features_open(client, FEATURES * budget.left)
        if len(found["features"]) < len({1, len(subject.images)}):
            budget.cut.append("class features: not every number of images was tried")
        run.log(f"labels: {_labels_text(found['labels'])}")
        found["attacks"] = _measure(run, subject, client, budget)
        best = max((row for row in found["attacks"] if row["psnr"]["n"]), key=_quality, default=None)
        found["best"] = best and best["attack"]
        found["mask"] = subject.mask_read(mask_ratio or RATIO)
        found["defenses"] = _defend(run, subject, found["attacks"], best, mask_ratio, budget)
    found |= {"seconds": budget.spent, "minutes": minutes, "cut": budget.cut, "success_psnr": success_psnr}
    write_audit(run.folder, found)
    for row in (*found["attacks"], *(cell for line in found["defenses"] for cell in line["cells"])):
        row.pop("pictures", None)
    run.log(f"audit.html written after {duration(found['seconds'])}")
    run.results({"audit": found})


def label_rules(model: nn.Module) -> tuple[str, ...]:
    """Return the rules by which labels are read, or attributes; the first measures defences too."""
    return (ATTRIBUTES,) if multi_label(model) else LABEL_RULES


def _facts(model: nn.Module, name: str, subject: Subject, mask_ratio: float) -> dict:
    side, channels = model.arguments["image_size"], channels_of(model)
    return {
        "name": name,
        "parameters": sum(value.numel() for value in model.parameters()),
        "shared": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "frozen": describe_frozen(model),
        "image": f"{side} x {side} pixels, {channels * side * side} values",
        "values": channels * side * side,
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
    """Return floating-point operations of one image's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton, where there is one

    side = model.arguments["image_size"]
    blank = next(model.parameters()).new_zeros(1, channels_of(model), side, side)
    with FlopCounterMode(display=False) as counter:
        model(blank)
    return counter.get_total_flops()


def _measure(run: Run, subject: Subject, client: Client, budget: TimeBudget) -> list[dict]:
    """Return every attack: measured, or why it was not."""
    preview = preview_leak(client.model, subject.batch_size, **vars(client.terms))
    iterations = int(min(MOST, BUDGET / (PASSES * subject.batch_size * flops(client.model))))
    rows = []
    solved = False  # by equations; a few iterations of matching could then only mislead
    masked = bool(client.jigsaw.mask_ratio)
    plain = subject.batch_size == 1 and not masked and not unmet_requirement("closed_form", preview, {})
    names, keep = sorted(applicable(preview), key=_place), (1 - ATTACKING) * budget.left
    for place, name in enumerate(names):
        trial = _trial(name, iterations, masked)
        if plain and name == "joint":
            trial = None
        if trial and solved and name not in EQUATIONS and iterations < ENOUGH:
            trial = None
        why = unmet_requirement(name, preview, trial.options if trial else {})
        if why or trial is None:
            left_out = LEFT_OUT if name not in WITHOUT_IMAGES else "measured above: it gives features, and no image"
            left_out = "without a mask it is the closed form" if name in ("mjp_aware", "joint") else left_out
            rows.append({"attack": name, "why": reason(name, why) or left_out, "psnr": describe([])})
            continue
        rest = 2 if name in EQUATIONS else sum(_place(other) < len(ORDER) for other in names[place:])
        seconds = budget.share(rest, keep)
        trial, row = _timed(subject, client, trial, seconds, budget)
        # What keeps the attack from an exact answer here, where it was run although it can have none.
        short = trial.options.get("underdetermined", False)
        limits = unmet_requirement(name, preview, trial.options | {"underdetermined": False}) if short else ""
        about = {"attack": name, "budget": trial.budget, "iterations": trial.options.get("iterations")}
        rows.append(row | about | {"limits": reason(name, limits).partition("; --")[0]})
        solved = solved or (row["psnr"]["n"] > 0 and recovers(row))
        run.log(f"{name}: {result_text(row)} ({trial.budget}, {row['seconds']:.0f} s an image); {budget}")
    return rows


def _place(name: str) -> int:
    """Return where an attack stands in the order of what it tells per second: equations first, by their speed; then
    those that an audit matches gradients with; then those it leaves out."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _timed(subject: Subject, client: Client, trial: Trial, seconds: float, budget: TimeBudget) -> tuple[Trial, dict]:
    """Return the trial as it fits into `seconds`, and its row; what was cut is noted in the budget."""
    short = f"{trial.attack}: more than the {seconds:.0f} s it had"
    row = {
        "why": f"takes more than the {seconds:.0f} s that audit.py --minutes leaves it",
        "psnr": describe([]),
        "seconds": 0.0,
    }
    try:
        if (fitted := fit(subject, client, trial, seconds)) is not None:
            trial, row = fitted, attempt(subject, client, fitted, seconds)
            short = f"{trial.attack}: {trial.budget}" if "leaves it" in trial.budget else row.get("stopped", "")
    except UserError as error:  # of the pilot
        short, row = "", {"why": reason(trial.attack, str(error)), "psnr": describe([]), "seconds": 0.0}
    if short:
        budget.cut.append(short)
    return trial, row


def _trial(name: str, iterations: int, masked: bool) -> Trial | None:
    """Return how an audit measures an attack; None where it leaves it out."""
    if name in EQUATIONS:
        if name == "mjp_aware" and not masked:
            return None  # without a mask it is the closed form
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


def _quality(row: dict) -> float:
    return level(row["psnr"])


def _defend(
    run: Run, subject: Subject, attacks: list[dict], best: dict | None, mask_ratio: float, budget: TimeBudget
) -> list[dict]:
    """Return what every defence leaves: to the attack that was best without one, to one who knows of it, and of
    labels."""
    worth = best is not None and recovers(best)
    iterations = int(min(MOST, BUDGET / (PASSES * subject.batch_size * flops(subject.model))))
    naive = worth and _trial(best["attack"], iterations, bool(mask_ratio))
    cases = [("none", {}, "", mask_ratio), *((*case, mask_ratio) for case in DEFENSES)]
    if not mask_ratio and masked_variant(subject.model) is not None:
        cases.append(("MJP", {}, f"mask ratio {RATIO:g}, a step that is masked", RATIO))
    lines, left = [], 2 * (len(cases) - 1)
    if naive:
        naive, best = _affordable(subject, naive, best, left + 1, budget, mask_ratio)
    for name, options, strength, ratio in cases:
        if not budget.left:
            why = "not reached in the time of this audit (audit.py --minutes)"
            lines.append({"defense": name, "strength": strength, "why": why, "cells": [], "labels": []})
            budget.cut.append(f"defence {name} {strength}".strip())
            continue
        try:
            client = subject.client("none" if name == "MJP" else name, options, ratio)
        except UserError as error:
            lines.append({"defense": name, "strength": strength, "why": str(error), "cells": [], "labels": []})
            continue
        cells = []
        if naive and name != "none":
            first = _cell(subject, client, naive, budget.share(left))
            cells = [first, _answer(subject, client, name, options, naive, iterations, budget.share(left - 1))]
            budget.cut += [f"{cell['stopped']}, under {name} {strength}" for cell in cells if cell.get("stopped")]
            left -= 2
        elif naive:
            cells = [dict(best)]
        if name == "MJP" and (idle := next((cell for cell in cells if cell.get("unmasked")), None)):
            counts = f"{idle['unmasked']} of {idle['gradients']} masks drawn hide no patch"
            strength += f"; {counts}, and that gradient leaks as without MJP (smaller blocks: --min_block)"
        labels = subject.labels_read(client, label_rules(subject.model)[:1], singles=2, seconds=budget.left)
        lines.append({"defense": name, "strength": strength, "why": "", "cells": cells, "labels": labels})
        text = ", ".join(f"{cell['attack']} {result_text(cell)}" for cell in cells) or "images not attacked"
        run.log(f"defence {name} {strength}: {text}; labels {_labels_text(labels)}; {budget}")
    return lines


def _affordable(
    subject: Subject, naive: Trial, best: dict, cells: int, budget: TimeBudget, mask_ratio: float
) -> tuple[Trial | None, dict]:
    """Return the trial that all defences are measured with, and its row without one.

    naive: the attack that was best, as planned; cells: how many measurements the time must do for. With fewer
    iterations than `best` was measured with, it is measured again, so that defences differ from it by nothing else;
    None where it recovers nothing then.
    """
    client, seconds = subject.client(mask_ratio=mask_ratio), budget.share(cells)
    if best["iterations"]:
        naive = naive._replace(options=naive.options | {"iterations": best["iterations"]}, budget=best["budget"])
    fitted = fit(subject, client, naive._replace(batches=min(naive.batches, 2)), seconds)
    if fitted is not None and fitted.options.get("iterations") == best["iterations"]:
        return naive, best
    row = attempt(subject, client, fitted, seconds) if fitted else {"psnr": describe([])}
    if row["psnr"]["n"] and recovers(row):
        budget.cut.append(f"defences: {fitted.attack} with {fitted.budget}")
        return fitted, row | {"attack": fitted.attack, "budget": fitted.budget}
    why = f"recovers nothing with {fitted.budget}" if fitted else f"takes more than the {seconds:.0f} s left for each"
    budget.cut.append(f"defences: images not attacked, as {naive.attack} {why}")
    return None, best


def _cell(subject: Subject, client: Client, trial: Trial, seconds: float) -> dict:
    """Run one attack on one defence for at most so many seconds; return it, or why it does not apply."""
    trial = trial._replace(batches=min(trial.batches, 2))
    terms = vars(client.terms) | {"withhold": client.defense.withheld()}
    preview = preview_leak(client.model, subject.batch_size, **terms)
    if why := unmet_requirement(trial.attack, preview, trial.options):
        return {"attack": trial.attack, "why": reason(trial.attack, why), "psnr": describe([])}
    return {"attack": trial.attack, "budget": trial.budget} | attempt(subject, client, trial, seconds)


def _answer(
    subject: Subject, client: Client, name: str, told: dict, naive: Trial, iterations: int, seconds: float
) -> dict:
    """Return the attacker who knows the defence `name` and its options `told`; why not, where nothing fits into an
    audit.

    iterations: of matching, where the naive attack, which is not one by matching, says nothing of them.
    """
    if name in EQUATION and naive.attack in ("closed_form", "mjp_aware", "token_span", "joint"):
        attack, options = EQUATION[name]
        trial = Trial(attack, options(told), 2 - (attack == "token_span"), "linear equations")
        return _cell(subject, client, trial, seconds)
    known = naive.options.get("iterations")
    trial = Trial(
        "inverting_gradients", {"iterations": known or iterations} | MATCHING.get(name, {}), naive.batches, ""
    )
    fits = name in MATCHING and (known or iterations >= ENOUGH)
    if not fits or (trial := trial if known else fit(subject, client, trial, seconds)) is None:
        steps = "an attack that knows it matches gradients: more iterations than an audit has time for"
        return {"attack": "inverting_gradients", "why": steps, "psnr": describe([])}
    return _cell(subject, client, trial._replace(budget=f"{trial.options['iterations']} iterations"), seconds)


def _labels_text(rows: Sequence[dict]) -> str:
    return ", ".join(f"{row['read']['mean']:.0f} % of {row['images']}" if row["read"]["n"] else "–" for row in rows)
