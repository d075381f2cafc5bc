"""What a report says that an attack uses is what the attack reads of a leak."""

import sys
from dataclasses import dataclass, fields

import pytest
import torch

from attacks import ATTACKS, SENTENCES
from attacks.threat_model.leak import Leak
from attacks.threat_model.uses import LABELS, MJP, STATISTICS, used, uses
from tests.attacks.threat_model.test_applicable import MODELS, OPTIONS, SHORT, leaks
from utils.errors import UserError

READ = {"labels": LABELS, "attacker_knowledge": MJP, "mask": MJP, "source": MJP}


@dataclass(frozen=True)
class Watched(Leak):
    """A leak that keeps what was read of it, but for copies of it, which use nothing."""

    def __getattribute__(self, name: str):
        if name in READ and sys._getframe(1).f_globals["__name__"] not in ("dataclasses", "attacks.threat_model.leak"):
            object.__getattribute__(self, "model").read.add(READ[name])
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - set(SENTENCES)))
def test_no_attack_reads_what_it_is_said_not_to_use(name):
    attack = ATTACKS[name]
    options = OPTIONS.get(name, SHORT if hasattr(attack, "preset") else {})
    for kind in ("vit", "mjp", "april", "chain"):
        leak = leaks(MODELS[kind]().eval(), {})[1]
        leak.model.read = set()
        watched = Watched(**{item.name: getattr(leak, item.name) for item in fields(Leak)})
        try:
            attack(watched, generator=torch.Generator().manual_seed(0), **options)
        except UserError:
            continue
        assert leak.model.read <= set(uses(name, options)), (kind, leak.model.read)


def test_threat_models_state_what_is_used_and_name_the_rest():
    told = {"shared": "a gradient", LABELS: "told", "MJP": "mask ratio 0.27", MJP: "method", STATISTICS: "shared"}
    naive = used(told, "closed_form", {"noise": 0.1})
    assert list(naive) == ["attack", "shared", "MJP", "not used by this attack"]
    assert naive["attack"] == "closed_form (noise 0.1)"
    assert naive["not used by this attack"] == "labels, MJP, BatchNorm statistics"
    assert used(told, "dlg", {}).keys() >= {LABELS, MJP} and STATISTICS not in used(told, "dlg", {})
    assert STATISTICS in used(told, "gradinversion", {}) and LABELS not in used(
        told, "ats_aware", {"base": "closed_form"}
    )
