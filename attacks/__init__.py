"""Gradient-inversion attacks: functions (leak, *, generator, **options) -> Reconstruction.

An attack sees a Leak (attacks/threat_model/leak.py) and nothing of the private batch. One decorated with `vectorized`,
and every preset of `match`, also takes a list of leaks and of generators, attacks them side by side and returns a list.
To add one: a file with one function whose keyword arguments are its options, documented under `Args:`, one line in
ATTACKS, a config and a test. The command line takes names, options and their help from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from utils.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from attacks.threat_model.client import Round
    from attacks.threat_model.leak import Reconstruction

SENTENCES = Registry(  # attacks on text models
    token_rows="attacks.text.token_rows:token_rows",
    dager="attacks.text.dager:dager",
    text_dlg="attacks.text.text_matching:text_dlg",
    tag="attacks.text.text_matching:tag",
)
ATTACKS = Registry(
    closed_form="attacks.linear.closed_form:closed_form",
    mjp_aware="attacks.linear.mjp_aware:mjp_aware",
    token_span="attacks.linear.token_span:token_span",
    first_block="attacks.linear.first_block:first_block",
    joint="attacks.joint.joint:joint",
    class_features="attacks.presets.class_features:class_features",
    ats_aware="attacks.presets.ats_aware:ats_aware",
    defense_aware="attacks.presets.defense_aware:defense_aware",
    levenberg_marquardt="attacks.presets.levenberg_marquardt:levenberg_marquardt",
    april="attacks.linear.april:april",
    dlg="attacks.presets.dlg:dlg",
    idlg="attacks.presets.dlg:idlg",
    inverting_gradients="attacks.presets.inverting_gradients:inverting_gradients",
    modern="attacks.presets.inverting_gradients:modern",
    beyond_inferring="attacks.presets.beyond_inferring:beyond_inferring",
    wei="attacks.presets.beyond_inferring:wei",
    gradinversion="attacks.presets.gradinversion:gradinversion",
    dimitrov="attacks.presets.dimitrov:dimitrov",
    gradvit="attacks.presets.gradvit:gradvit",
    april_matching="attacks.presets.april_matching:april_matching",
    rgap="attacks.recursive.rgap:rgap",
    hybrid="attacks.recursive.hybrid:hybrid",
    imprint="attacks.malicious.imprint:imprint",
    adapter_imprint="attacks.malicious.adapter_imprint:adapter_imprint",
    fishing="attacks.malicious.fishing:fishing",
)
ATTACKS |= SENTENCES
FEATURES = ("class_features",)  # which give features and no pictures


def worth_together(attack: Callable, model: nn.Module) -> int:
    """Return how many victims to attack at once: small networks spend their time on overhead, which they can share."""
    small = sum(value.numel() for value in model.parameters()) < 1e6
    return 16 if small and is_vectorized(attack) else 1


def attack_together(attack: Callable, rounds: Sequence[Round], watch: Callable, options: dict) -> list[Reconstruction]:
    """Return a reconstruction per round of a client, made side by side where the attack can; `watch` follows it."""
    from attacks.threat_model.victim import blame

    leaks, generators = [one.leak for one in rounds], [one.generator for one in rounds]
    advice = "closed_form, mjp_aware and first_block do not differentiate the network's gradient, others do"
    advice += "; --attack_options.chunk 1 takes one problem at a time" * is_vectorized(attack)
    with blame(leaks[0].model, "under this attack", advice):
        if is_vectorized(attack):
            return attack(leaks, generator=generators, watch=watch, **options)
        return [attack(leak, generator=own, **options) for leak, own in zip(leaks, generators, strict=True)]


def is_vectorized(attack: Callable) -> bool:
    """Return whether an attack takes several leaks at once."""
    return getattr(attack, "vectorized", False)
