"""config.yaml of runs made before options moved beside their code: all six kinds load, and say what they said."""

from pathlib import Path

import pytest
import yaml

from options import AttackConfig, AuditConfig, ConsistencyConfig, EvalConfig, TrainConfig
from utils.commandline import load

FORMER = Path(__file__).parent / "former_configs"
SCHEMAS = {
    "attack": AttackConfig,
    "audit": AuditConfig,
    "consistency": ConsistencyConfig,
    "eval": EvalConfig,
    "train": TrainConfig,
    "train_text": TrainConfig,
}
RENAMED = {"tier": ("attacker_knowledge", {"T2": "mask"})}  # option -> (its name now, its values now)


def flat(tree: dict, prefix: str = "") -> dict:
    """{dotted option: value}; what a part gets is one value."""
    found = {}
    for key, value in tree.items():
        section = isinstance(value, dict) and not key.endswith("_options")
        found |= flat(value, f"{prefix}{key}.") if section else {prefix + key: value}
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_former_configs_load_and_say_the_same(name):
    before = flat(yaml.safe_load((FORMER / f"{name}.yaml").read_text()))
    now = flat(yaml.safe_load(load(SCHEMAS[name], ["--config", str(FORMER / f"{name}.yaml")])[1]))
    for former, value in before.items():
        option, values = RENAMED.get(former, (former, {}))
        assert now[option] == (values[value] if values else value), former


def test_the_question_of_audit_is_asked_with_what_both_scripts_know():
    asked = ["--model", "vit", "--mask_ratio", "0.27", "--output", "o", "--seed", "3"]
    config, _ = load(AttackConfig, ["--audit", *asked])
    alone, _ = load(AuditConfig, asked)
    assert config.as_audit() == alone and config.as_audit().terms() == alone.terms()
