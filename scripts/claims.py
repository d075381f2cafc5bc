"""The paper's claims and ours, each with the function that computes its numbers and verdict from docs/results.

A difference between two trained models counts when it is more than twice its standard error over training seeds; the
verdicts are computed, and say "not decided" where that does not settle it.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from inverting_gradients_table import hides, reconstructs
from joint_claims import aggregates, batches, classifier

from utils.errors import UserError

FILES = Path(__file__).resolve().parents[1] / "docs" / "results"
RECOVERED, GONE = 25.0, 15.0  # dB: recognisable, and what the mean colour of an image gives
RATIOS = ("0.03", "0.1", "0.27", "0.5")
UNDECIDED = "not decided at this scale"


class Claim(NamedTuple):
    """says: of the paper, or ours; evidence() -> (our numbers, verdict); command: makes them; shown: where it is
    proven or pictured."""

    says: str
    evidence: Callable[[], tuple[str, str]]
    command: str
    shown: str = ""


def read(name: str) -> dict:
    """Return the content of a file of FILES. Raises UserError where it is missing."""
    return _content(FILES / f"{name}.json")


@cache
def _content(file: Path) -> dict:
    if not file.is_file():
        raise UserError(f"'{file}' is missing: see the head of scripts/results_page.py for how it is made")
    return json.loads(file.read_text())


def ablations(*needed: str, files: str = "ablation*.json") -> dict[str, dict]:
    """{data: variants} of every ablation at hand that has the needed variants; a claim names them all."""
    contents = [read(file.stem) for file in sorted(FILES.glob(files))]
    found = {content["data"]: content["variants"] for content in contents if content["variants"].keys() >= {*needed}}
    if not found:
        raise UserError(f"no {files} in '{FILES}' has {', '.join(needed)}: run {ABLATION} to its end")
    return found


def cell(found: dict, unit: str = "%") -> str:
    spread = "" if found["std"] is None else f" ± {found['std']:.1f}"
    return f"{found['mean']:.1f}{spread} {unit}"


def difference(one: dict, other: dict) -> tuple[float, float]:
    """(difference of the means, its standard error over seeds: infinite where there is one)."""
    if one["std"] is None or other["std"] is None:
        return one["mean"] - other["mean"], math.inf
    errors = [found["std"] ** 2 / len(found["values"]) for found in (one, other)]
    return one["mean"] - other["mean"], math.sqrt(sum(errors))


def better(one: dict, other: dict, *, margin: float = 0.0) -> str:
    """Verdict on 'one is above other', or with a margin on 'one is not more than that below'."""
    gain, error = difference(one, other)
    if gain + margin > 2 * error:
        return "holds"
    return "does not hold" if gain + margin < -2 * error else UNDECIDED


def together(verdicts: dict[str, str]) -> str:
    """Return one verdict out of those by data."""
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    return ", ".join(f"{verdict} on {data.split(',')[0]}" for data, verdict in verdicts.items())


def compared(
    measure: str,
    one: str,
    other: str,
    *,
    unit: str = "%",
    margin: float = 0.0,
    lower: bool = False,
    files: str = "ablation*.json",
) -> tuple[str, str]:
    """'one is above other' in every ablation that has both; lower: below."""
    texts, verdicts = [], {}
    names = [name.replace("_", " ") for name in (one, other)]
    for data, variants in ablations(one, other, files=files).items():
        first, second = (variants[name][measure] for name in (one, other))
        gain, error = difference(first, second)
        texts.append(
            f"{data}: {names[0]} {cell(first, unit)}, {names[1]} {cell(second, unit)}, "
            f"{gain:+.1f}" + (f" ± {error:.1f} (standard error)" if math.isfinite(error) else " (one seed)")
        )
        verdicts[data] = better(second, first) if lower else better(first, second, margin=margin)
    return "; ".join(texts), together(verdicts)


def attack(name: str, ratio: str, measure: str) -> dict:
    return read("attacks_deit_small")["attacks"][name][ratio][measure]


def no_op() -> tuple[str, str]:
    found = read("mechanism")["summary"]
    hidden, plain = (found[key]["mean"] for key in ("order_change", "naive_order_change"))
    text = f"permuting the masked patches once more changes the gradient by {hidden:.0e} of its size (float64 "
    text += f"rounding), by {plain:.0e} without the unknown row, n = {found['masked']['n']} photographs. Masked "
    text += "patches share one position vector and the class token attends to a set: on a ViT, MJP is hiding positions "
    return text + "at random plus the localization loss", "does not hold" if hidden < 1e-10 else "holds"


def what_leaks() -> tuple[str, str]:
    found, ratio = read("mechanism")["summary"], read("mechanism")["ratio"]
    rows = read("mechanism")["images"]
    solved = sum(row["psnr_masked"] > RECOVERED for row in rows)
    read_off = sum(row["mask_right"] for row in rows)
    text = f"at {ratio}, float64: the zero rows of the position gradient name the masked places in {read_off:.0f} of "
    text += f"{len(rows)} images; visible patches {cell(found['psnr_visible'], 'dB')}, masked ones as a set "
    text += f"{cell(found['psnr_masked'], 'dB')}, above {RECOVERED:.0f} dB in {solved} of {len(rows)}; "
    text += f"their order, {found['order_bits']['mean']:.0f} bits an image, is in no gradient"
    return text, "holds" if read_off == len(rows) and solved == len(rows) else "holds partly"


def leaks() -> tuple[str, str]:
    found = attack("closed_form", "0", "psnr")
    verdict = "holds" if found["mean"] > RECOVERED else "does not hold"
    return f"{cell(found, 'dB')} from one gradient, n = {found['n']} photographs", verdict


def layout() -> tuple[str, str]:
    texts, verdicts = [], {}
    for data, variants in ablations("plain", "no_positions").items():
        plain, none = (variants[name]["adaptive_visible"] for name in ("plain", "no_positions"))
        texts.append(f"{data}: with a table {cell(plain, 'dB')}, without any positions {cell(none, 'dB')}")
        verdicts[data] = "holds partly" if plain["mean"] > none["mean"] > GONE else better(plain, none)
    return "; ".join(texts), f"{together(verdicts)}, against linear attacks alone"


def positions_known() -> tuple[str, str]:
    texts, verdicts = [], {}
    for data, variants in ablations("plain").items():
        found, chance = (variants["plain"][key] for key in ("position_error", "position_chance"))
        texts.append(
            f"{data}: error {cell(found, 'patches')} of a linear probe on row and column, chance {chance['mean']:.1f}"
        )
        verdicts[data] = better(chance, found)
    return "; ".join(texts), together(verdicts)


def naive_privacy() -> tuple[str, str]:
    before, after = attack("closed_form", "0", "psnr"), attack("closed_form", "0.27", "psnr_visible")
    text = f"naive attack at 0.27, visible patches: {cell(after, 'dB')}, unmasked {cell(before, 'dB')}"
    return text, "holds against this attacker" if after["mean"] < GONE else "does not hold"


def adaptive_privacy() -> tuple[str, str]:
    rows = [(ratio, attack("mjp_aware", ratio, "psnr_visible")) for ratio in RATIOS]
    masked = attack("mjp_aware", "0.27", "psnr_masked")
    text = "visible patches: " + ", ".join(f"{cell(found, 'dB')} at {ratio}" for ratio, found in rows)
    text += f"; masked ones at 0.27 {cell(masked, 'dB')}"
    kept = all(found["mean"] > RECOVERED for _, found in rows)
    return text, "does not hold for the visible patches" if kept else "holds partly"


def trained_privacy() -> tuple[str, str]:
    texts, verdicts = [], {}
    for data, variants in ablations("plain", MJP).items():
        for name in ("plain", "shuffle", MJP):
            if name in variants:
                naive, whole, visible = (
                    cell(variants[name][key], "dB") for key in ("naive", "adaptive", "adaptive_visible")
                )
                texts.append(
                    f"{data}, {name.replace('_', ' ')}: naive {naive}, adaptive {whole}, its visible patches {visible}"
                )
        whole, visible = (variants[MJP][key]["mean"] for key in ("adaptive", "adaptive_visible"))
        verdict = "does not hold" if whole > RECOVERED else "does not hold for the visible patches"
        verdicts[data] = verdict if visible > RECOVERED else "holds partly"
    return "; ".join(texts), together(verdicts)


def trained_large() -> tuple[str, str]:
    mjp = read("trained_deit_small_mjp")
    plain = read("trained_deit_small_plain")["attacks"]["closed_form"]["0"]["psnr"]
    texts = [f"{mjp['data']}, n = {plain['n']} photographs; plain, no mask: {cell(plain, 'dB')}"]
    ratios = [ratio for ratio in mjp["attacks"]["mjp_aware"] if float(ratio) > 0]
    for ratio in ratios:
        naive, known = (mjp["attacks"][name][ratio]["psnr_visible"] for name in ("closed_form", "mjp_aware"))
        texts.append(f"MJP at {ratio}, visible patches: naive {cell(naive, 'dB')}, adaptive {cell(known, 'dB')}")
    kept = [mjp["attacks"]["mjp_aware"][ratio]["psnr_visible"]["mean"] > RECOVERED for ratio in ratios]
    verdict = "does not hold for the visible patches" if all(kept) else "holds partly" if any(kept) else "holds"
    return "; ".join(texts), verdict


def matched() -> tuple[str, str]:
    found = read("trained_attacks")["attacks"]
    texts, best = [], {}
    for model in ("plain", "shuffle", MJP):
        mine = {name.split(": ")[1]: one for name, one in found.items() if name.startswith(f"{model}: ")}
        rows = {name: next(iter(ratios.values())) for name, ratios in mine.items()}
        shown = ", ".join(f"{name} {cell(row['psnr'], 'dB')}" for name, row in rows.items())
        texts.append(f"{model.replace('_', ' ')}: {shown}")
        matching = [row["psnr"]["mean"] for name, row in rows.items() if name not in ("closed_form", "mjp_aware")]
        best[model] = max(matching) - rows["closed_form"]["psnr_baseline"]["mean"]
    text = f"{read('trained_attacks')['data']}, original against reconstruction; " + "; ".join(texts)
    lost = all(gain < 0 for gain in best.values())
    return text, "does not hold at this length: all matching is below the mean colour" if lost else "holds partly"


def ranked() -> tuple[str, str]:
    contents = [read(file.stem) for file in sorted(FILES.glob("ats_*.json"))] or [read("ats_vit")]
    texts, verdicts = [], {}
    for found in contents:
        naive, aware = (found[f"privacy against {key}"] for key in ("psnr", "aware"))
        shown = [row["psnr_input"] for row in found["policies"]]
        values = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in (naive, aware)]
        texts.append(
            f"{found['setting']}: rank correlation of S_pri with the PSNR that is left {values[0]}, once the policy is "
            f"undone {values[1]}; positive is what the score promises. What the model saw comes back at "
            f"{statistics.fmean(shown):.1f} dB"
        )
        kept = [low > 0 for _, low, _ in (naive, aware)]
        verdicts[found["setting"]] = "holds" if all(kept) else "holds partly" if any(kept) else "not found"
    return "; ".join(texts), together(verdicts)


def ours() -> tuple[str, str]:
    rows = {row["defense"]: row for row in read("benchmark_small")}
    plain, rotary = rows["none"], rows["rotary"]
    attacked = rotary["adaptive"]
    text = f"digits, 20 epochs, one seed: accuracy {rotary['acc1']:.1f} %, plain {plain['acc1']:.1f} %; the strongest "
    text += f"attack, {attacked['attack']}, {attacked['psnr']:.1f} ± {attacked['std']:.1f} dB in place and "
    text += f"{attacked['psnr_patches']:.1f} in any order, mean colour {attacked['no_leak']:.1f}, n = {attacked['n']}"
    kept = max(attacked["psnr"], attacked["psnr_patches"]) < GONE
    return text, "not broken yet, which is no proof" if kept else "does not hold"


def not_the_reason() -> tuple[str, str]:
    rows = {row["defense"]: row for row in read("benchmark_small")}
    kinds, texts, open_ = ("withheld PE", "sinusoidal PE", "tied PE", "no PE", "rotary"), [], []
    for name in kinds:
        score = rows[name]["adaptive"]
        texts.append(f"{name} {score['psnr']:.1f} dB in place, {score['psnr_patches']:.1f} in any order")
        open_.append(score["psnr_patches"] > RECOVERED)
    text = f"digits, n = {rows['none']['adaptive']['n']}, strongest attack, mean over images: " + "; ".join(texts)
    return text, "does not hold" if all(open_) else "holds partly" if any(open_) else "holds"


def overhead() -> tuple[str, str]:
    (row,) = [row for row in read("training_step")["rows"] if ": MJP / timm" in row["what"]]
    low, high = row["quartiles"]
    text = f"{row['ratio']:.3f} of timm's plain step (quartiles {low:.3f}, {high:.3f}; {row['rounds']} rounds)"
    return text, "holds" if high <= 1.01 else "does not hold" if low > 1.01 else "no difference found, 1 % not resolved"


def flatter() -> tuple[str, str]:
    texts, verdicts = [], {}
    for data, variants in ablations("mjp_0.1", MJP).items():
        by_ratio = {float(name[4:]): found for name, found in variants.items() if name.startswith("mjp_")}
        by_ratio = dict(sorted((by_ratio | {0.5: variants[MJP]}).items()))
        texts += [
            f"{data}, trained at {ratio:g}: {cell(found['acc1_0'])} clean, {cell(found['acc1_0.9'])} at 0.9"
            for ratio, found in by_ratio.items()
        ]
        first, *_, last = by_ratio.values()
        verdicts[data] = better(last["acc1_0.9"], first["acc1_0.9"])
    return "; ".join(texts), together(verdicts)


ABLATION = "scripts/reproduce/ablation.sh"
TUNED, FINETUNE = "finetune*.json", "DATA=CIFAR10 scripts/reproduce/finetune.sh"
MECHANISM = "python scripts/mechanism.py --images datasets/photographs --output DIR"
MATCHING = "DATA=CIFAR10 scripts/reproduce/inverting_gradients.sh"
CURVE = "RATIOS='0 0.03 0.1 0.27 0.5' IMAGES=IMAGENET_SAMPLE scripts/reproduce/adaptive_curve.sh"
MJP, PLAIN = "unknown_nonlinear", "plain"
CLAIMS = {
    "How it works": [
        Claim("Permuting the masked patches is part of what MJP does (paper)", no_op, MECHANISM,
              "figures/mechanism.jpg; tests/training/test_training_step.py"),
        Claim("A masked step gives away where patches are hidden and what they hold (ours)", what_leaks, MECHANISM,
              "figures/mechanism.jpg; derivation in method.md"),
        Claim("Position embeddings make ViTs leak their images through gradients (paper)", leaks, CURVE,
              "figures/adaptive.jpg; derivation in method.md"),
        Claim("Without position embeddings the leak is smaller (paper)", layout, ABLATION),
        Claim("Learned position embeddings know rows and columns (paper)", positions_known, ABLATION),
        Claim("The localization loss makes them know more (paper)", lambda: compared(
              "position_error", MJP, "unknown", unit="patches", lower=True), ABLATION),
    ],
    "Accuracy, consistency, robustness": [
        Claim("Shuffling patches without hiding positions costs accuracy (paper)",
              lambda: compared("acc1_0", PLAIN, "shuffle"), ABLATION),
        Claim("MJP raises clean accuracy over the plain model (paper, ImageNet)",
              lambda: compared("acc1_0", MJP, PLAIN), ABLATION),
        Claim("MJP costs no clean accuracy, to within a point",
              lambda: compared("acc1_0", MJP, PLAIN, margin=1.0), ABLATION),
        Claim("MJP keeps accuracy on shuffled images (paper)",
              lambda: compared("acc1_0.5", MJP, PLAIN), ABLATION, "figures/demo.jpg"),
        Claim("MJP is more consistent under shuffling (paper)",
              lambda: compared("consistency_0.5", MJP, PLAIN), ABLATION, "figures/demo.jpg"),
        Claim("The unknown row is worth something beyond the shuffle, on shuffled images",
              lambda: compared("acc1_0.5", "unknown", "shuffle"), ABLATION),
        Claim("The localization loss is worth something beyond the unknown row (paper)",
              lambda: compared("acc1_0", MJP, "unknown"), ABLATION),
        Claim("A higher training ratio flattens the accuracy curve (paper, ImageNet)", flatter, ABLATION),
        Claim("In fine-tuning too, MJP costs no clean accuracy, to within a point",
              lambda: compared("acc1_0", MJP, PLAIN, margin=1.0, files=TUNED), FINETUNE, "training.md"),
        Claim("In fine-tuning too, MJP keeps accuracy on shuffled images",
              lambda: compared("acc1_0.9", MJP, PLAIN, files=TUNED), FINETUNE, "training.md"),
        Claim("In fine-tuning too, MJP is more consistent under shuffling",
              lambda: compared("consistency_0.9", MJP, PLAIN, files=TUNED), FINETUNE, "training.md"),
        Claim("MJP is more robust to corrupted images (paper, ImageNet-C)",
              lambda: compared("corrupted", MJP, PLAIN), ABLATION),
    ],
    "Privacy": [
        Claim("MJP protects against gradient attacks (paper): a naive attacker", naive_privacy, CURVE,
              "figures/adaptive.jpg"),
        Claim("MJP protects against gradient attacks: one who knows MJP", adaptive_privacy, CURVE,
              "figures/adaptive.jpg"),
        Claim("The same on trained weights at 32 px, mask ratio 0.5, attack `mjp_aware`", trained_privacy, ABLATION),
        Claim("The same on trained weights at 224 px", trained_large,
              "IMAGES=IMAGENET_SAMPLE scripts/reproduce/trained_deit_small.sh"),
        Claim("Gradient matching (APRIL, Inverting Gradients, GradViT) reconstructs trained ViTs (paper)", matched,
              "ITERATIONS=300 scripts/reproduce/trained_attacks.sh"),
        Claim("Inverting Gradients reconstructs photographs from untrained CNNs (paper)", lambda: reconstructs(read),
              MATCHING, "matching.md"),
        Claim("Position embeddings are the reason for the leak: without them in the tokens patches are safe (paper)",
              not_the_reason, "PLAN=small scripts/reproduce/benchmark.sh", "derivation in method.md"),
        Claim("Larger batches protect", lambda: batches(read),
              "python scripts/joint_study.py --study defenses --images DIR --output FILE", "derivation in method.md"),
        Claim("Adding clients up protects (secure aggregation)", lambda: aggregates(read),
              "python scripts/joint_study.py --study clients --images DIR --output FILE", "derivation in method.md"),
        Claim("The classifier's gradient gives features, logits and labels of every image away (ours)",
              lambda: classifier(read), "python scripts/class_features_study.py --images DIR --output FILE",
              "derivation in method.md"),
        Claim("Policies ranked by the score of ATS protect better than others (ATS paper)", ranked,
              "scripts/ats_question.py"),
        Claim("A policy of ATS hides what the model saw from an attack that works without it (ATS paper)",
              lambda: hides(read), MATCHING, "matching.md"),
        Claim("Our former candidate, rotary positions in place of a table, protects at no cost (ours)", ours,
              "PLAN=small scripts/reproduce/benchmark.sh", "figures/benchmark.png"),
    ],
    "Cost": [
        Claim("MJP adds no training time (at most 1 %)", overhead,
              "python -m benchmarks.training --only step --batch 4 --json FILE", "performance.md"),
    ],
}  # fmt: skip


def linked(text: str) -> str:
    """Return text whose pages and figures, named from docs/, are links."""
    return re.sub(r"[\w/]+\.(?:jpg|png|md)\b", lambda name: f"[{name[0]}]({name[0]})", text)


def claims(gaps: bool = False) -> str:
    """Return all claims as Markdown. gaps: a claim whose files are not there says so; otherwise that is a UserError."""
    lines, number = [], 0
    for heading, group in CLAIMS.items():
        lines += [f"### {heading}", ""]
        for claim in group:
            number += 1
            try:
                text, verdict = claim.evidence()
            except UserError as missing:
                if not gaps:
                    raise
                text, verdict = str(missing), "not run"
            shown = f" See also: {linked(claim.shown)}." if claim.shown else ""
            lines.append(
                f"{number}. **{claim.says}: {verdict}.** {text[0].upper()}{text[1:]}.{shown} (`{claim.command}`)"
            )
        lines.append("")
    return "\n".join(lines)
