"""The tables and verdicts of docs/servers.md, each from the JSON of a study: scripts/servers_page.py joins them.

Rows are Markdown; shares are in percent, with the range over repetitions.
"""

from eval.membership import binomial_interval

STRONGEST = {"class_fishing": {"margin": 1000.0, "kept": 0.0}, "feature_fishing": {"slope": 3000.0, "kept": 0.0}}
KEPT = 0.8  # of what comes back without MJP, from which on MJP is said to protect nothing of it


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def entry(cell: dict, key: str) -> str:
    """Return a score of a cell in percent, with its range over repetitions."""
    row = cell.get(key)
    if row is None:
        return "–"
    low, high = percent(row["smallest"]), percent(row["largest"])
    return percent(row["mean"]) if low == high else f"{percent(row['mean'])} ({low}–{high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def chosen(cells: list[dict], **wanted) -> list[dict]:
    return [cell for cell in cells if all(cell[key] == value for key, value in wanted.items())]


def kind(cell: dict) -> str:
    """Return what a cell's server reads, in words."""
    if cell["server"] == "adapter_imprint":
        return "adapter bins"
    return "bins of places" if cell["options"].get("reads") == "place" else "bins of images"


def by_kind(cells: list[dict], part: str) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for cell in chosen(cells, part=part):
        found.setdefault(kind(cell), []).append(cell)
    return found


def content(cell: dict) -> float:
    """Return the share of all patches that come back, visible or hidden, in whatever place."""
    ratio = cell["ratio"]
    hidden = cell["hidden"]["mean"] if cell.get("hidden") else 0.0
    return (1 - ratio) * cell["visible"]["mean"] + ratio * hidden


def verdict(cells: list[dict]) -> str:
    """Return what MJP changes for one kind of bins, from its cells by mask ratio."""
    plain, masked = cells[0], cells[-1]
    before, after = content(plain), content(masked)
    says = "MJP protects no content" if after >= KEPT * before else "MJP protects content"
    if plain["in_place"]["mean"] < 0.5:  # pictures hardly ever came back whole
        return f"{says}: {percent(before)} % of the patches without, {percent(after)} % at ratio {masked['ratio']:g}"
    places = "and hides places" if masked["in_place"]["mean"] < 0.2 * plain["in_place"]["mean"] else "nor places"
    return (
        f"{says} {places}: patches {percent(before)} % without, {percent(after)} % at ratio {masked['ratio']:g}; "
        f"pictures in place {percent(plain['in_place']['mean'])} % and {percent(masked['in_place']['mean'])} %"
    )


def verdicts(study: dict, membership: dict) -> str:
    rows = [[name, verdict(cells)] for name, cells in by_kind(study["cells"], "mask").items()]
    plain, masked = (
        next(
            row
            for row in study["fishing"]
            if row["server"] == "class_fishing"
            and bool(row["ratio"]) == hides
            and not row["options"].keys() - {"target"}
        )
        for hides in (False, True)
    )
    same = "MJP does not change how often one image is alone"
    if masked["alone"] < KEPT * plain["alone"]:
        same = "MJP makes it rarer that one image is alone"
    rows.append(
        [
            "fishing",
            f"{same}: {plain['alone']} and {masked['alone']} of {plain['rounds']} rounds; the image comes back at "
            f"{plain['psnr_median']:.0f} dB without, its visible patches at {masked['psnr_median']:.0f} dB at ratio "
            f"{masked['ratio']:g}",
        ]
    )
    for name, key, chosen_one in (("membership by a head", "head", 32), ("membership by LoRA, rank 64", "lora", 3)):
        before = next(row["auc"]["mean"] for row in membership[key] if row["batch"] == chosen_one)
        after = [row for row in membership["masked"] if ("rank" in row) == (key == "lora")]
        least = min(row["auc"]["mean"] for row in after)
        says = "MJP changes little" if least > 0.9 else "MJP makes it harder for one who ignores the mask"
        told = ", ".join(f"{row['auc']['mean']:.3f} at ratio {row['ratio']:g}" for row in after)
        rows.append([name, f"{says}: AUC {before:.3f} without, {told}"])
    return table(["server", "what MJP changes"], rows)


