"""Gradient-inversion attacks: functions (leak, *, generator, **options) -> Reconstruction.

An attack sees a Leak (attacks/leak.py) and nothing of the private batch. One decorated with `vectorized`, and every
preset of `match`, also takes a list of leaks and of generators, attacks them side by side and returns a list. To add
one: a file with one function whose keyword arguments are its options, one line in ATTACKS, its name in
config.AttackConfig, a config and a test.
"""

from collections.abc import Callable, Sequence

from torch import nn

from attacks.adaptive import adaptive
from attacks.april import april
from attacks.april_matching import april_matching
from attacks.ats_aware import ats_aware
from attacks.closed_form import closed_form
from attacks.dager import dager
from attacks.defense_aware import defense_aware
from attacks.dlg import dlg, idlg
from attacks.first_block import first_block
from attacks.gradinversion import gradinversion
from attacks.gradvit import gradvit
from attacks.hybrid import hybrid
from attacks.inverting_gradients import inverting_gradients, modern
from attacks.leak import Reconstruction
from attacks.rgap import rgap
from attacks.text_matching import tag, text_dlg
from attacks.token_rows import token_rows
from attacks.token_span import token_span
from attacks.victim import Round

SENTENCES = {"token_rows": token_rows, "dager": dager, "text_dlg": text_dlg, "tag": tag}  # attacks on text models
ATTACKS = {
    "closed_form": closed_form,
    "adaptive": adaptive,
    "token_span": token_span,
    "first_block": first_block,
    "ats_aware": ats_aware,
    "defense_aware": defense_aware,
    "april": april,
    "dlg": dlg,
    "idlg": idlg,
    "inverting_gradients": inverting_gradients,
    "modern": modern,
    "gradinversion": gradinversion,
    "gradvit": gradvit,
    "april_matching": april_matching,
    "rgap": rgap,
    "hybrid": hybrid,
    **SENTENCES,
}


def worth_together(attack: Callable, model: nn.Module) -> int:
    """How many victims to attack at once: small networks spend their time on overhead, which they can share."""
    small = sum(value.numel() for value in model.parameters()) < 1e6
    return 16 if small and is_vectorized(attack) else 1


def attack_together(attack: Callable, rounds: Sequence[Round], watch: Callable, options: dict) -> list[Reconstruction]:
    """One reconstruction per round of a client, side by side where the attack can; `watch` follows its iterations."""
    leaks, generators = [one.leak for one in rounds], [one.generator for one in rounds]
    if is_vectorized(attack):
        return attack(leaks, generator=generators, watch=watch, **options)
    return [attack(leak, generator=own, **options) for leak, own in zip(leaks, generators, strict=True)]


def is_vectorized(attack: Callable) -> bool:
    """Whether an attack takes several leaks at once."""
    return getattr(getattr(attack, "func", attack), "vectorized", False)
