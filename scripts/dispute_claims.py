"""Claims of the dispute about gradient inversion, decided for ViTs by the conditions of the benchmark that decides.

The SoK (Du et al., arXiv 2404.05403) finds the attacks limited under practical local training, sensitive to the trained
model and stopped by simple post-processing; Valadi et al. (arXiv 2508.19819) that modern models resist, and successes
rest on inference mode; FedLeak (Fan et al., arXiv 2506.08435) that data come back in realistic settings, large batches
included. Each function takes the reader of a file in docs/results and returns an Evidence. Images count as recovered
where the attack's own equations certify them; a PSNR above RECOVERED dB is called readable.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from claim_numbers import Evidence, Reader, bracketed, cell, ends, share

from utils.errors import UserError

FILE, TRAINED, SMALL = "benchmark_decide", "vit_s14_trained", "vit96_random"
RECOVERED = 25.0  # dB


def rows_of(read: Reader, *conditions: str, model: str) -> list[dict]:
    """Return the rows of these conditions. Raises UserError where one was not run."""
    found = {row["defense"]: row for row in read(FILE) if row["model"] == model}
    if absent := [name for name in conditions if name not in found]:
        raise UserError(f"{FILE}.json has no {', '.join(absent)} of {model}: run PLAN=decide to its end")
    return [found[name] for name in conditions]


def told(row: dict, who: str = "adaptive") -> str:
    """Return what an attacker got of a condition, in words."""
    score = row[who]
    certified = f"{score['certified']} of {score['n']} images certified"
    return f"{row['defense']} ({row['model']}): {certified}, {cell(score['psnr_any_order'], 'dB')}"


def certified(row: dict, who: str = "adaptive") -> str:
    return share(row[who]["certified"], row[who]["n"])


def against(rows: list[dict], conditions: str) -> Evidence:
    """Return the evidence on 'these conditions protect', by the images of the adaptive attacker in all of `rows`."""
    hits, n = (sum(row["adaptive"][key] for row in rows) for key in ("certified", "n"))
    readable = [ends(row["adaptive"]["psnr_any_order"])[0] > RECOVERED for row in rows]
    verdict = "does not hold" if all(readable) else "holds partly" if any(readable) else f"holds for {conditions}"
    number = f"{share(hits, n)} certified"
    if not hits and any(readable):
        number = f"{bracketed(rows[0]['adaptive']['psnr_any_order'])}, none certified"
    return Evidence("; ".join(map(told, rows)), verdict, number, f"{n} images")


def resist(read: Reader) -> Evidence:
    """Return whether a trained ViT-S/14 resists: one image, in evaluation and in training mode."""
    return against(rows_of(read, "base", "training mode", model=TRAINED), "a trained ViT")


def inference_mode(read: Reader) -> Evidence:
    """Return what training mode changes."""
    rows = rows_of(read, "base", "training mode", model=TRAINED) + rows_of(read, "base", "training mode", model=SMALL)
    base, trained = (sum(row["adaptive"]["certified"] for row in rows[place::2]) for place in (0, 1))
    n = sum(row["adaptive"]["n"] for row in rows[1::2])
    verdict = "does not hold" if trained == base == n else "holds partly" if trained else "holds"
    text = "; ".join(map(told, rows)) + "; dropped blocks, whose seed the attacker is told"
    return Evidence(text, verdict, f"{share(trained, n)} certified in training mode", f"{n} images")


def weights(read: Reader) -> Evidence:
    """Return whether trained weights leak less than random ones of the same network."""
    trained, random = (rows_of(read, "base", "float16", model=model) for model in (TRAINED, "vit_s14_random"))
    pairs = [[row["adaptive"]["psnr_any_order"] for row in pair] for pair in zip(trained, random, strict=True)]
    less = all(ends(one)[1] < ends(other)[0] for one, other in pairs)
    more = any(ends(one)[0] > ends(other)[1] for one, other in pairs)
    verdict = "holds" if less else "does not hold" if more else "not decided"
    one, other = pairs[1]
    number = f"float16: trained {bracketed(one)}, random {bracketed(other)}"
    return Evidence("; ".join(map(told, trained + random)), verdict, number, f"{one['n']} images each")


def local_steps(read: Reader) -> Evidence:
    """Return whether local steps protect one image."""
    return against(rows_of(read, "2 local steps", "5 local steps", model=TRAINED), "one image and few steps")


def post_processing(read: Reader) -> Evidence:
    """Return whether sharing 16 or 8 bits an entry stops the attacks."""
    names = ("float16", "bfloat16", "int8")
    rows = rows_of(read, *names, model=TRAINED)
    found = against(rows, "all of them")
    open_ = [row["defense"] for row in rows if ends(row["adaptive"]["psnr_any_order"])[0] > RECOVERED]
    verdict = f"does not hold for {', '.join(open_)}" if open_ else "holds: nothing is readable"
    return found._replace(verdict=verdict)


def large_batches(read: Reader) -> Evidence:
    """Return whether images of batches of 4 to 16 come back from an honest server's gradient."""
    rows = rows_of(read, "batch 4", "batch 8", "batch 16", model=TRAINED)
    hits, n = (sum(row["adaptive"][key] for row in rows) for key in ("certified", "n"))
    best = max(ends(row["adaptive"]["psnr_any_order"])[1] for row in rows)
    verdict = "not confirmed by any attack here" if best < RECOVERED and not hits else "holds partly"
    (server,) = rows_of(read, "malicious server, batch 16", model=SMALL)
    text = (
        "; ".join(map(told, rows)) + f"; FedLeak's own code was not run. {told(server)}, where the server plants bins"
    )
    return Evidence(text, verdict, f"{share(hits, n)} certified, honest server", f"{n} images")


def claims_hold(read: Reader) -> Evidence:
    """Return how many certificates of the whole benchmark, and of pictures made for mixtures, were wrong."""
    scores = [score for row in read(FILE) for score in row["attacks"].values()]
    wrong, made = (sum(score[key] for score in scores) for key in ("wrong_claims", "certified"))
    mixed = [row for rows in read("joint_mixtures")["batches"].values() for row in rows]
    patches, outside = (sum(row[key] for row in mixed) for key in ("certified", "overclaimed"))
    text = (
        f"{made} images certified by all attacks in all conditions, {wrong} of them further off than 60 dB; on "
        f"pictures made for mixtures (joint, small victims) {patches} patches, {outside} outside their radius"
    )
    return Evidence(
        text, "does not hold" if wrong or outside else "holds", share(wrong, made) + " wrong", f"{made} claims"
    )
