"""Tables of weights, fine-tuning and breaching's attacks out of docs/results: what scripts/results_page.py writes
between the markers of their pages."""

import json
from pathlib import Path

from reports.tables import Measured, Table, markdown

FILES = Path(__file__).resolve().parents[1] / "docs" / "results"
WEIGHTS = {
    "random": "random",
    "trained": "trained",
    "tuned": "fine-tuned with MJP at 98 px",
}


def read(name: str) -> dict:
    return json.loads((FILES / f"{name}.json").read_text())


def measured(found: dict | None, digits: str = ".1f") -> Measured:
    return Measured(found["mean"], found["std"], digits, digits) if found else Measured(None)


def one_of(row: dict, *keys: str) -> dict | None:
    """Return the first of the values a row has."""
    return next((row[key] for key in keys if key in row), None)


def attacks() -> str:
    """Return the table of scripts/weights_table.py; what an attack refused is a line below it."""
    found, lines, refused = read("weights_table"), [], {}
    for row in found["rows"]:
        setting = f"{row['attack']}, {'plain' if not row['mask_ratio'] else 'MJP ' + format(row['mask_ratio'], 'g')}"
        if "refused" in row:
            refused[row["attack"], row["side"]] = row["refused"]
            continue
        lpips = measured(one_of(row, "lpips_alex", "lpips_alex_unverified"), ".3f")
        scores = [measured(row["psnr"]), measured(row.get("psnr_visible")), measured(row.get("ssim"), ".3f"), lpips]
        lines.append([f"{setting}, {row['side']} px", WEIGHTS[row["weights"]], row["dtype"], row["psnr"]["n"], *scores])
    header = ["attack", "weights", "dtype", "n", "PSNR (dB)", "visible patches (dB)", "SSIM", "LPIPS"]
    text = markdown(Table(header, lines))
    kept = sum(row.get("kept", False) for row in found["rows"])
    if kept:
        text += f"\n{kept} of {len(found['rows'])} rows are kept from earlier runs (`kept` in the JSON).\n"
    return text + "".join(f"\n`{name}` at {side} px refuses: {why}\n" for (name, side), why in refused.items())


def gradvit() -> str:
    """Return the tables of scripts/reproduce/gradvit_prior.sh, one for each attack that was measured."""
    return "\n".join(prior_table(f"{name.lower()}_prior", name) for name in ("GradViT", "GradInversion"))


def prior_table(file: str, attack: str) -> str:
    """Return the table of an attack with and without an image prior, with the verdict its numbers give."""
    found, lines = read(file), []
    rows = {name: next(iter(ratios.values())) for name, ratios in found["attacks"].items()}
    for name, row in rows.items():
        lpips = measured(one_of(row, "lpips_alex", "lpips_alex_unverified"), ".3f")
        lines.append([name, row["images"], measured(row["psnr"]), measured(row.get("ssim"), ".3f"), lpips])
    (base, *_) = (row["psnr_baseline"] for row in rows.values())
    lines.append(
        ["a picture in the mean colour of the image", base["n"], measured(base), Measured(None), Measured(None)]
    )
    both = [rows["with prior"], rows["without prior"]]
    psnr, lpips = (
        [one_of(row, *keys)["mean"] for row in both] for keys in (("psnr",), ("lpips_alex", "lpips_alex_unverified"))
    )
    against = "above" if max(psnr) > base["mean"] else "below"
    verdict = (
        f"The prior changes PSNR by {psnr[0] - psnr[1]:+.1f} dB and LPIPS by {lpips[0] - lpips[1]:+.3f} (lower is "
    )
    verdict += f"closer); the better PSNR of both is {against} that of the mean colour."
    return markdown(Table([attack, "n", "PSNR (dB)", "SSIM", "LPIPS"], lines)) + f"\n{found['data']}. {verdict}\n"


def sentences() -> str:
    """Return the table of scripts/reproduce/text_minilm.sh."""
    found, keys = read("text_minilm"), ("tokens_in_place", "tokens_any_order", "tokens_masked", "seconds")
    lines = [
        [row["attack"], f"{row['mask_ratio']:g}", row["batch_size"], row["n"], *(_cell(row[key]) for key in keys)]
        for row in found["rows"]
    ]
    header = [
        "attack",
        "mask ratio",
        "batch",
        "n",
        "in place (%)",
        "any order (%)",
        "masked, as a set (%)",
        "seconds",
    ]
    return markdown(Table(header, lines))


def _cell(found: dict) -> Measured:
    return Measured(found["mean"], found["std"])


def finetuning() -> str:
    """Return the tables of scripts/reproduce/finetune.sh and finetune_photographs.sh."""
    return "\n".join(tuned_table(read(name)) for name in ("finetune", "finetune_photographs"))


def tuned_table(found: dict) -> str:
    """Return a line of what the models were trained on, and a row for each kind of model."""
    columns = {
        "acc1_0": "accuracy (%)", "acc1_0.5": "at 0.5 (%)", "acc1_0.9": "at 0.9 (%)",
        "consistency_0.5": "consistency at 0.5 (%)", "consistency_0.9": "at 0.9 (%)",
        "position_error": "position error (patches)",
    }  # fmt: skip
    lines = [
        [
            name.replace("_", " "),
            len(row["acc1_0"]["values"]),
            *(measured(row.get(key), ".2f" if key == "position_error" else ".1f") for key in columns),
        ]
        for name, row in found["variants"].items()
    ]
    about = found["data"][0].upper() + found["data"][1:]
    return f"{about}:\n\n" + markdown(Table(["model", "seeds", *columns.values()], lines))


def breaching() -> str:
    """Return the table of scripts/breaching_attacks.py, short and long runs; what an attack refuses is a line below."""
    names = ("mean_colour", "invertinggradients", "modern", "deepleakage", "ours")
    lines, refused, means = [], {}, []
    for found in map(read, ("breaching_attacks", "breaching_long")):
        length = f"{found['iterations']:,} iterations" if found["iterations"] else "its own lengths"
        for key, row in found["cells"].items():
            scores = {name: row["psnr"].get(name) for name in names}
            lines.append([f"{key}, {length}", row["n"], *map(measured, scores.values()), f"`{row['attack']}`"])
            means.append({name: score["mean"] for name, score in scores.items() if score})
            for name, why in row["refused"].items():
                refused.setdefault(f"`{name}` refuses ({why})", []).append(key)
    header = ["condition", "n", "mean colour", *(f"`{name}`" for name in names[1:4]), "ours", "which"]
    notes = "".join(f"\n{what}: {', '.join(dict.fromkeys(where))}.\n" for what, where in refused.items())
    best = sum(max(one, key=lambda name, one=one: one[name]) == "ours" for one in means)
    beats = sum(max(one[name] for name in names[1:4] if name in one) > one["mean_colour"] for one in means)
    verdict = f"Ours is nearest in {best} of {len(lines)} rows; one of breaching's is nearer than the mean colour in "
    return markdown(Table(header, lines)) + notes + f"\n{verdict}{beats}.\n"


SECTIONS = {"weights_attacks": attacks, "gradvit": gradvit, "sentences": sentences}
