"""What each attack uses of what a server may know beside the model and its gradients: a report states no more.

tests/attacks/threat_model/test_knowledge.py holds it against what the attacks read of a leak.
"""

from collections.abc import Callable, Mapping
from inspect import signature

from attacks import ATTACKS

LABELS, MJP = "labels", "MJP, the attacker"  # rows of a threat model
STATISTICS, PUBLIC = "BatchNorm statistics", "public sentences"
KNOWLEDGE = {  # what an attacker may know of MJP, in words
    "none": "unaware of it",
    "method": "knows the method and infers the mask",
    "mask": "is also told the mask",
    "permutation": "is told the mask and the permutation",
}
ROWS = (LABELS, MJP, STATISTICS, PUBLIC)
Uses = tuple[str, ...] | Callable[[Mapping], tuple[str, ...]]  # or of the attack's options, defaults included


def uses(name: str, options: Mapping) -> tuple[str, ...]:
    """Return the rows of a threat model that an attack with these options uses: as it was declared
    (attacks/threat_model/checks.py, `checked`), all of them where it says nothing."""
    attack = ATTACKS[name]
    declared: Uses = getattr(attack, "uses", ROWS)
    return declared(defaults(attack) | dict(options)) if callable(declared) else declared


def defaults(attack: Callable) -> dict:
    """Return the defaults of an attack's options, by name."""
    return {key: item.default for key, item in signature(attack).parameters.items()}


def used(threat_model: Mapping[str, str], name: str, options: Mapping) -> dict[str, str]:
    """Return the threat model of an attack: its name and options first, then without the knowledge that it does not
    use, which one row names."""
    known = uses(name, options)
    left = {key: value for key, value in threat_model.items() if key not in ROWS or key in known}
    unused = [key.removesuffix(", the attacker") for key in ROWS if key in threat_model and key not in known]
    told = ", ".join(f"{key} {value}" for key, value in options.items())
    attack = {"attack": f"{name} ({told})" if told else name}
    return attack | left | ({"not used by this attack": ", ".join(unused)} if unused else {})
