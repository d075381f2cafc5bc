"""The paper's claims and ours, each with the function that computes its numbers and verdict from docs/results.

The verdicts are computed, with intervals of 95 % (scripts/claim_numbers.py), and say "not decided" where these do not
settle it. docs/claims.md has the deciding number of each, docs/claims_details.md all of them.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dispute_claims as dispute
from claim_numbers import Evidence, better, bracketed, cell, counted, difference, ends, gained, share, together
from inverting_gradients_table import hides, reconstructs
from joint_claims import aggregates, batches, classifier

from utils.errors import UserError

FILES = Path(__file__).resolve().parents[1] / "docs" / "results"
RECOVERED, GONE = 25.0, 15.0  # dB: recognisable, and what the mean colour of an image gives
RANKED = 0.5  # rank correlation below which a score hardly orders policies
RATIOS = ("0.03", "0.1", "0.27", "0.5")


class Claim(NamedTuple):
    """says: of a paper, or ours; command: makes the numbers; shown: where it is proven or pictured."""

    says: str
    evidence: Callable[[], Evidence]
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
    """Return {data: variants} of every ablation at hand that has the needed variants; a claim names them all."""
    contents = [read(file.stem) for file in sorted(FILES.glob(files))]
    found = {content["data"]: content["variants"] for content in contents if content["variants"].keys() >= {*needed}}
    if not found:
        raise UserError(f"no {files} in '{FILES}' has {', '.join(needed)}: run {ABLATION} to its end")
    return found


def compared(
    measure: str,
    one: str,
    other: str,
    *,
    unit: str = "%",
    margin: float = 0.0,
    lower: bool = False,
    files: str = "ablation*.json",
) -> Evidence:
    """Return the evidence for 'one is above other' in every ablation that has both; lower: below."""
    texts, verdicts, numbers, seeds = [], {}, [], []
    names = [name.replace("_", " ") for name in (one, other)]
    for data, variants in ablations(one, other, files=files).items():
        first, second = (variants[name][measure] for name in (one, other))
        gain, half = difference(first, second)
        texts.append(
            f"{data}: {names[0]} {cell(first, unit)}, {names[1]} {cell(second, unit)}, {gained(gain, half, unit)}"
            + ("" if math.isfinite(half) else " (one seed)")
        )
        numbers.append(f"{data.split(',')[0]}: {gained(gain, half, unit)}")
        seeds.append(len(first["values"]))
        verdicts[data] = better(second, first) if lower else better(first, second, margin=margin)
    return Evidence("; ".join(texts), together(verdicts), "; ".join(numbers), counted(seeds, "seeds"))


def attack(name: str, ratio: str, measure: str) -> dict:
    return read("attacks_deit_small")["attacks"][name][ratio][measure]


def no_op() -> Evidence:
    found = read("mechanism")["summary"]
    hidden, plain = (found[key]["mean"] for key in ("order_change", "naive_order_change"))
    text = f"permuting the masked patches once more changes the gradient by {hidden:.0e} of its size (float64 "
    text += f"rounding), by {plain:.0e} without the unknown row, n = {found['masked']['n']} photographs. Masked "
    text += "patches share one position vector and the class token attends to a set: on a ViT, MJP is hiding positions "
    text += "at random plus the localization loss"
    return Evidence(
        text, "does not hold" if hidden < 1e-10 else "holds", f"{hidden:.0e} of the gradient", _images(found)
    )


def _images(summary: dict) -> str:
    return f"{summary['masked']['n']} images"


def what_leaks() -> Evidence:
    found, ratio = read("mechanism")["summary"], read("mechanism")["ratio"]
    rows = read("mechanism")["images"]
    solved = sum(row["psnr_masked"] > RECOVERED for row in rows)
    read_off = sum(row["mask_right"] for row in rows)
    text = f"at {ratio}, float64: the zero rows of the position gradient name the masked places in {read_off:.0f} of "
    text += f"{len(rows)} images; visible patches {cell(found['psnr_visible'], 'dB')}, masked ones as a set "
    text += f"{cell(found['psnr_masked'], 'dB')}, above {RECOVERED:.0f} dB in {solved} of {len(rows)}; "
    text += f"their order, {found['order_bits']['mean']:.0f} bits an image, is in no gradient"
    verdict = "holds" if read_off == len(rows) and solved == len(rows) else "holds partly"
    return Evidence(text, verdict, f"{share(solved, len(rows))}", _images(found))


def leaks() -> Evidence:
    found = attack("closed_form", "0", "psnr")
    verdict = (
        "holds" if ends(found)[0] > RECOVERED else "not decided" if ends(found)[1] > RECOVERED else "does not hold"
    )
    text = f"{cell(found, 'dB')} from one gradient, n = {found['n']} photographs"
    return Evidence(text, verdict, bracketed(found), f"{found['n']} images")


def layout() -> Evidence:
    texts, verdicts, numbers = [], {}, []
    for data, variants in ablations("plain", "no_positions").items():
        plain, none = (variants[name]["adaptive_visible"] for name in ("plain", "no_positions"))
        texts.append(f"{data}: with a table {cell(plain, 'dB')}, without any positions {cell(none, 'dB')}")
        numbers.append(f"{data.split(',')[0]}: {gained(*difference(none, plain), 'dB')}")
        verdicts[data] = "holds partly" if plain["mean"] > none["mean"] > GONE else better(plain, none)
    verdict = f"{together(verdicts)}, against linear attacks alone"
    return Evidence("; ".join(texts), verdict, "; ".join(numbers), f"{len(plain['values'])} seeds")


def positions_known() -> Evidence:
    texts, verdicts, numbers = [], {}, []
    for data, variants in ablations("plain").items():
        found, chance = (variants["plain"][key] for key in ("position_error", "position_chance"))
        texts.append(
            f"{data}: error {cell(found, 'patches')} of a linear probe on row and column, chance {chance['mean']:.1f}"
        )
        numbers.append(f"{data.split(',')[0]}: {gained(*difference(found, chance), 'patches')}")
        verdicts[data] = better(chance, found)
    return Evidence("; ".join(texts), together(verdicts), "; ".join(numbers), f"{len(found['values'])} seeds")


def naive_privacy() -> Evidence:
    before, after = attack("closed_form", "0", "psnr"), attack("closed_form", "0.27", "psnr_visible")
    text = f"naive attack at 0.27, visible patches: {cell(after, 'dB')}, unmasked {cell(before, 'dB')}"
    low, high = ends(after)
    verdict = "does not hold" if low > GONE else "not decided at this n"
    verdict = "holds against this attacker" if high < GONE else verdict
    return Evidence(text, verdict, f"{bracketed(after)}, visible patches", f"{after['n']} images")


def adaptive_privacy() -> Evidence:
    rows = [(ratio, attack("mjp_aware", ratio, "psnr_visible")) for ratio in RATIOS]
    masked = attack("mjp_aware", "0.27", "psnr_masked")
    text = "visible patches: " + ", ".join(f"{cell(found, 'dB')} at {ratio}" for ratio, found in rows)
    text += f"; masked ones at 0.27 {cell(masked, 'dB')}"
    kept, may_be = (all(ends(found)[end] > RECOVERED for _, found in rows) for end in (0, 1))
    verdict = "does not hold for the visible patches" if kept else "not decided at this n" if may_be else "holds partly"
    middle = dict(rows)["0.27"]
    return Evidence(text, verdict, f"{bracketed(middle)}, visible patches", f"{middle['n']} images")


def trained_privacy() -> Evidence:
    texts, verdicts, numbers = [], {}, []
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
        found = variants[MJP]["adaptive_visible"]
        numbers.append(f"{data.split(',')[0]}: {bracketed(found | {'n': len(found['values'])})}")
    return Evidence("; ".join(texts), together(verdicts), "; ".join(numbers), f"{len(found['values'])} seeds")


def trained_large() -> Evidence:
    mjp = read("trained_deit_small_mjp")
    plain = read("trained_deit_small_plain")["attacks"]["closed_form"]["0"]["psnr"]
    texts = [f"{mjp['data']}, n = {plain['n']} photographs; plain, no mask: {cell(plain, 'dB')}"]
    ratios = [ratio for ratio in mjp["attacks"]["mjp_aware"] if float(ratio) > 0]
    for ratio in ratios:
        naive, known = (mjp["attacks"][name][ratio]["psnr_visible"] for name in ("closed_form", "mjp_aware"))
        texts.append(f"MJP at {ratio}, visible patches: naive {cell(naive, 'dB')}, adaptive {cell(known, 'dB')}")
    kept = [mjp["attacks"]["mjp_aware"][ratio]["psnr_visible"]["mean"] > RECOVERED for ratio in ratios]
    verdict = "does not hold for the visible patches" if all(kept) else "holds partly" if any(kept) else "holds"
    found = mjp["attacks"]["mjp_aware"]["0.27"]["psnr_visible"]
    return Evidence("; ".join(texts), verdict, f"{bracketed(found)}, visible patches", f"{found['n']} images")


def matched() -> Evidence:
    found = read("trained_attacks")["attacks"]
    texts, best = [], {}
    for model in ("plain", "shuffle", MJP):
        mine = {name.split(": ")[1]: one for name, one in found.items() if name.startswith(f"{model}: ")}
        rows = {name: next(iter(ratios.values())) for name, ratios in mine.items()}
        shown = ", ".join(f"{name} {cell(row['psnr'], 'dB')}" for name, row in rows.items())
        texts.append(f"{model.replace('_', ' ')}: {shown}")
        matching = [row["psnr"] for name, row in rows.items() if name not in ("closed_form", "mjp_aware")]
        best[model] = max(matching, key=lambda found: found["mean"])
        level = rows["closed_form"]["psnr_baseline"]["mean"]
    text = f"{read('trained_attacks')['data']}, original against reconstruction; " + "; ".join(texts)
    lost = all(ends(found)[1] < level for found in best.values())
    verdict = "does not hold at this length: all matching is below the mean colour" if lost else "holds partly"
    number = f"at most {bracketed(best['plain'])}, mean colour {level:.1f}"
    return Evidence(text, verdict, number, f"{best['plain']['n']} images")


RANKINGS = tuple(f"privacy against {key}" for key in ("psnr_input", "psnr", "aware"))


def ranking(found: dict) -> str:
    """Return the verdict of one file of scripts/ats_question.py on 'a low S_pri leaves less of the picture'."""
    intervals = [found[key][1:] for key in RANKINGS]
    if all(low > 0 for low, _ in intervals):
        return "holds"
    if any(low > 0 for low, _ in intervals):
        return "holds partly"
    works = found["none"]["psnr"]["mean"] > found["none"]["psnr_baseline"]["mean"]  # else policies have nothing to hide
    weak = all(high < RANKED for _, high in intervals)
    return f"does not hold: {RANKED:g} is excluded" if works and weak else "not decided"


def ranked() -> Evidence:
    """Return the evidence on the rank correlation of S_pri with the PSNR to what the model saw, as in the paper, to the
    original, and to the original once the policy is undone."""
    contents = [read(file.stem) for file in sorted(FILES.glob("ats_*.json"))] or [read("ats_vit")]
    texts, numbers = [], []
    for found in contents:
        values = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in (found[key] for key in RANKINGS)]
        shown = statistics.fmean(row["psnr_input"] for row in found["policies"])
        plain, grey = (found["none"][key]["mean"] for key in ("psnr", "psnr_baseline"))
        texts.append(
            f"{found['setting']}: rank correlation of S_pri with the PSNR to what the model saw {values[0]}, to the "
            f"original {values[1]}, once the policy is undone {values[2]}; positive is what the score promises. What "
            f"the model saw comes back at {shown:.1f} dB, without a policy at {plain:.1f}, mean colour {grey:.1f}"
        )
        numbers.append(f"{found['setting'].split(',')[0]}: rank correlation {values[0]}")
    verdict = together({found["setting"]: ranking(found) for found in contents})
    policies = ", ".join(str(len(found["policies"])) for found in contents)
    return Evidence("; ".join(texts), verdict, "; ".join(numbers), f"{policies} policies")


def ours() -> Evidence:
    rows = {row["defense"]: row for row in read("benchmark_small")}
    plain, rotary = rows["none"], rows["rotary"]
    attacked = rotary["adaptive"]
    text = f"digits, 20 epochs, one seed: accuracy {rotary['acc1']:.1f} %, plain {plain['acc1']:.1f} %; the strongest "
    text += f"attack, {attacked['attack']}, {attacked['psnr']:.1f} ± {attacked['std']:.1f} dB in place and "
    text += f"{attacked['psnr_patches']:.1f} in any order, mean colour {attacked['no_leak']:.1f}, n = {attacked['n']}"
    kept = max(attacked["psnr"], attacked["psnr_patches"]) < GONE
    verdict = "not broken yet, which is no proof" if kept else "does not hold"
    found = {"mean": attacked["psnr"], "std": attacked["std"], "n": attacked["n"]}
    return Evidence(text, verdict, bracketed(found), f"{attacked['n']} images")


def not_the_reason() -> Evidence:
    rows = {row["defense"]: row for row in read("benchmark_small")}
    kinds, texts, open_ = ("withheld PE", "sinusoidal PE", "tied PE", "no PE", "rotary"), [], []
    for name in kinds:
        score = rows[name]["adaptive"]
        texts.append(f"{name} {score['psnr']:.1f} dB in place, {score['psnr_patches']:.1f} in any order")
        open_.append(score["psnr_patches"] > RECOVERED)
    text = f"digits, n = {rows['none']['adaptive']['n']}, strongest attack, mean over images: " + "; ".join(texts)
    verdict = "does not hold" if all(open_) else "holds partly" if any(open_) else "holds"
    number = f"any order: {min(rows[name]['adaptive']['psnr_patches'] for name in kinds):.1f} dB or more"
    return Evidence(text, verdict, number, f"{rows['none']['adaptive']['n']} images")


def overhead() -> Evidence:
    (row,) = [row for row in read("training_step")["rows"] if ": MJP / timm" in row["what"]]
    low, high = row["quartiles"]
    text = f"{row['ratio']:.3f} of timm's plain step (quartiles {low:.3f}, {high:.3f}; {row['rounds']} rounds)"
    verdict = "holds" if high <= 1.01 else "does not hold" if low > 1.01 else "no difference found, 1 % not resolved"
    return Evidence(text, verdict, f"{row['ratio']:.3f} (quartiles {low:.3f}, {high:.3f})", f"{row['rounds']} rounds")


def flatter() -> Evidence:
    texts, verdicts, numbers = [], {}, []
    for data, variants in ablations("mjp_0.1", MJP).items():
        by_ratio = {float(name[4:]): found for name, found in variants.items() if name.startswith("mjp_")}
        by_ratio = dict(sorted((by_ratio | {0.5: variants[MJP]}).items()))
        texts += [
            f"{data}, trained at {ratio:g}: {cell(found['acc1_0'])} clean, {cell(found['acc1_0.9'])} at 0.9"
            for ratio, found in by_ratio.items()
        ]
        first, *_, last = by_ratio.values()
        verdicts[data] = better(last["acc1_0.9"], first["acc1_0.9"])
        gain = gained(*difference(last["acc1_0.9"], first["acc1_0.9"]))
        numbers.append(f"{data.split(',')[0]}: {gain} at ratio 0.9, trained at 0.9 against 0.1")
        seeds = len(last["acc1_0.9"]["values"])
    return Evidence("; ".join(texts), together(verdicts), "; ".join(numbers), f"{seeds} seeds")


ABLATION = "scripts/reproduce/ablation.sh"
TUNED, FINETUNE = "finetune*.json", "DATA=CIFAR10 scripts/reproduce/finetune.sh"
MECHANISM = "python scripts/mechanism.py --images datasets/photographs --output DIR"
MATCHING = "DATA=CIFAR10 scripts/reproduce/inverting_gradients.sh"
CURVE = "RATIOS='0 0.03 0.1 0.27 0.5' IMAGES=IMAGENET_SAMPLE/val scripts/reproduce/adaptive_curve.sh"
DECIDE, BENCH = "PLAN=decide scripts/reproduce/benchmark.sh --lpips alex", "benchmark.md"
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
              "IMAGES=IMAGENET_SAMPLE/val scripts/reproduce/trained_deit_small.sh"),
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
    "The dispute: do gradients of ViTs give images away?": [  # the papers: scripts/dispute_claims.py
        Claim("Modern models resist an honest server (arXiv 2508.19819)", lambda: dispute.resist(read), DECIDE, BENCH),
        Claim("Successes rest on inference mode (arXiv 2508.19819)", lambda: dispute.inference_mode(read),
              DECIDE, BENCH),
        Claim("Trained models leak less (SoK, arXiv 2404.05403)", lambda: dispute.weights(read), DECIDE, BENCH),
        Claim("Local steps protect (SoK)", lambda: dispute.local_steps(read), DECIDE, BENCH),
        Claim("Simple post-processing, to 16 or 8 bits, protects (SoK)", lambda: dispute.post_processing(read),
              DECIDE, BENCH),
        Claim("Images come back from large batches too (FedLeak, arXiv 2506.08435)",
              lambda: dispute.large_batches(read), DECIDE, BENCH),
        Claim("What our attacks certify is so (ours)", lambda: dispute.claims_hold(read), DECIDE, BENCH),
    ],
    "Cost": [
        Claim("MJP adds no training time (at most 1 %)", overhead,
              "python -m benchmarks.training --only step --batch 4 --json FILE", "performance.md"),
    ],
}  # fmt: skip