def of_batches(study: dict) -> str:
    cells = chosen(study["cells"], part="batch")
    rows = []
    for batch in sorted({cell["batch"] for cell in cells}):
        cnn, vit = (chosen(cells, batch=batch, victim=name)[0] for name in ("cnn", "vit"))
        false = sum(round(cell["false_claims"]["mean"] * cell["n"]) for cell in (cnn, vit))
        rows.append(
            [str(batch), percent(vit["promised"]["mean"]), entry(cnn, "images"), entry(vit, "images")]
            + [entry(cnn, "claimed"), entry(vit, "claimed"), str(false)]
        )
    head = ["batch", "guarantee", "CNN", "ViT", "CNN, claimed", "ViT, claimed", "false claims"]
    kinds = [
        [f"`{c['server']}`: " + ", ".join(f"{k} {v}" for k, v in c["options"].items())]
        + [percent(c["promised"]["mean"]), entry(c, "images")]
        for c in chosen(study["cells"], part="kind")
    ]
    return table(head, rows) + "\n" + table(["ViT, batch 64", "guarantee", "recovered"], kinds)


def of_masks(study: dict) -> str:
    rows = []
    for name, cells in by_kind(study["cells"], "mask").items():
        for cell in cells:
            promise = cell.get("promised") or cell.get("promised_visible")
            rows.append(
                [name, f"{cell['ratio']:g}", percent(promise and promise["mean"]), entry(cell, "visible")]
                + [percent((cell.get("promised_hidden") or {}).get("mean")), entry(cell, "hidden")]
                + [entry(cell, "images"), entry(cell, "in_place")]
            )
    head = ["server", "ratio", "guarantee", "visible", "hidden: guarantee", "hidden", "pictures", "in place"]
    return table(head, rows)


def of_clients(study: dict) -> str:
    rows = []
    for name, cells in by_kind(study["cells"], "clients").items():
        for clients in sorted({cell["clients"] for cell in cells}):
            plain, masked = (chosen(cells, clients=clients, ratio=ratio)[0] for ratio in (0.0, 0.5))
            promise = plain.get("promised") or plain.get("promised_visible")
            rows.append(
                [name, str(clients), str(plain["batch"]), percent(promise["mean"]), entry(plain, "visible")]
                + [entry(masked, "visible"), entry(masked, "hidden")]
            )
    head = ["server", "clients", "images each", "guarantee", "patches", "MJP 0.5: visible", "MJP 0.5: hidden"]
    return table(head, rows)


def of_fishing(study: dict, detector: dict) -> str:
    """Return the table of fishing, with what the detector finds of the same settings."""
    seen = {(row["attack"].replace(" ", "_"), row["strength"]): row for row in detector["all"]["attacks"]}
    rows = []
    for row in study["fishing"]:
        low, high = binomial_interval(row["alone"], row["rounds"])
        given = {key: value for key, value in row["options"].items() if key != "target"}
        told = given or STRONGEST[row["server"]]
        words = ", ".join(f"{key} {value}" for key, value in told.items())
        found = seen[row["server"], words]
        rows.append(
            [f"`{row['server']}`", words, f"{row['ratio']:g}", str(row["clients"]), percent(row["promised"])]
            + [f"{row['alone']} of {row['rounds']} ({percent(low)}–{percent(high)} %), {row['exact']}"]
            + [f"{row['psnr_median']:.0f} ({row['psnr_smallest']:.0f})" if row["alone"] else "–"]
            + [f"{found['detected']} of {found['n']}"]
        )
    head = ["server", "strength", "ratio", "clients", "promised, %", "one image alone, exact"]
    return table([*head, "dB, median (smallest)", "detected"], rows)


