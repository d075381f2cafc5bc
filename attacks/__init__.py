"""Gradient-inversion attacks: functions (leak, *, generator, **options) -> Reconstruction.

An attack sees a Leak (attacks/leak.py) and nothing of the private batch. One decorated with `vectorized`, and every
preset of `match`, also takes a list of leaks and of generators, attacks them side by side and returns a list. To add
one: a file with one function whose keyword arguments are its options, documented under `Args:`, one line in ATTACKS, a
config and a test. The command line takes names, options and their help from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from utils.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from attacks.leak import Reconstruction
    from attacks.victim import Round

SENTENCES = Registry(  # attacks on text models
    token_rows="attacks.token_rows:token_rows",
    dager="attacks.dager:dager",
    text_dlg="attacks.text_matching:text_dlg",
    tag="attacks.text_matching:tag",
)
ATTACKS = Registry(
    closed_form="attacks.closed_form:closed_form",
    adaptive="attacks.adaptive:adaptive",
    token_span="attacks.token_span:token_span",
    first_block="attacks.first_block:first_block",
    joint="attacks.joint:joint",
    ats_aware="attacks.ats_aware:ats_aware",
    defense_aware="attacks.defense_aware:defense_aware",
    april="attacks.april:april",
    dlg="attacks.dlg:dlg",
    idlg="attacks.dlg:idlg",
    inverting_gradients="attacks.inverting_gradients:inverting_gradients",
    modern="attacks.inverting_gradients:modern",
    beyond_inferring="attacks.beyond_inferring:beyond_inferring",
    wei="attacks.beyond_inferring:wei",
    gradinversion="attacks.gradinversion:gradinversion",
    gradvit="attacks.gradvit:gradvit",
    april_matching="attacks.april_matching:april_matching",
    rgap="attacks.rgap:rgap",
    hybrid="attacks.hybrid:hybrid",
    imprint="attacks.malicious.imprint:imprint",
    adapter_imprint="attacks.malicious.adapter_imprint:adapter_imprint",
    fishing="attacks.malicious.fishing:fishing",
)
ATTACKS |= SENTENCES


def worth_together(attack: Callable, model: nn.Module) -> int:
    """Return how many victims to attack at once: small networks spend their time on overhead, which they can share."""
    small = sum(value.numel() for value in model.parameters()) < 1e6
    return 16 if small and is_vectorized(attack) else 1


def attack_together(attack: Callable, rounds: Sequence[Round], watch: Callable, options: dict) -> list[Reconstruction]:
    """Return a reconstruction per round of a client, made side by side where the attack can; `watch` follows it."""
    from attacks.victim import blame

    leaks, generators = [one.leak for one in rounds], [one.generator for one in rounds]
    advice = "closed_form, adaptive and first_block do not differentiate the network's gradient, others do"
    advice += "; --attack_options.chunk 1 takes one problem at a time" * is_vectorized(attack)
    with blame(leaks[0].model, "under this attack", advice):
        if is_vectorized(attack):
            return attack(leaks, generator=generators, watch=watch, **options)
        return [attack(leak, generator=own, **options) for leak, own in zip(leaks, generators, strict=True)]


def is_vectorized(attack: Callable) -> bool:
    """Return whether an attack takes several leaks at once."""
    return getattr(attack, "vectorized", False)
