"""--help is short and names everything, --help-all describes everything, --attack NAME --help an attack's options."""

import re

import pytest

from attacks import ATTACKS
from defenses import DEFENSES
from defenses.ats.search import SearchConfig
from options import AttackConfig, AuditConfig, ConsistencyConfig, EvalConfig, TrainConfig
from utils.commandline import load
from utils.help import brief, help_text
from utils.schema import option_types, part_options

SCHEMAS = (TrainConfig, EvalConfig, ConsistencyConfig, AttackConfig, AuditConfig, SearchConfig)
WORDS = re.compile(r"--[a-z][\w.]*")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_is_short_and_names_every_option(schema, capsys):
    with pytest.raises(SystemExit) as stop:
        load(schema, ["--optim.no_such_thing", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(text.splitlines()) <= 60 and max(map(len, text.splitlines())) <= 110
    assert set(option_types(schema)) <= {word[2:] for word in WORDS.findall(text)}
    for name in schema.common:
        assert re.search(rf"^  --{name} \S.*$", text, re.MULTILINE), name


@pytest.mark.parametrize("word", ["--help-all", "--help_all"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_all_describes_every_option_with_type_and_default(schema, word):
    lines = help_text(schema, [word]).split("\n  --")[3:]  # after usage, --config and --print_config
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in lines}
    assert set(entries) == set(option_types(schema))
    for name, entry in entries.items():
        assert len(entry.split()) > 4, name  # name, type, and a description
        assert re.search(r"default|required", entry), name


@pytest.mark.parametrize("option", ["epochs INT", "lr FLOAT", "amp none|bf16|fp16", "betas FLOAT,FLOAT"])
def test_types_are_shown(option):
    assert f"  --optim.{option} " in help_text(TrainConfig, ["--help-all"])


@pytest.mark.parametrize(
    "schema, selector, name",
    [(TrainConfig, "defense", name) for name in DEFENSES] + [(AttackConfig, "attack", name) for name in ATTACKS],
)
def test_the_help_of_a_part_describes_each_of_its_options(schema, selector, name):
    text = help_text(schema, [f"--{selector}", name, "--help"])
    assert text.startswith(f"{selector} '{name}' ({selector}s/")
    for option in part_options(schema, selector, name).values():
        assert option.help and option.kind, f"{name}: {option.name} has no description"
        assert re.search(rf"^  {option.name} \S", text, re.MULTILINE)


def test_an_attack_and_a_defence_can_be_asked_for_together():
    text = help_text(AttackConfig, ["--attack=dlg", "--defense", "noise", "--help"])
    assert "attack 'dlg'" in text and "defense 'noise'" in text and "(default 6000)" in text


def test_help_of_a_part_that_does_not_exist_offers_the_nearest():
    with pytest.raises(Exception, match="unknown attack 'dgl': did you mean 'dlg'"):
        help_text(AttackConfig, ["--attack", "dgl", "--help"])


@pytest.mark.parametrize(
    "text, first",
    [
        ("Images per gradient.", "Images per gradient"),
        ("auto: continue what is there.", "auto: continue what is there"),
        ("Options of it, e.g. --a B. More.", "Options of it, e.g. --a B"),
        ("Chance of it (official: one); others", "Chance of it (official: one)"),
        ("no end", "no end"),
    ],
)
def test_a_description_in_brief(text, first):
    assert brief(text) == first
