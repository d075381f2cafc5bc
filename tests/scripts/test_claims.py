"""The claims page: intervals of its numbers, verdicts that follow from them, one line and one command a claim."""

from pathlib import Path

import pytest
from scipy.stats import ttest_ind

from scripts import dispute_claims as dispute
from scripts import results_page as page
from scripts.claim_numbers import better, counted, difference, ends, share
from utils.errors import UserError


def over_seeds(*values: float) -> dict:
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "std": std, "values": list(values), "n": len(values)}


def test_differences_have_welchs_interval_and_means_students():
    one, other = (90.0, 92.0, 95.0), (80.0, 81.0, 86.0)
    gain, half = difference(over_seeds(*one), over_seeds(*other))
    told = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert gain - half == pytest.approx(told.low) and gain + half == pytest.approx(told.high)
    assert better(over_seeds(*one), over_seeds(*other)) == "holds"
    assert better(over_seeds(90.0), over_seeds(10.0)) == "not decided at this scale"  # one seed has no spread
    assert ends({"mean": 2.0, "std": 1.0, "n": 3})[1] == pytest.approx(2 + 4.302653 / 3**0.5)
    assert (
        share(0, 4) == "0 of 4 [0, 60] %"
        and counted([3, 3], "seeds") == "3 seeds"
        and counted([1], "seeds") == "1 seed"
    )


def row(model: str, condition: str, psnr: float, certified: int, n: int = 4, wrong: int = 0) -> dict:
    score = {"attack": "a", "n": n, "certified": certified, "wrong_claims": wrong}
    score["psnr_any_order"] = {"mean": psnr, "std": 1.0, "n": n}
    return {"model": model, "defense": condition, "adaptive": score, "naive": score, "attacks": {"a": score}}


def reader(*rows: dict, outside: int = 0):
    mixtures = {"batches": {"greys": [{"certified": 9, "overclaimed": outside}]}}
    return lambda name: mixtures if name == "joint_mixtures" else list(rows)


@pytest.mark.parametrize(
    "psnr, certified, verdict",
    [(90.0, 4, "does not hold"), (40.0, 0, "does not hold"), (8.0, 0, "holds for a trained ViT")],
)
def test_a_model_resists_where_nothing_is_readable(psnr, certified, verdict):
    rows = (row(dispute.TRAINED, name, psnr, certified) for name in ("base", "training mode"))
    found = dispute.resist(reader(*rows))
    assert found.verdict == verdict and found.n == "8 images"
    assert f"{2 * certified} of 8" in found.number or "none certified" in found.number


def test_the_dispute_is_decided_by_intervals_and_missing_conditions_are_named():
    trained = [row(dispute.TRAINED, name, 120.0, 4) for name in ("base", "float16")]
    for psnr, verdict in ((90.0, "does not hold"), (120.5, "not decided"), (150.0, "holds")):
        random = [row("vit_s14_random", name, psnr, 4) for name in ("base", "float16")]
        assert dispute.weights(reader(*trained, *random)).verdict == verdict
    batches = [row(dispute.TRAINED, f"batch {number}", 9.0, 0) for number in (4, 8, 16)]
    server = row(dispute.SMALL, "malicious server, batch 16", 90.0, 12, n=16)
    assert dispute.large_batches(reader(*batches, server)).verdict == "not confirmed by any attack here"
    for wrong, outside, verdict in ((0, 0, "holds"), (1, 0, "does not hold"), (0, 1, "does not hold")):
        read = reader(*trained, row("x", "y", 30.0, 4, wrong=wrong), outside=outside)
        assert dispute.claims_hold(read).verdict == verdict
    with pytest.raises(UserError, match="has no batch 16 of vit_s14_trained: run PLAN=decide"):
        dispute.large_batches(reader(*batches[:2], server))


def test_every_claim_is_one_line_with_a_script_that_exists():
    lines = [line for line in page.verdicts().splitlines() if line.startswith("| [")]
    claims = [claim for group in page.evidence.CLAIMS.values() for claim in group]
    assert len(lines) == len(claims) and all(line.count("|") == 7 for line in lines)
    details = Path("docs/claims_details.md").read_text()
    for line, claim in zip(lines, claims, strict=True):
        assert f"`{page.script_of(claim.command)}`" in line
        script = page.script_of(claim.command).split()[-1]
        assert list(Path("scripts").rglob(script)) or Path(script.replace(".", "/") + ".py").exists()
        assert f"**{claim.says}: " in details


@pytest.mark.parametrize(
    ("low", "high", "plain", "verdict"),
    [(0.1, 0.9, 20.0, "holds"), (-0.3, 0.2, 20.0, "does not hold: 0.5 is excluded"), (-0.3, 0.6, 20.0, "not decided"),
     (-0.3, 0.2, 12.0, "not decided")],
)  # fmt: skip
def test_the_score_of_ats_is_judged_where_the_attack_works(low, high, plain, verdict):
    none = {"psnr": {"mean": plain}, "psnr_baseline": {"mean": 14.0}}
    ranking, rankings = page.evidence.ranking, page.evidence.RANKINGS
    assert ranking({"none": none} | {key: [0.0, low, high] for key in rankings}) == verdict


@pytest.mark.parametrize(
    "naive, aware, verdicts",
    [
        (11.0, 35.0, ("holds against this attacker", "does not hold for the visible patches")),
        (14.5, 25.5, ("not decided at this n", "not decided at this n")),
        (20.0, 20.0, ("does not hold", "holds partly")),
    ],
)
def test_an_interval_across_the_level_decides_nothing_about_privacy(naive, aware, verdicts, monkeypatch):
    """Of six photographs the naive attack once had 13.5 +- 4.1 dB, the level is 15: neither side."""
    means = {"closed_form": naive, "mjp_aware": aware}
    monkeypatch.setattr(page.evidence, "attack", lambda name, *_: {"mean": means[name], "std": 1.0, "n": 6})
    assert (page.evidence.naive_privacy().verdict, page.evidence.adaptive_privacy().verdict) == verdicts
