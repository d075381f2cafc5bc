"""Claims about batches, aggregates and classifiers, from files that joint_study.py and class_features_study.py write.

Each function takes the reader of a file in docs/results and returns an Evidence, for results_page.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from claim_numbers import Evidence, Reader, bracketed

RECOVERED = 25.0  # dB


def _cell(found: dict) -> str:
    spread = "" if found["std"] is None else f" ± {found['std']:.1f}"
    return f"{found['mean']:.1f}{spread}"


def batches(read: Reader) -> Evidence:
    """Return what joint makes of batches in float64, below its bound and above."""
    cells = read("joint_defenses")["cells"]
    texts, low = [], []
    for number in (2, 4, 5):
        naive, joint = (cells[f"batch of {number} | float64 | {who}"]["psnr_patches"] for who in ("naive", "joint"))
        texts.append(f"{number} images: closed_form {_cell(naive)} dB, joint {_cell(joint)} dB, n = {joint['n']}")
        low.append(joint["mean"])
    beyond = "why" in cells["batch of 8 | float64 | joint"]
    text = "float64, random ViT of D = 192 and 16 patches; " + "; ".join(texts) + "; 8 images: refused" * beyond
    verdict = "does not hold below the bound of joint" if min(low) > RECOVERED else "holds"
    return Evidence(text, verdict, f"5 images: {bracketed(joint)}", f"{joint['n']} images")


def aggregates(read: Reader) -> Evidence:
    """Return what joint makes of the mean over clients, of one step and after local steps."""
    cells = read("joint_clients")["cells"]
    one = {number: cells[f"clients {number} | steps 1"]["psnr_patches"] for number in (2, 3)}
    steps = {number: cells[f"clients {number} | steps 2 | rate 1e-05"]["psnr_patches"] for number in (2, 3)}
    text = "float64, one image a client; " + "; ".join(
        f"{number} clients: one step {_cell(one[number])} dB, two steps of rate 1e-5 {_cell(steps[number])} dB, "
        f"n = {one[number]['n']}"
        for number in one
    )
    open_ = min(found["mean"] for found in one.values()) > RECOVERED
    verdict = "does not hold for few clients and one step each" if open_ else "holds"
    return Evidence(text, verdict, f"3 clients: {bracketed(one[3])}", f"{one[3]['n']} images")


def classifier(read: Reader) -> Evidence:
    """Return of how many images the classifier's gradient gives features and labels away."""
    cases = read("class_features")["cases"]
    names = (
        "random head",
        "random head, four of each label",
        "trained head, others, 64",
        "trained head, its photographs",
        "random head times 100, 64",
        "trained head, its photographs, 64",
    )
    texts = [
        f"{name}: {_cell(cases[name]['found'])} of {cases[name]['images']} (n = {cases[name]['batches']})"
        for name in names
    ]
    false = sum(case["false"] for case in cases.values())
    holds = cases["random head"]["complete"] == cases["random head"]["batches"]
    text = f"192 features, 1000 classes, batches; {'; '.join(texts)}; false ones in all cases: {false}"
    verdict = "holds, but for confident heads" if holds and not false else "holds in part"
    return Evidence(text, verdict, f"64 of 64, false ones {false}", f"{cases['random head']['batches']} batches")
