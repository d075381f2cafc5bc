"""Verdicts: what came back, in the first words of every report, from scores or from the attack's own claim.

Where the originals are at hand a verdict counts scores; where they are not, it repeats what the attack's equations say
(`exact`), and says so. It never guesses.
"""

import math
from collections.abc import Mapping, Sequence

MARGIN = 3.0  # dB above a picture in the mean colour, which takes no leak, from which something of an image came back


def of_images(attack: str, rows: Sequence[Mapping], threshold: float) -> str:
    """Return the verdict of a campaign whose rows hold scores; threshold: PSNR in dB above which an image came back."""
    number = len(rows)
    whole = [row for row in rows if _above(row, threshold, "psnr")]
    others = [row for row in rows if not _above(row, threshold, "psnr")]
    moved = [row for row in others if _above(row, max(threshold, _psnr(row) + MARGIN), "psnr_patches")]
    parts = [row for row in others if row not in moved and _above(row, _floor(row), "psnr", "psnr_visible")]
    counts = f"{attack} reconstructs {len(whole)} of {_images(number)} above {threshold:g} dB"
    if moved:
        counts += f"; of {_images(len(moved))} it has the patches, in another order"
    if parts:
        counts += f"; of {_images(len(parts))} it has parts, {MARGIN:g} dB and more above a picture in the mean colour"
    if len(whole) == number:
        lead = "The image comes back" if number == 1 else "Every image comes back"
    elif whole:
        lead = f"{len(whole)} of {number} images come back"
    elif moved:
        lead = "Images come back in another order of their patches" if number > 1 else "The patches come back"
    elif parts:
        lead = "Parts of images come back" if number > 1 else "Parts of the image come back"
    else:
        lead = "No image comes back"
    return f"{lead}: {counts}."


def of_masks(rows: Sequence[Mapping]) -> str:
    """Return, of images that were to be masked, how many were not, as the mask drawn hides no patch; else nothing."""
    bare = sum(row.get("psnr_masked") is None or math.isnan(row["psnr_masked"]) for row in rows)
    if not bare:
        return ""
    return (
        f" {bare} of {_images(len(rows))} had a mask that hides no patch, and leak as without MJP (smaller blocks: "
        f"--min_block)."
    )


def of_range(rows: Sequence[Mapping]) -> str:
    """Return, of images whose claims their own pixels refuted, how far these lie outside their range; else nothing."""
    away = max((row["outside"] for row in rows if row.get("outside")), default=0.0)
    if not away:
        return ""
    return (
        f" No claim is made where pixels lie outside 0 to 1, by up to {away:.2g}: are --mean and --std those of the "
        f"client?"
    )


def of_block(rows: Sequence[Mapping]) -> str:
    """Return of how many images the claims were refuted by the gradient of the first block; else nothing."""
    number = sum("contrast" in row or "unexplained" in row for row in rows)
    if not number:
        return ""
    return (
        f" No claim is made of {_images(number)}, from whose patches the model's first block would have another "
        f"gradient than the one shared: are these the weights of the round, and its parameters in their order?"
    )


def of_claims(attack: str, rows: Sequence[Mapping]) -> str:
    """Return the verdict of a campaign without originals: what the attack itself says it has determined (`exact`)."""
    number, claims = len(rows), [_claims(row) for row in rows if row.get("exact") is not None]
    if not claims:
        return (
            f"{attack} returns {_images(number)} and makes no claim of its own: it searches for an image with the same "
            f"gradient. Without the originals only the pictures say what came back."
        )
    if all(claims) and len(claims) == number:
        lead = "The image comes back" if number == 1 else "Every image comes back"
    elif any(claims):
        lead = f"{sum(claims)} of {number} images come back"
    else:
        return (
            f"{attack} does not claim that its equations determine any of {_images(number)}: what it returns is an "
            f"estimate. Without the originals only the pictures say what came back."
        )
    moved = [row for row in rows if row.get("exact") is not None and _claims(row) and not row["exact"]]
    order = ""
    if moved:
        whose = "hidden patches" if all(row.get("hidden") for row in moved) else "patches that share a position"
        order = f" and, {_images(len(moved))} of them," if len(moved) < sum(claims) else " and"
        order += f" up to the order of {whose}"
    return (
        f"{lead}, says the attack: the equations of {attack} determine {sum(claims)} of {_images(number)} up to "
        f"rounding{order}. There were no originals to check it by."
    )


def of_sentences(attack: str, rows: Sequence[Mapping], threshold: float) -> str:
    """Return the verdict of a campaign on sentences; threshold: percentage of tokens in place that counts as order."""
    number = len(rows)
    found = [row["tokens_any_order"] for row in rows]
    ordered = sum(row["tokens_in_place"] > threshold for row in rows)
    sentences = f"{number} sentence{'s' * (number > 1)}"
    if ordered == number:
        lead = "Every sentence comes back"
    elif min(found) == 100:
        lead = "Every word comes back"
    elif sum(found) / number >= 50:
        lead = "Most words come back"
    elif max(found) > 0:
        lead = "Some words come back"
    else:
        lead = "No word comes back"
    return (
        f"{lead}: {attack} finds {percent(sum(found) / number)} of the tokens of {sentences}, in any order, and has "
        f"{ordered} of {sentences} in order (more than {threshold:g} % of the tokens in place)."
    )


def percent(value: float) -> str:
    """Return a percentage for people; 100 and 0 only where they are exact."""
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %" if 0.05 <= value < 99.95 else f"{value:.5g} %"


def _claims(row: Mapping) -> bool:
    """Return whether an attack says that it has all patches, if not the order of all."""
    return bool(row.get("exact_up_to_order", row["exact"]))


def _images(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"


def _above(row: Mapping, bound: float, *keys: str) -> bool:
    """Return whether a score exceeds the bound; undefined ones do not, perfect ones do."""
    return any(row.get(key) is not None and row[key] > bound for key in keys)


def _psnr(row: Mapping) -> float:
    value = row.get("psnr")
    return -math.inf if value is None or math.isnan(value) else value


def _floor(row: Mapping) -> float:
    """Return the PSNR in dB from which something of the image came back; infinite where no baseline is defined."""
    baseline = row.get("psnr_baseline")
    return math.inf if baseline is None or math.isnan(baseline) else baseline + MARGIN