def of_breaching(found: dict) -> str:
    """Return the table of bins beside breaching's, and who recovers more, counted over the cells."""
    rows = []
    for cell in found["cells"]:
        rows.append(
            ["CNN" if cell["victim"] == "cnn" else "ViT", str(cell["batch"])]
            + [percent(cell["promised"]), percent(cell["promised_breaching"])]
            + [entry(cell, key) for key in ("ours", "same_bins", "as_shipped")]
        )
    head = ["victim", "batch", "guarantee, ours", "guarantee, breaching's", "ours", "breaching, the same bins"]
    gaps = [cell["ours"]["mean"] - cell["same_bins"]["mean"] for cell in found["cells"]]
    more, fewer = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    says = (
        f"Ours recovers more in {more} of {len(gaps)} cells, breaching in {fewer}; the mean difference is "
        f"{100 * sum(gaps) / len(gaps):+.1f} points, the largest {100 * max(gaps, key=abs):+.1f}."
    )
    return (
        f"breaching {found['breaching']} with its own server and reader on the same victims, images and labels, "
        f"{found['bins']} bins, {found['cells'][0]['n']} repetitions: with our functional and thresholds (the same "
        f"bins), and as it is shipped. {says} Command: `{found['command']}`.\n\n"
        + table([*head, "breaching as shipped"], rows)
    )


def of_dropout(study: dict) -> str:
    """Return the table of sums that clients drop out of."""
    rows = []
    for name, cells in by_kind(study["cells"], "dropout").items():
        for cell in cells:
            promise = cell.get("promised") or cell.get("promised_visible")
            rows.append(
                [name, str(cell["clients"]), str(cell["batch"]), percent(cell["dropout"]), percent(promise["mean"])]
                + [entry(cell, "visible"), entry(cell, "hidden")]
            )
    head = ["server", "clients", "images each", "drop out, %", "guarantee", "visible", "hidden"]
    return table(head, rows)


def of_joint(found: dict) -> str:
    """Return what the honest server's `joint` recovers of sums, one image a client."""
    rows = []
    for name, cell in found["cells"].items():
        if name.endswith("| steps 1"):
            clients = name.removeprefix("clients ").partition(" ")[0]
            psnr = cell["psnr"]
            rows.append(
                [clients, f"{cell['exact']} of {cell['leaks']}", f"{cell['patches_recovered']['mean']:.0f}"]
                + [f"{psnr['mean']:.0f} ± {psnr['std']:.0f} (n {psnr['n']})"]
            )
    return table(["clients", "sums that are exact", "patches, %", "dB"], rows)


def of_detector(found: dict) -> str:
    every, weights = found["all"], found["weights_only"]
    lines = []
    for told, name in ((every, "all statistics"), (weights, "weights alone")):
        alarms, number = told["honest"]["false_alarms"], told["honest"]["n"]
        low, high = binomial_interval(alarms, number)
        lines.append(f"{alarms} of {number} with {name} (95 % interval {100 * low:.1f} to {100 * high:.1f} %)")
    rows = []
    for with_all, alone in zip(every["attacks"], weights["attacks"], strict=True):
        seen = [
            key for key, count in with_all["seen_by"].items() if count > 0.9 * with_all["n"] and key != "new_values"
        ]
        rows.append(
            [with_all["attack"], with_all["strength"], f"{with_all['auc']:.3f}", f"{alone['auc']:.3f}"]
            + [f"{with_all['detected']} of {with_all['n']}", ", ".join(f"`{key}`" for key in seen) or "–"]
        )
    head = ["attack", "strength", "AUC", "AUC, weights alone", "detected", "seen on 9 of 10 by"]
    return (
        f"Command: `{found['command']}`. Honest models: {found['honest_models']}, "
        f"neighbouring rounds of short trainings of five architectures and "
        f"eight seeds; half of the seeds set the thresholds, the other half gives false alarms: {'; '.join(lines)}.\n\n"
        + table(head, rows)
    )


