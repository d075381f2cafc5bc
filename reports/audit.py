"""audit.html: what an audit has measured, for whoever has to decide what to do about it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from reports.attack import STYLE as REPORT_STYLE
from reports.audit_parts import attacks_part, defenses_part, labels_part, seconds_text, shapes_part, strip
from reports.page import Markup, code, escape, facts, heading, page
from utils.files import write_text
from utils.machine import command_line
from utils.summary import decibels, level

STYLE = (
    REPORT_STYLE
    + """
main { max-width: 1080px; }
.strip { display: flex; flex-wrap: wrap; gap: 16px; margin: 12px 0; }
.strip figure { margin: 0; width: 132px; } .strip img { display: block; width: 100%; height: auto; border-radius: 6px; }
.strip img { image-rendering: pixelated; } .strip figcaption { font-size: 13px; color: #64748b; line-height: 1.35; }
.strip figcaption { margin-top: 4px; }
td.text { white-space: normal; text-align: left; min-width: 190px; } .wide td, .wide th { text-align: left; }
.wide td { white-space: normal; min-width: 96px; vertical-align: top; }
.wide td small { min-width: 0; } .whole { white-space: nowrap; }
li { max-width: 72ch; margin: 6px 0; }
.commands code { display: inline-block; padding: 6px 10px; margin: 2px 0; }
@media (max-width: 640px) { .wide td { min-width: 0; } .whole { white-space: normal; } }
@media (max-width: 640px) { .strip figure { width: calc(50% - 8px); } }
"""
)


def write_audit(folder: Path, found: Mapping) -> None:
    """Write audit.html from what audit.audit measured: model, shapes, labels, attacks, best, mask, defences, seconds,
    success_psnr (dB above which an image counts as recovered)."""
    model, best = found["model"], _best(found)
    parts = [
        Markup(f'<p class="lead">{_verdict(found, best)}</p>'),
        _tiles(found, best),
        strip(best, "the private image and what came out of its gradient") if best else Markup(""),
        heading("What shapes and ranks alone give away"),
        *shapes_part(found["shapes"], model),
        heading("Labels and masks"),
        *labels_part(found["labels"], found["features"], found["mask"]),
        heading("What the attacks recovered"),
        *attacks_part(found),
        heading("Which defence changes what"),
        *defenses_part(found),
        heading("Threat model"),
        facts(_threat_model(model)),
        heading("What this page does not say"),
        _limits(found),
        heading("To go further"),
        _commands(model, found["best"] or "inverting_gradients"),
        heading("How this page was made"),
        facts(_made(found)),
    ]
    write_text(folder / "audit.html", page(f"What a gradient of {model['name']} gives away", *parts, style=STYLE))


def _best(found: Mapping) -> Mapping | None:
    return next((row for row in found["attacks"] if row["attack"] == found["best"]), None)


def _share(found: Mapping, images: int) -> Mapping | None:
    """Return the summary of the share of labels that the best rule reads, in percent; None where none applies."""
    rows = [row["read"] for row in found["labels"] if row["images"] == images and row["read"]["n"]]
    return max(rows, key=lambda read: read["mean"], default=None)


def _verdict(found: Mapping, best: Mapping | None) -> Markup:
    threshold = found["success_psnr"]
    size = found["model"]["batch_size"]
    what = "one image" if size == 1 else f"{size} images"
    mean, baseline = (level(best[key]) if best else -math.inf for key in ("psnr", "psnr_baseline"))
    tried = [row["attack"] for row in found["attacks"] if row["psnr"]["n"]]
    if best and mean > threshold:
        says = f"<strong>The image comes back.</strong> From one gradient on {what} the attack {best['attack']} "
        says += f"reconstructs it at {decibels(best['psnr'])} dB; a picture in its mean colour, which takes no "
        says += f"gradient, has {decibels(best['psnr_baseline'])} dB."
    elif best and mean > baseline + 3:
        says = f"<strong>Parts of the image come back.</strong> The best attack, {best['attack']}, reaches "
        says += f"{decibels(best['psnr'])} dB; a picture in the mean colour of the image, which takes no gradient, has "
        says += f"{decibels(best['psnr_baseline'])} dB."
    elif moved := _in_another_order(found, threshold):
        says = "<strong>Patches of the image come back, not all in their places.</strong> From one gradient on "
        says += f"{what} the attack {moved['attack']} proves {moved['proved']:.0f} % of the bits of an image leaked. "
        says += f"Each patch compared with the one it fits, its picture has {decibels(moved['psnr_patches'])} dB, in "
        says += f"the places it puts them {decibels(moved['psnr'])} dB; a picture in the mean colour, "
        says += f"{decibels(moved['psnr_baseline'])} dB."
    elif tried:
        says = f"<strong>The {_attacks_tried(tried)} recovered no image.</strong> That is about these attacks in this "
        says += f"time, and no sign that the gradient is safe. Not measured: {_not_tried(found)}; see below why, and "
        says += "what each would need."
    else:
        says = "<strong>No attack on images was measured.</strong> That says nothing about the gradient: see below why "
        says += "each was left out or stopped."
    labels = _share(found, 1)
    if labels is not None:
        says += f" The label of a single image is read off {labels['mean']:.0f} % of {labels['n']} gradients."
    return Markup(says)


def _in_another_order(found: Mapping, threshold: float) -> Mapping | None:
    """Return the attack that has most of the patches without their places; None where none has any."""
    rows = [row for row in found["attacks"] if row["psnr"]["n"]]
    rows = [row for row in rows if level(row["psnr_patches"]) > threshold or row["proved"] >= 1]
    return max(rows, key=lambda row: (row["proved"], level(row["psnr_patches"])), default=None)


def _attacks_tried(names: Sequence[str]) -> str:
    """Return `attack closed_form`, or `attacks closed_form, joint and rgap`."""
    if len(names) == 1:
        return f"attack {names[0]}"
    return f"attacks {', '.join(names[:-1])} and {names[-1]}"


def _not_tried(found: Mapping) -> str:
    return ", ".join(row["attack"] for row in found["attacks"] if not row["psnr"]["n"]) or "none"


def _tiles(found: Mapping, best: Mapping | None) -> Markup:
    tiles = []
    if best:
        tiles.append(
            (f"{decibels(best['psnr'])} dB", f"mean PSNR of the best attack: {best['attack']}, n = {best['psnr']['n']}")
        )
        tiles.append(
            (
                f"{decibels(best['psnr_baseline'])} dB",
                f"mean of a picture in the mean colour: no leak, n = {best['psnr_baseline']['n']}",
            )
        )
        tiles.append((f"{seconds_text(best['seconds'])} s", "an image, for this attack, on this machine"))
    for row in sorted({row["images"] for row in found["labels"]}):
        share = _share(found, row)
        if share is not None:
            what = f"labels read, {row} image{'s' * (row > 1)} a gradient, n = {share['n']}"
            tiles.append((f"{share['mean']:.0f} %", what))
    shown = "".join(
        f"<div><strong>{escape(value)}</strong><span>{escape(label)}</span></div>" for value, label in tiles
    )
    return Markup(f'<div class="tiles">{shown}</div>')


def _threat_model(model: Mapping) -> dict[str, str]:
    size = model["batch_size"]
    masked = f"on, mask ratio {model['mask_ratio']:g}" if model["mask_ratio"] else "off"
    return {
        "who attacks": "a server that follows the protocol and keeps what it is sent, or who reads along",
        "what it has": f"one gradient of {size} image{'s' * (size > 1)}, the code, and the weights before the step",
        "what it has not": "images, labels, anything from the device beside the gradient",
        **({"frozen": model["frozen"]} if model["frozen"] else {}),
        "the step": "evaluation mode, mean cross-entropy, one step (FedSGD); MJP " + masked,
    }


def _limits(found: Mapping) -> Markup:
    number_of = len(found["model"]["images"])
    points = [
        f"It is about {number_of} photographs and these weights. Trained weights leak differently from random ones "
        f"(--checkpoint).",
        "A server that changes the weights or the architecture to make them leak is stronger than this one.",
        f"{_together(found['shapes'])} Local steps on the same image need not protect either. attack.py --batch_size, "
        "--clients and --local_steps measure it, docs/results.md has a federated run.",
        "A score is what one attack got. There is no attack whose failure proves privacy; differential privacy is the "
        "only defence here with a proof, and only for the epsilon it is run at.",
        "Spread is the standard deviation over images. With so few of them differences of a few dB are chance.",
    ]
    return Markup("<ul>" + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>")


def _together(shapes: Mapping) -> str:
    """Return what more images a gradient, of one client or of several, change."""
    if largest := shapes.get("largest_batch"):
        return (
            f"More images a gradient, of one client or of several under secure aggregation, do not protect this model "
            f"up to {largest} images in all: so many attack joint separates, in exact arithmetic. Beyond that, and in "
            f"single precision earlier, they make all of this harder."
        )
    return (
        "More images a gradient and secure aggregation make images harder to recover by these attacks. Labels and "
        "class features are another matter: above they are counted for one image and for all."
    )


def _commands(model: Mapping, attack: str) -> Markup:
    given = model["options"]
    commands = [
        f"python attack.py --attack {attack} {given} --images DIR --output runs/attack",
        f"python attack.py --config configs/attack/inverting_gradients.yaml {given} --images DIR --output runs/ig",
        f"python attack.py --leak LEAKS {model['of_leaks']} --output runs/leak",
    ]
    lines = "".join(f"<p>{code(command)}</p>" for command in commands)
    return Markup(f'<div class="commands">{lines}</div>')


def _made(found: Mapping) -> dict[str, str]:
    return {
        "command": code(command_line()),
        "model": f"{found['model']['parameters']:,} parameters, {found['model']['image']}, "
        f"{found['model']['classes']} classes",
        "images": ", ".join(found["model"]["images"]),
        "time": f"{found['seconds']:.0f} seconds of at most {60 * found['minutes']:.0f} (audit.py --minutes)",
        "cut short for want of time": "; ".join(found["cut"]) or "nothing",
    }
