"""What each attack uses of what a server may know beside the model and its gradients: a report states no more.

tests/attacks/test_knowledge.py holds it against what the attacks read of a leak.
"""

from collections.abc import Mapping
from inspect import signature

from attacks import ATTACKS

LABELS, MJP = "labels", "MJP, the attacker"  # rows of a threat model
STATISTICS, PUBLIC = "BatchNorm statistics", "public sentences"
ROWS = (LABELS, MJP, STATISTICS, PUBLIC)
USES: dict[str, tuple[str, ...]] = {
    "closed_form": (),
    "adaptive": (MJP,),
    "token_span": (LABELS, MJP),
    "first_block": (MJP,),
    "joint": (MJP,),
    "april": (),
    "rgap": (LABELS,),
    "hybrid": (LABELS,),
    "token_rows": (LABELS, MJP, PUBLIC),
    "dager": (LABELS, MJP, PUBLIC),
    "text_dlg": (LABELS, MJP, PUBLIC),
    "tag": (LABELS, MJP, PUBLIC),
}  # the presets of `match` are not listed: they use labels, MJP and, for their prior, BatchNorm statistics
# Of any other attack that is not listed a report states all that its server knows.


def uses(name: str, options: Mapping) -> tuple[str, ...]:
    """Return the rows of a threat model that an attack with these options uses."""
    given = {key: item.default for key, item in signature(ATTACKS[name]).parameters.items()} | dict(options)
    if name == "ats_aware":
        return uses(given["base"], given["base_options"] or {})
    if name == "token_span" and not given["match_steps"]:
        return (MJP,)
    if name in USES:
        return USES[name]
    if "batch_norm" not in given:
        return ROWS
    return (LABELS, MJP, STATISTICS) if given["batch_norm"] else (LABELS, MJP)


def used(threat_model: Mapping[str, str], name: str, options: Mapping) -> dict[str, str]:
    """Return the threat model of an attack: its name and options first, then without the knowledge that it does not
    use, which one row names."""
    known = uses(name, options)
    left = {key: value for key, value in threat_model.items() if key not in ROWS or key in known}
    unused = [key.removesuffix(", the attacker") for key in ROWS if key in threat_model and key not in known]
    told = ", ".join(f"{key} {value}" for key, value in options.items())
    attack = {"attack": f"{name} ({told})" if told else name}
    return attack | left | ({"not used by this attack": ", ".join(unused)} if unused else {})
