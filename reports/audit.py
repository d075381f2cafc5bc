"""audit.html: what an audit has measured, for whoever has to decide what to do about it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from reports.attack import STYLE as REPORT_STYLE
from reports.page import Markup, code, escape, facts, heading, number, page, paragraph, picture, table
from utils.files import write_text
from utils.machine import command_line
from utils.summary import decibels, level, spread

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
DEFENSE_NAMES = {
    "none": "no defence",
    "noise": "noise",
    "dp_sgd": "DP-SGD",
    "prune": "pruning",
    "quantize": "quantisation",
    "withhold": "withholding",
    "MJP": "Masked Jigsaw Puzzle",
}


def write_audit(folder: Path, found: Mapping) -> None:
    """Write audit.html from what audit.audit measured: model, shapes, labels, attacks, best, mask, defences, seconds,
    success_psnr (dB above which an image counts as recovered)."""
    model, best = found["model"], _best(found)
    parts = [
        Markup(f'<p class="lead">{_verdict(found, best)}</p>'),
        _tiles(found, best),
        _strip(best, "the private image and what came out of its gradient") if best else Markup(""),
        heading("What shapes and ranks alone give away"),
        *_shapes(found["shapes"], model),
        heading("Labels and masks"),
        *_labels(found["labels"], found["features"], found["mask"]),
        heading("What the attacks recovered"),
        *_attacks(found),
        heading("Which defence changes what"),
        *_defences(found),
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
    elif tried:
        says = f"<strong>The {_attacks_tried(tried)} recovered no image.</strong> That says how long they ran, not "
        says += f"that the gradient is safe. Not tried: {_not_tried(found)}; see below why, and what each would need."
    else:
        says = "<strong>No attack was tried, so nothing was measured.</strong> That says nothing about the gradient: "
        says += "see below why each attack was left out."
    labels = _share(found, 1)
    if labels is not None:
        says += f" The label of a single image is read off {labels['mean']:.0f} % of {labels['n']} gradients."
    return Markup(says)


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
        tiles.append((f"{_seconds(best['seconds'])} s", "an image, for this attack, on this machine"))
    for row in sorted({row["images"] for row in found["labels"]}):
        share = _share(found, row)
        if share is not None:
            what = f"labels read, {row} image{'s' * (row > 1)} a gradient, n = {share['n']}"
            tiles.append((f"{share['mean']:.0f} %", what))
    shown = "".join(
        f"<div><strong>{escape(value)}</strong><span>{escape(label)}</span></div>" for value, label in tiles
    )
    return Markup(f'<div class="tiles">{shown}</div>')


def _figure(image, caption: str) -> str:
    return f"<figure>{picture(image, 132, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _strip(row: Mapping, caption: str) -> Markup:
    """Originals beside reconstructions."""
    figures = [
        _figure(original, "original") + _figure(copy, row["attack"]) for original, copy in row.get("pictures", ())[:3]
    ]
    return Markup(f'<div class="strip" title="{escape(caption)}">{"".join(figures)}</div>')


def _shapes(shapes: Mapping, model: Mapping) -> list[Markup]:
    if "why" in shapes:
        return [
            paragraph(
                "No linear equations are known here for this kind of network. What is left are attacks that search "
                f"for an image with the same gradient. The gradient has {model['parameters']:,} numbers for the "
                f"{model['values']:,} of an image: counting alone does not protect."
            )
        ]
    if "attacks" not in shapes:
        rows = [[row[key] for key in ("layer", "rank", "unknowns", "deficiency", "index")] for row in shapes["layers"]]
        says = (
            "The network is a chain of layers, each a system of linear equations for its input. An index of 0 means "
            "that going back layer by layer gives the image; the more negative, the more numbers a prior has to guess."
        )
        index = paragraph(f"Security index: {shapes['index']:.1f} (Chen and Campbell, 2022).")
        return [paragraph(says), table(["layer", "rank", "unknowns", "missing", "index"], rows), index]
    values = shapes["values_per_patch"]
    rows = []
    for row in shapes["attacks"]:
        says = "the visible image, exactly" if row["exact"] else "only up to what is open"
        says = f"does not apply: {row['why'].partition('; --')[0]}" if row.get("why") else says
        rows.append([row["attack"], row["open_visible"], row["open_hidden"] if shapes["hidden"] else None, says])
    intro = (
        f"The image is cut into {shapes['patches']} patches of {values} values; tokens have {shapes['embed_dim']} "
        f"dimensions, which gives {shapes['equations']} equations. The table says how many of the {values} values of a "
        f"patch each attack's equations leave open, before any image has been looked at. 0 is everything leaks."
    )
    known = {"shared": "is sent", "withheld": "is withheld", "none": "does not exist"}
    note = f"The gradient of the position embedding {known[shapes['position_gradients']]}."
    return [
        paragraph(intro),
        table(["attack", "open, visible patch", "open, hidden patch", "gives"], merged(rows, 0), cards=True),
        paragraph(note),
    ]


def _labels(labels: Sequence[Mapping], features: Sequence[Mapping], mask: Mapping | None) -> list[Markup]:
    rows = [[row["images"], row["rule"], _percent(row["read"]), row["why"] or row["read"]["n"]] for row in labels]
    parts = [
        paragraph(
            "The gradient of the last layer counts the labels of a batch: no image is needed and no optimisation. The "
            "rules read it off the signs (bias_corrected: of the bias; yin: of the weight) or solve for features of "
            "each image (class_features)."
        ),
        table(["images a gradient", "rule", "labels read", "gradients"], merged(rows, 1), cards=True),
    ]
    for row in features:
        size = f"{row['images']} image{'s' * (row['images'] > 1)}"
        says = (
            f"class features of {row['open']} of {size} are open: what the classifier is given, with logits and label"
        )
        parts.append(paragraph(f"Of one gradient of {size}: {row['why'] or says}."))
    if mask is not None:
        parts.append(
            paragraph(
                "Masked Jigsaw Puzzle hides the positions of some patches. Which ones is in the gradient: on steps "
                f"at mask ratio {mask['mask_ratio']:g} the zero rows of the position embedding told "
                f"{mask['right']['mean']:.1f} % of the patches right (n = {mask['right']['n']} gradients). Steps that "
                "are not masked, half of them by default, leak like a model without it."
            )
        )
    return parts


def _attacks(found: Mapping) -> list[Markup]:
    rows = []
    for row in found["attacks"]:
        if row["psnr"]["n"]:
            limits = f"<small>not exact: {escape(row['limits'])}</small>" if row.get("limits") else ""
            if row["exact_up_to_order"] and not row["exact"]:
                limits = "<small>exact up to the order of patches that share a position, as hidden ones do</small>"
            cells = [row["attack"], Markup(escape(row["budget"]) + limits), row["psnr"]["n"], _spread(row["psnr"])]
            best = row["psnr"]["best"]
            cells += ["perfect" if best is None else f"{best:.1f}", decibels(row["psnr_baseline"])]
            rows.append([*cells, row["ssim"]["mean"], _seconds(row["seconds"])])
    left_out = [[row["attack"], row["why"]] for row in found["attacks"] if not row["psnr"]["n"]]
    head = ["attack", "budget", "n", "PSNR (dB)", "best (dB)", "no leak (dB)", "SSIM", "s an image"]
    intro = (
        "PSNR compares with the private image: above about 25 dB it is recognisable, above 50 dB no eye sees a "
        "difference. The column no leak is what a picture in the mean colour of the image scores."
    )
    parts = [paragraph(intro), wide(head, rows)]
    pictured = [row for row in found["attacks"] if row.get("pictures") and row["attack"] != found["best"]]
    figures = "".join(
        _figure(row["pictures"][0][1], f"{row['attack']}, mean {decibels(row['psnr'])} dB, n = {row['psnr']['n']}")
        for row in pictured
    )
    if figures:
        original = _figure(pictured[0]["pictures"][0][0], "original")
        parts.append(Markup(f'<div class="strip">{original}{figures}</div>'))
    if any(row["attack"] in ("inverting_gradients", "idlg") for row in found["attacks"] if row["psnr"]["n"]):
        note = (
            "Attacks that match gradients were stopped long before their authors stop them. Their scores are a lower "
            "bound of what hours on a GPU get; a low one is no evidence of privacy."
        )
        parts.append(paragraph(note, note=True))
    parts += [paragraph(line, note=True) for line in _disagreements(found)]
    return [*parts, paragraph("Not measured:"), wide(["attack", "why"], merged(left_out, 0))]


def _disagreements(found: Mapping) -> list[str]:
    """Return why a measured attack differs from what shapes and ranks say of it, a line each."""
    said = {row["attack"]: row for row in found["shapes"].get("attacks", ())}
    lines = []
    for row in found["attacks"]:
        predicted = said.get(row["attack"])
        if predicted is None or not row["psnr"]["n"]:
            continue
        if predicted["exact"] and not row["exact_up_to_order"]:
            lines.append(
                f"{row['attack']} determines every visible patch by count and in exact arithmetic, and does not claim "
                f"it of what it measured ({spread(row['psnr'])} dB): the rounding of these gradients hides weak "
                f"directions, patches of these images are equal, or not all hidden ones were found."
            )
        elif row["exact_up_to_order"] and not predicted["exact"]:
            lines.append(
                f"{row['attack']} is exact on these images though the count leaves {predicted['open_visible']:.4g} "
                f"numbers of a patch open: patches of these images are equal or linearly dependent, which a count "
                f"from shapes cannot know."
            )
    return lines


def _defences(found: Mapping) -> list[Markup]:
    sizes = sorted({row["images"] for row in found["labels"]})
    measured = any(line["cells"] for line in found["defences"])
    head = ["defence", "strength", *(["naive attacker", "who knows the defence"] * measured)]
    head += [f"labels read, {size} image{'s' * (size > 1)}" for size in sizes]
    rows = []
    for line in found["defences"]:
        cells = [_attacked(cell) for cell in line["cells"]] + [None] * (2 - len(line["cells"]))
        strength = line["strength"]
        if line["why"]:
            strength = Markup(f"{escape(strength)}<small>{escape(line['why'])}</small>")
        read = {row["images"]: _percent(row["read"]) for row in line["labels"]}
        name = DEFENSE_NAMES.get(line["defence"], line["defence"])
        rows.append([name, strength, *cells[: 2 * measured], *(read.get(size) for size in sizes)])
    parts = [wide(head, rows)]
    if measured:
        intro = (
            "Naive is the attack that was best without a defence, unaware of it. The other attacker knows the "
            "defence. A defence is worth what it leaves to the stronger of the two, and only at the strengths "
            "measured here; what it costs in accuracy has to be measured in training (docs/defenses.md)."
        )
        figures = [
            _figure(
                cell["pictures"][0][1], f"{DEFENSE_NAMES[line['defence']]} {_short(line['strength'])}: {cell['attack']}"
            )
            for line in found["defences"]
            for cell in _distinct(line["cells"])
        ]
        return [paragraph(intro), *parts, Markup(f'<div class="strip">{"".join(figures)}</div>')]
    if late := [line for line in found["cut"] if line.startswith("defences:")]:
        return [paragraph(f"The time of this audit was short ({late[0]}). --minutes gives it more."), *parts]
    intro = (
        "Images were not attacked under defences: without any, the attacks recovered nothing in the time of an audit, "
        "so that they recover nothing under a defence would say nothing about it. What can be said within seconds is "
        "what every defence leaves of the labels."
    )
    return [paragraph(intro), *parts]


def _short(strength: str) -> str:
    return strength.split(",")[-1].strip()


def _distinct(cells: Sequence[Mapping]) -> list[Mapping]:
    """Cells with pictures, the same attack once."""
    return list({cell["attack"]: cell for cell in cells if cell.get("pictures")}.values())


def _attacked(cell: Mapping) -> Markup | str:
    if not cell["psnr"]["n"]:
        return Markup(f"–<small>{escape(cell['attack'])}: {escape(cell['why'])}</small>")
    visible, whole = level(cell["psnr_visible"]), level(cell["psnr"])
    apart = cell["psnr_visible"]["n"] and visible != whole and abs(visible - whole) > 0.5
    more = f", visible patches {decibels(cell['psnr_visible'])}" if apart else ""
    return Markup(f"{_spread(cell['psnr'])} dB<small>{escape(cell['attack'])}, n = {cell['psnr']['n']}{more}</small>")


def _spread(row: Mapping) -> Markup:
    """Mean and standard deviation with one decimal, on one line."""
    return Markup(f'<span class="whole">{spread(row)}</span>')


def merged(rows: Sequence[Sequence], column: int) -> list[list]:
    """Return the rows that differ: those alike in all but one column become one row, which names them all there."""
    found: dict[tuple, list] = {}
    for row in rows:
        rest = tuple(
            number(cell) if isinstance(cell, float) else str(cell) for place, cell in enumerate(row) if place != column
        )
        found.setdefault(rest, list(row)[:column] + [[]] + list(row)[column + 1 :])[column].append(str(row[column]))
    return [[", ".join(cell) if place == column else cell for place, cell in enumerate(row)] for row in found.values()]


def wide(header: Sequence, rows: Sequence[Sequence]) -> Markup:
    """A table whose cells are text and may wrap."""
    return Markup(f'<div class="wide">{table(header, rows, cards=True)}</div>')


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _percent(read: Mapping) -> str | None:
    return f"{read['mean']:.0f} %" if read["n"] else None


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
        f"It is about {number_of} photographs and these weights. Trained weights leak differently: give --checkpoint.",
        "A server that changes the weights or the architecture to make them leak is stronger than this one.",
        f"{_together(found['shapes'])} Local steps on the same image need not protect either. --batch_size, --clients "
        "and --local_steps measure it, docs/results.md has a federated run.",
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
    return "More images a gradient and secure aggregation make all of this harder."


def _commands(model: Mapping, attack: str) -> Markup:
    name = model["name"]
    given = f"--checkpoint {name}" if Path(name).suffix in (".pt", ".pth", ".safetensors") else f"--model {name}"
    commands = [
        f"python attack.py --attack {attack} {given} --images DIR --output runs/attack",
        f"python attack.py --config configs/attack/inverting_gradients.yaml {given} --images DIR --output runs/ig",
        f"python attack.py --leak LEAKS {given} --output runs/leak",
    ]
    lines = "".join(f"<p>{code(command)}</p>" for command in commands)
    return Markup(f'<div class="commands">{lines}</div>')


def _made(found: Mapping) -> dict[str, str]:
    return {
        "command": code(command_line()),
        "model": f"{found['model']['parameters']:,} parameters, {found['model']['image']}, "
        f"{found['model']['classes']} classes",
        "images": ", ".join(found["model"]["images"]),
        "time": f"{found['seconds']:.0f} seconds of at most {60 * found['minutes']:.0f} (--minutes)",
        "cut short for want of time": "; ".join(found["cut"]) or "nothing",
    }
