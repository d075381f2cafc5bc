"""Former names keep working on command lines, in configs, registries, run folders and result files, and only there."""

import json

import pytest

from attacks import ATTACKS
from eval.report import read_results
from options import AttackConfig
from utils.aliases import VALUES, current, every_name
from utils.commandline import load
from utils.distributed import processes
from utils.errors import UserError
from utils.help import help_text
from utils.runs import open_run

OLD = {"attack": "adaptive", "tier": "T3"}
ARGUMENTS = ["--model", "lenet", "--images", "d", "--output", "x"]


def test_a_command_line_and_a_config_take_former_names_and_resolve_them(tmp_path):
    (tmp_path / "old.yaml").write_text("attack: adaptive\ntier: T3\n")
    lines = (
        ["--attack", "adaptive", "--tier", "T3"],
        ["--attack=adaptive", "--tier=T3"],
        ["--config", str(tmp_path / "old.yaml")],
    )
    for line in lines:
        config, resolved = load(AttackConfig, [*line, *ARGUMENTS])
        assert (config.attack, config.attacker_knowledge) == ("mjp_aware", "permutation")
        assert "attacker_knowledge: permutation" in resolved and "tier" not in resolved and "adaptive" not in resolved


@pytest.mark.parametrize("former, name", VALUES["attacker_knowledge"].items())
def test_every_tier_has_its_name(former, name):
    assert load(AttackConfig, ["--tier", former, *ARGUMENTS])[0].attacker_knowledge == name


def test_help_is_that_of_the_present_name():
    assert help_text(AttackConfig, ["--attack", "adaptive", "--help"]).startswith("attack 'mjp_aware'")


def test_wrong_values_are_refused_under_the_present_name():
    with pytest.raises(UserError, match="--attacker_knowledge: unknown value 'T4'"):
        load(AttackConfig, ["--tier", "T4", *ARGUMENTS])


def test_registries_find_former_names_and_do_not_list_them():
    assert ATTACKS["adaptive"] is ATTACKS["mjp_aware"]
    assert "adaptive" not in list(ATTACKS) and every_name("attack", "mjp_aware") == ["mjp_aware", "adaptive"]


def test_results_and_run_folders_under_former_names(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"attack": "adaptive", "summary": {}}))
    assert read_results(tmp_path / "results.json") == {"attack": "mjp_aware", "summary": {}}
    folder, new = tmp_path / "run", "attack: mjp_aware\nattacker_knowledge: permutation\n"
    assert current(OLD) == {"attack": "mjp_aware", "attacker_knowledge": "permutation"}
    with processes("cpu") as peers:
        options = {"overwrite": False, "resume": True, "state": "partial", "may_change": ()}
        with pytest.raises(KeyboardInterrupt), open_run(str(folder), new, peers, **options) as run:
            run.start()
            (folder / "partial").mkdir()
            raise KeyboardInterrupt
        (folder / "config.yaml").write_text("attack: adaptive\ntier: T3\n")
        with open_run(str(folder), new, peers, **options) as run:
            assert run.changes == ""
