"""The parts of audit.html that hold tables: shapes, labels, attacks, defences."""

from collections.abc import Mapping, Sequence

from reports.page import Markup, escape, number, paragraph, picture, table
from utils.summary import decibels, level, spread

DEFENSE_NAMES = {
    "none": "no defence",
    "noise": "noise",
    "dp_sgd": "DP-SGD",
    "prune": "pruning",
    "quantize": "quantisation",
    "withhold": "withholding",
    "MJP": "Masked Jigsaw Puzzle",
}


def _figure(image, caption: str) -> str:
    return f"<figure>{picture(image, 132, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def strip(row: Mapping, caption: str) -> Markup:
    """Return originals beside reconstructions."""
    figures = [
        _figure(original, "original") + _figure(copy, row["attack"]) for original, copy in row.get("pictures", ())[:3]
    ]
    return Markup(f'<div class="strip" title="{escape(caption)}">{"".join(figures)}</div>')


def shapes_part(shapes: Mapping, model: Mapping) -> list[Markup]:
    """Return what linear equations leave open, by shapes and ranks alone."""
    if "why" in shapes:
        counts = f"The gradient has {model['shared']:,} numbers for the {model['values']:,} of an image: "
        counts += (
            "counting alone does not protect."
            if model["shared"] >= model["values"]
            else "fewer than would fix them all; what an attacker knows of images may fix the rest."
        )
        return [
            paragraph(
                "This project knows no linear equations for this network and what it shares, which is no proof that "
                "there are none: a first linear layer with a bias, for one, gives its input by a division. What is "
                f"left here are attacks that search for an image with the same gradient. {counts}"
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
    rows, whole = [], "the visible image, exactly"
    if shapes["places"] == "open":
        whole = "the visible patches, exactly; what order they have is in no equation"
    for row in shapes["attacks"]:
        says = whole if row["exact"] else "only up to what is open"
        says = f"does not apply: {row['why'].partition('; --')[0]}" if row.get("why") else says
        rows.append([row["attack"], row["open_visible"], row["open_hidden"] if shapes["hidden"] else None, says])
    intro = (
        f"The image is cut into {shapes['patches']} patches of {values} values; tokens have {shapes['embed_dim']} "
        f"dimensions, which gives {shapes['equations']} equations. The table says how many of the {values} values of a "
        f"patch each attack's equations leave open, before any image has been looked at. 0: all of it leaks."
    )
    known = {"shared": "is sent", "withheld": "is not sent", "none": "does not exist"}
    known |= {"tied": "holds a row for several patches each"}
    note = f"The gradient of the position embedding {known[shapes['position_gradients']]}."
    return [
        paragraph(intro),
        wide(["attack", "open, visible patch", "open, hidden patch", "gives"], merged(rows, 0)),
        paragraph(note),
    ]


def labels_part(labels: Sequence[Mapping], features: Sequence[Mapping], mask: Mapping | None) -> list[Markup]:
    """Return what the gradient tells of labels, class features and the mask."""
    rows = [[row["images"], row["rule"], _percent(row["read"]), row["why"] or row["read"]["n"]] for row in labels]
    counts = "The gradient of the last layer counts the labels of a batch: no image is needed and no optimisation. "
    if not any(row["read"]["n"] for row in labels):
        counts = "Where the gradient of the last layer is shared it counts the labels of a batch; no rule could here. "
    parts = [
        paragraph(
            f"{counts}The rules read it off the signs (bias_corrected: of the bias; yin: of the weight) or solve for "
            "features of each image (class_features). Attributes, several an image, are read off "
            "the sign of each bias (attributes) where the gradient is of one image."
        ),
        wide(["images a gradient", "rule", "labels read", "gradients"], merged(rows, 1)),
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


def attacks_part(found: Mapping) -> list[Markup]:
    """Return what every attack recovered, with pictures, and why others were not measured."""
    rows = []
    for row in found["attacks"]:
        if row["psnr"]["n"]:
            limits = f"<small>not exact: {escape(row['limits'])}</small>" if row.get("limits") else ""
            if row["exact_up_to_order"] and not row["exact"]:
                limits = "<small>exact up to the order of patches that share a position, as hidden ones do</small>"
            if row["proved"] >= 1 and not row["exact_up_to_order"]:
                limits += f"<small>proves {row['proved']:.0f} % of the bits of an image leaked</small>"
            cells = [row["attack"], Markup(escape(row["budget"]) + limits), row["psnr"]["n"], _spread(row["psnr"])]
            best = row["psnr"]["best"]
            cells += ["perfect" if best is None else f"{best:.1f}", decibels(row["psnr_baseline"])]
            rows.append([*cells, row["ssim"]["mean"], seconds_text(row["seconds"])])
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
    parts += [paragraph(line, note=True) for line in disagreements(found)]
    return [*parts, paragraph("Not measured:"), wide(["attack", "why"], merged(left_out, 0))]


def disagreements(found: Mapping) -> list[str]:
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


def defenses_part(found: Mapping) -> list[Markup]:
    """Return what every defence leaves to the naive attacker, to one who knows it, and of labels."""
    sizes = sorted({row["images"] for row in found["labels"]})
    measured = any(line["cells"] for line in found["defenses"])
    head = ["defence", "strength", *(["naive attacker", "who knows the defence"] * measured)]
    head += [f"labels read, {size} image{'s' * (size > 1)}" for size in sizes]
    rows = []
    for line in found["defenses"]:
        cells = [_attacked(cell) for cell in line["cells"]] + [None] * (2 - len(line["cells"]))
        strength = line["strength"]
        if line["why"]:
            strength = Markup(f"{escape(strength)}<small>{escape(line['why'])}</small>")
        read = {row["images"]: _percent(row["read"]) for row in line["labels"]}
        name = DEFENSE_NAMES.get(line["defense"], line["defense"])
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
                cell["pictures"][0][1], f"{DEFENSE_NAMES[line['defense']]} {_short(line['strength'])}: {cell['attack']}"
            )
            for line in found["defenses"]
            for cell in _distinct(line["cells"])
        ]
        return [paragraph(intro), *parts, Markup(f'<div class="strip">{"".join(figures)}</div>')]
    if late := [line for line in found["cut"] if line.startswith("defences:")]:
        return [paragraph(f"The time of this audit was short ({late[0]}). audit.py --minutes gives it more."), *parts]
    none = not any(row["psnr"]["n"] for row in found["attacks"])
    before = "no attack on images was measured" if none else "no attack recovered an image in the time of an audit"
    intro = (
        f"Images were not attacked under defences: without any, {before}, so that they recover nothing under a defence "
        "would say nothing about it. What can be said within seconds is what every defence leaves of the labels."
    )
    return [paragraph(intro), *parts]


def _short(strength: str) -> str:
    return strength.split(",")[-1].strip()


def _distinct(cells: Sequence[Mapping]) -> list[Mapping]:
    """Return the cells with pictures, the same attack once."""
    return list({cell["attack"]: cell for cell in cells if cell.get("pictures")}.values())


def _attacked(cell: Mapping) -> Markup | str:
    if not cell["psnr"]["n"]:
        return Markup(f"–<small>{escape(cell['attack'])}: {escape(cell['why'])}</small>")
    visible, whole = level(cell["psnr_visible"]), level(cell["psnr"])
    apart = cell["psnr_visible"]["n"] and visible != whole and abs(visible - whole) > 0.5
    more = f", visible patches {decibels(cell['psnr_visible'])}" if apart else ""
    return Markup(f"{_spread(cell['psnr'])} dB<small>{escape(cell['attack'])}, n = {cell['psnr']['n']}{more}</small>")


def _spread(row: Mapping) -> Markup:
    """Return mean and standard deviation with one decimal, on one line."""
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
    """Return a table whose cells are text and may wrap."""
    return Markup(f'<div class="wide">{table(header, rows, cards=True)}</div>')


def seconds_text(value: float) -> str:
    """Return seconds with two significant digits, whole from 10 on."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _percent(read: Mapping) -> str | None:
    return f"{read['mean']:.0f} %" if read["n"] else None