def of_decepticons(found: dict) -> str:
    """Return the table of sentences, with what MJP changes."""
    rows = []
    for cell in found["cells"]:
        rows.append(
            [f"`{cell['victim']}`", str(cell["batch"]), f"{cell['ratio']:g}", percent(cell["promised"]["mean"])]
            + [entry(cell, key) for key in ("visible", "content")]
            + [f"{cell['sentences']['mean']:.0f}", percent(cell["detected"]["mean"])]
        )
    head = ["victim", "sentences", "ratio", "guarantee", "visible, in place", "content", "told apart", "detected, %"]
    return (
        f"A server whose feed-forward layers are bins of tokens (after Decepticons): sentences of {found['length']} "
        f"tokens, {found['private']} private and {found['public']} of the server, {found['cells'][0]['n']} "
        f"repetitions, in percent of the tokens. `bert`: 4 blocks of 128. MJP hides the places of masked tokens, and "
        f"the tokens of a sentence that share the hidden row are fewer to tell apart. "
        f"Command: `{found['command']}`.\n\n" + table(head, rows)
    )


def of_large(found: dict) -> str:
    """Return what the thresholds say of larger models."""
    words = []
    for kind in ("random", "trained"):
        honest = found["honest"][kind]
        low, high = binomial_interval(honest["false_alarms"], honest["n"])
        words.append(
            f"{honest['false_alarms']} of {honest['n']} with {kind} weights (95 % interval {100 * low:.0f} to "
            f"{100 * high:.0f} %)"
        )
    by = [f"`{name}` {count}" for name, count in found["honest"]["by"].items() if count]
    rows = [
        [row["attack"], row["strength"], f"{row['auc']:.3f}", f"{row['detected']} of {row['n']}"]
        for row in found["attacks"]
    ]
    return (
        f"A ViT-S/14 ({found['parameters'] / 1e6:.0f} million parameters, 98 px), random and with the trained weights "
        f"of [weights.md](weights.md), fine-tuned at two rates, one seed, weights alone. At the same thresholds false "
        f"alarms are {' and '.join(words)}{'; raised by ' + ', '.join(by) if by else ''}. "
        f"Command: `{found['command']}`.\n\n" + table(["attack", "strength", "AUC", "detected"], rows)
    )


def of_membership(found: dict) -> str:
    def cells(row: dict) -> list[str]:
        rate = row["tpr_at_0.0001"]
        spread = f" ± {row['auc']['std']:.3f}" if row["auc"]["std"] else ""
        interval = f"{percent(rate['low'])}–{percent(rate['high'])}"
        return [f"{row['auc']['mean']:.3f}{spread}", f"{percent(rate['mean'])} ({interval}, n {rate['members']})"]

    heads = [
        [str(row["batch"]), f"{row['noise_multiplier']:g}"]
        + ["none" if row["epsilon"] is None else f"{row['epsilon']:.3g}", *cells(row)]
        for row in found["head"]
    ]
    lora = [[str(row["rank"]), str(row["batch"]), str(row["tokens"]), *cells(row)] for row in found["lora"]]
    names = ["AUC", "TPR at FPR 1e-4, %"]
    masked = [
        ["LoRA, rank 64" if "rank" in row else "head", str(row["batch"]), f"{row['ratio']:g}", *cells(row)]
        for row in found["masked"]
    ]
    return (
        f"Command: `{found['command']}`. "
        f"Non-members: {found['non_members']}; {found['seeds']} seeds, and exact binomial intervals over all of them."
        + "\n\n"
        + table(["head: images", "DP-SGD noise", "epsilon, one update", *names], heads)
        + "\n"
        + table(["LoRA: rank", "images", "tokens", *names], lora)
        + "\nA step that MJP masks, asked with the picture as it is, its patches in their places:\n\n"
        + table(["shared", "images", "mask ratio", *names], masked)
    )
