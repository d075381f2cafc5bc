"""The interval of a campaign: bits of an image that are proved to leak, and bits that are proved to stay hidden."""

from collections.abc import Sequence

from reports.page import Markup, escape
from utils.statistics import describe

KEYS = {"leaked": "bits_leaked", "hidden": "bits_hidden"}
STYLE = """
.interval { display: flex; height: 22px; max-width: 72ch; border-radius: 6px; overflow: hidden; margin: 20px 0 6px; }
.interval .leaked { background: #c2410c; } .interval .hidden { background: #0f766e; }
.interval .open { background: #cbd5e1; }
.key span::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px; }
.key span::before { margin: 0 6px 0 0; }
.key .leaked::before { background: #c2410c; } .key .hidden::before { background: #0f766e; }
.key .open::before { background: #cbd5e1; } .key span { margin-right: 18px; }
"""


def proved(rows: Sequence[dict]) -> dict | None:
    """Return {"bits", "leaked", "hidden"} of an image, the last two with mean, std and n over the rows; None where the
    rows have no interval, as those of sentences."""
    own = [row for row in rows if "bits" in row]
    if not own:
        return None
    return {"bits": own[0]["bits"]} | {key: describe([row[name] for row in own]) for key, name in KEYS.items()}


def sentence(attack: str, found: dict) -> str:
    """Return what is proved, in words."""
    leaked, hidden = (100 * found[key]["mean"] / found["bits"] for key in KEYS)
    whole = f"Of the {found['bits']:,.0f} bits of an image"
    below = f"{attack} proves {_share(leaked)} leaked" if leaked else f"{attack} certifies nothing"
    above = f"{_share(hidden)} provably hidden, whatever the attack" if hidden else "none is provably hidden"
    caution = "" if leaked else "; that is no sign of safety"
    return f"{whole}, {below}{caution}; {above}; {_share(max(0.0, 100 - leaked - hidden))} open."


def bar(attack: str, found: dict) -> Markup:
    """Return the interval as a bar with its sentence, for a page."""
    leaked, hidden = (100 * found[key]["mean"] / found["bits"] for key in KEYS)
    parts = {"leaked": leaked, "open": max(0.0, 100 - leaked - hidden), "hidden": hidden}
    pieces = "".join(f'<div class="{kind}" style="width: {size:.2f}%"></div>' for kind, size in parts.items())
    names = {"leaked": "proved leaked", "open": "open", "hidden": "provably hidden"}
    key = "".join(f'<span class="{kind}">{names[kind]}</span>' for kind in parts)
    text = escape(sentence(attack, found).replace(" %", "\u00a0%"))
    return Markup(
        f'<div class="interval" role="img" aria-label="{text}">{pieces}</div><p class="key note">{key}</p><p>{text}</p>'
    )


def _share(percent: float) -> str:
    """Return a percentage for people, never rounded up to all."""
    if percent > 99.95 and percent < 100:
        return "over 99.9 %"
    digits = ".0f" if percent in (0, 100) else ".1f" if percent >= 0.05 else ".1g"
    return f"{percent:{digits}} %"
