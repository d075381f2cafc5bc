"""The paper's claims with our numbers and verdicts, from the files in docs/results: python scripts/results_page.py

Rewrites the part of docs/results.md between its two markers; --check only says whether it is up to date (exit status 1
if not). A difference between two trained models counts when it is more than twice its standard error over training
seeds; the verdicts are computed, and say "not decided" where that does not settle it. To refresh a number: run the
command under it, copy the .json it writes to docs/results, run this.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import UserError, run_command
from utils.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE, FILES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
MARKERS = ("<!-- claims: written by scripts/results_page.py -->", "<!-- end of claims -->")
RECOVERED, GONE = 25.0, 15.0  # dB: recognisable, and what the mean colour of an image gives


class Claim(NamedTuple):
    """says: of the paper, or ours; evidence() -> (our numbers, verdict); shown: where else it is proven or pictured."""

    says: str
    evidence: Callable[[], tuple[str, str]]
    command: str
    shown: str


@cache
def read(name: str) -> dict:
    file = FILES / f"{name}.json"
    if not file.is_file():
        raise UserError(f"'{file}' is missing: see the head of scripts/results_page.py for how it is made")
    return json.loads(file.read_text())


def of(variant: str, measure: str) -> dict:
    """{mean, std, values} of one measure of one variant of the ablation."""
    variants = read("ablation")["variants"]
    if variant not in variants:
        raise UserError(f"docs/results/ablation.json has no '{variant}': run {ABLATION} to its end")
    return variants[variant][measure]


def cell(found: dict, unit: str = "%") -> str:
    spread = "" if found["std"] is None else f" ± {found['std']:.1f}"
    return f"{found['mean']:.1f}{spread} {unit}"


def difference(one: dict, other: dict) -> tuple[float, float]:
    """(difference of the means, its standard error over seeds)."""
    errors = [found["std"] ** 2 / len(found["values"]) for found in (one, other)]
    return one["mean"] - other["mean"], math.sqrt(sum(errors))


def better(one: dict, other: dict, *, margin: float = 0.0) -> str:
    """Verdict on 'one is above other', or with a margin on 'one is not more than that below'."""
    gain, error = difference(one, other)
    if gain + margin > 2 * error:
        return "holds"
    return "does not hold" if gain + margin < -2 * error else "not decided at this scale"


def compared(measure: str, one: str, other: str, *, unit: str = "%", margin: float = 0.0) -> tuple[str, str]:
    first, second = of(one, measure), of(other, measure)
    gain, error = difference(first, second)
    one, other = (name.replace("_", " ") for name in (one, other))
    text = f"{one} {cell(first, unit)}, {other} {cell(second, unit)}: {gain:+.1f} ± {error:.1f} (standard error)"
    return text, better(first, second, margin=margin)


def attack(name: str, ratio: str, measure: str) -> dict:
    return read("attacks_deit_small")["attacks"][name][ratio][measure]


def leaks() -> tuple[str, str]:
    found = attack("closed_form", "0", "psnr")
    verdict = "holds" if found["mean"] > RECOVERED else "does not hold"
    return f"{cell(found, 'dB')} from one gradient, n = {found['n']} photographs", verdict


def layout() -> tuple[str, str]:
    plain, none = (of(name, "adaptive_visible") for name in ("plain", "no_positions"))
    text = f"with a table {cell(plain, 'dB')}, without any positions {cell(none, 'dB')}"
    verdict = "holds partly" if plain["mean"] > none["mean"] > GONE else better(plain, none)
    return text, f"{verdict}, against the span attack"


def naive_privacy() -> tuple[str, str]:
    before, after = attack("closed_form", "0", "psnr"), attack("closed_form", "0.27", "psnr_visible")
    text = f"naive attack at 0.27, visible patches: {cell(after, 'dB')}, unmasked {cell(before, 'dB')}"
    return text, "holds against this attacker" if after["mean"] < GONE else "does not hold"


def adaptive_privacy() -> tuple[str, str]:
    rows = [(ratio, attack("adaptive", ratio, "psnr_visible")) for ratio in ("0.03", "0.1", "0.27", "0.5")]
    masked = attack("adaptive", "0.27", "psnr_masked")
    text = "visible patches: " + ", ".join(f"{cell(found, 'dB')} at {ratio}" for ratio, found in rows)
    text += f"; masked ones at 0.27 {cell(masked, 'dB')}"
    kept = all(found["mean"] > RECOVERED for _, found in rows)
    return text, "does not hold for the visible patches" if kept else "holds partly"


def trained_privacy() -> tuple[str, str]:
    names = ("plain", "shuffle", "unknown_nonlinear")
    text = "; ".join(
        f"{name.replace('_', ' ')}: naive {cell(of(name, 'naive'), 'dB')}, adaptive {cell(of(name, 'adaptive'), 'dB')}"
        for name in names
    )
    left = of("unknown_nonlinear", "adaptive")["mean"]
    return text, "does not hold" if left > RECOVERED else "holds partly" if left > GONE else "holds"


def overhead() -> tuple[str, str]:
    (row,) = [row for row in read("training_step")["rows"] if ": MJP / timm" in row["what"]]
    low, high = row["quartiles"]
    text = f"{row['ratio']:.3f} of timm's plain step (quartiles {low:.3f}, {high:.3f}; {row['rounds']} rounds)"
    return text, "holds" if high <= 1.01 else "does not hold" if low > 1.01 else "no difference found, 1 % not resolved"


def flatter() -> tuple[str, str]:
    names = {float(name[4:]): name for name in read("ablation")["variants"] if name.startswith("mjp_")}
    names = dict(sorted((names | {0.5: "unknown_nonlinear"}).items()))
    text = "; ".join(
        f"trained at {ratio:g}: {cell(of(name, 'acc1_0'))} clean, {cell(of(name, 'acc1_0.9'))} at 0.9"
        for ratio, name in names.items()
    )
    repeated = [name for name in names.values() if len(of(name, "acc1_0.9")["values"]) > 1]
    return text, better(of(repeated[-1], "acc1_0.9"), of(repeated[0], "acc1_0.9"))


ABLATION = "scripts/reproduce/ablation.sh"
CURVE = "RATIOS='0 0.03 0.1 0.27 0.5' IMAGES=IMAGENET_SAMPLE scripts/reproduce/adaptive_curve.sh"
NO_OP = "logits and gradients with and without it agree to 1e-12 in float64: masked patches share one position vector, \
and the class token attends to a set. On a ViT, MJP is hiding positions at random plus the localization loss"
CLAIMS = [
    Claim("Under the unknown row, permuting the masked patches changes what a class-token ViT computes",
          lambda: (NO_OP, "does not hold"), "pytest tests/test_training_step.py", "method.md"),
    Claim("Position embeddings make ViTs leak their images through gradients (paper)", leaks, CURVE,
          "figures/adaptive.jpg; derivation in method.md"),
    Claim("Without position embeddings the leak is smaller (paper)", layout, ABLATION,
          ""),
    Claim("Shuffling patches without hiding positions costs accuracy (paper)",
          lambda: compared("acc1_0", "plain", "shuffle"), ABLATION, ""),
    Claim("MJP raises clean accuracy over the plain model (paper, ImageNet)",
          lambda: compared("acc1_0", "unknown_nonlinear", "plain"), ABLATION, ""),
    Claim("MJP costs no clean accuracy, to within a point", lambda: compared(
          "acc1_0", "unknown_nonlinear", "plain", margin=1.0), ABLATION, ""),
    Claim("MJP keeps accuracy on shuffled images (paper)",
          lambda: compared("acc1_0.5", "unknown_nonlinear", "plain"), ABLATION, "figures/demo.jpg"),
    Claim("MJP is more consistent under shuffling (paper)",
          lambda: compared("consistency_0.5", "unknown_nonlinear", "plain"), ABLATION, "figures/demo.jpg"),
    Claim("The unknown row is worth something beyond the shuffle, on shuffled images",
          lambda: compared("acc1_0.5", "unknown", "shuffle"), ABLATION, ""),
    Claim("The localization loss is worth something beyond the unknown row (paper)",
          lambda: compared("acc1_0", "unknown_nonlinear", "unknown"), ABLATION, ""),
    Claim("A higher training ratio flattens the accuracy curve (paper, ImageNet)", flatter, ABLATION, ""),
    Claim("MJP protects against gradient attacks (paper): a naive attacker", naive_privacy, CURVE,
          "figures/adaptive.jpg"),
    Claim("MJP protects against gradient attacks: one who knows MJP", adaptive_privacy, CURVE, "figures/adaptive.jpg"),
    Claim("The same on trained weights, digits of 32 px", trained_privacy, ABLATION, ""),
    Claim("MJP adds no training time (at most 1 %)", overhead,
          "python -m benchmarks.training --only step --batch 4 --json FILE", "performance.md"),
]  # fmt: skip


def page() -> str:
    lines = [MARKERS[0], ""]
    for number, claim in enumerate(CLAIMS, 1):
        text, verdict = claim.evidence()
        shown = f" See {claim.shown}." if claim.shown else ""
        lines += [f"{number}. **{claim.says}: {verdict}.** {text[0].upper()}{text[1:]}.{shown} (`{claim.command}`)"]
    return "\n".join([*lines, "", MARKERS[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if docs/results.md is out of date")
    given = parser.parse_args()
    before = PAGE.read_text()
    head, start, rest = before.partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    if not (start and end):
        raise UserError(f"'{PAGE}' has lost the markers between which the claims stand: restore them")
    after = head + page() + tail
    if given.check:
        print("up to date" if after == before else "docs/results.md is out of date: python scripts/results_page.py")
        sys.exit(after != before)
    write_text(PAGE, after)
    print(page())


if __name__ == "__main__":
    run_command(main)
