"""Every YAML file in configs/ parses into its schema, is headed by its command, builds its model."""

from functools import cache
from pathlib import Path

import pytest
import torch

from defenses import build_defense
from defenses.ats.search import SearchConfig
from defenses.base import Defense, Recipe
from models import build_model
from models.options import ModelOptions
from options import AttackConfig, ConsistencyConfig, EvalConfig, TrainConfig
from scripts.benchmark_plan import OF_ATTACK, attack_settings, attacks_of, cells, merged, options, read_plan
from utils.commandline import load
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig, "consistency": ConsistencyConfig, "attack": AttackConfig}
NEEDED = {
    "train": ["--output", "x"],
    "eval": ["--output", "x", "--checkpoint", "f"],
    "consistency": ["--output", "x", "--checkpoint", "f"],
    "attack": ["--output", "x", "--images", "d"],
}
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name in SCHEMAS)
DEFENSES = sorted((ROOT / "configs" / "defense").glob("*.yaml"))
PLANS = sorted((ROOT / "configs" / "benchmark").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_config_parses_and_says_how_to_run_it(path):
    kind = path.parent.name
    victim = ["--checkpoint", "f"] if kind == "attack" and "model:" not in path.read_text() else []
    text = "kind: text" in path.read_text()
    needed = ["--output", "x"] if text else NEEDED[kind]
    config, _ = load(SCHEMAS[kind], ["--config", str(path), *needed, *victim])
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    script = "train.py" if kind == "train" else f"{kind}.py"
    assert any(script in line and "--config" in line for line in head)
    assert any("Cost" in line for line in head) and any("xpected" in line or "numbers" in line for line in head)
    if kind == "train" and path.name != "official.yaml":
        with torch.device("meta"):
            options = {key: value for key, value in vars(config.model).items() if key != "name"}
            size = {} if text else {"image_size": config.data.image_size or 224}
            build_model(config.model.name, **size, **options)


@pytest.mark.parametrize("path", DEFENSES, ids=[path.name for path in DEFENSES])
def test_defence_configs_fit_the_scripts_their_heads_name(path):
    text, given = path.read_text(), ["--config", str(path)]
    assert "# Cost" in text and "--config configs/defense/" + path.name in text
    if "defenses.ats.search" in text:
        load(SearchConfig, [*given, "--checkpoint", "f", "--data", "d", "--output", "x"])
        return
    training, _ = load(TrainConfig, [*given, *NEEDED["train"]])
    assert build_defense(training.defense, training.defense_options).active or vars(training.model) != vars(
        ModelOptions()
    )
    if "attack.py" in text:
        attack, _ = load(AttackConfig, [*given, *NEEDED["attack"], "--checkpoint", "f"])
        assert attack.defense == training.defense and attack.defense_options == training.defense_options


@pytest.mark.parametrize("path", DEFENSES, ids=[path.name for path in DEFENSES])
def test_the_training_in_the_head_of_a_defence_config_is_accepted(path):
    commands = [line.split("train.py")[1] for line in path.read_text().splitlines() if "python train.py" in line]
    assert commands
    for command in commands:
        config, _ = load(TrainConfig, [part.replace("configs/", f"{ROOT}/configs/") for part in command.split()])
        build_defense(config.defense, config.defense_options).check_training(Recipe(**config.recipe()))


@cache
def on_meta(model: ModelOptions, image_size: int) -> torch.nn.Module:
    """The model without its weights, built once for all cells that have it."""
    with torch.device("meta"):
        options = {key: value for key, value in vars(model).items() if key != "name"}
        return build_model(model.name, image_size=image_size, num_classes=10, **options)


@pytest.mark.parametrize("path", PLANS, ids=[path.name for path in PLANS])
def test_every_cell_of_a_benchmark_plan_is_a_valid_training_and_attack(path):
    plan, checked = read_plan(str(path)), set()
    for model, name in cells(plan):
        cell, given = plan["defenses"][name], "victim" in plan["models"][model]
        defense = None if given else trained_under(plan, model, cell.get("weights", name))
        if (name, given) in checked:  # attacks differ between defences, not between models
            continue
        checked.add((name, given))
        for attack in attacks_of(plan, name, model).values():
            settings = options(merged(attack_settings(plan, model, name), attack))
            victim = [] if given else ["--checkpoint", "f"]
            attacked, _ = load(AttackConfig, [*settings, *NEEDED["attack"], *victim])
            same = build_defense(attacked.defense, attacked.defense_options)
            if given or "weights" in cell:  # the defence acts on what is shared alone
                continue
            assert type(same) is type(defense)  # at the same strength; what saves time in training may differ
            assert not defense.strength or getattr(same, defense.strength) == getattr(defense, defense.strength)


def trained_under(plan: dict, model: str, name: str) -> Defense:
    """Return the defence of a training of the plan, after the checks that the training itself makes."""
    own = {key: value for key, value in plan["models"][model].items() if key not in OF_ATTACK}
    training = options(merged(plan["train"], own, plan["defenses"][name].get("train", {})))
    config, _ = load(TrainConfig, [*training, *NEEDED["train"]])
    defense = build_defense(config.defense, config.defense_options)
    defense.check_training(Recipe(**config.recipe()))
    defense.check(on_meta(config.model, config.data.image_size))
    return defense


def test_later_files_and_the_command_line_win(tmp_path):
    for name, epochs in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"optim: {{epochs: {epochs}, lr: 1e-3}}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    assert load(TrainConfig, [*files, "--output", "x"])[0].optim.epochs == 2
    config, resolved = load(TrainConfig, [*files, "--output", "x", "--optim.epochs", "3"])
    assert config.optim.epochs == 3 and config.optim.lr == 1e-3
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load(TrainConfig, ["--config", str(tmp_path / "resolved.yaml")])[0] == config


@pytest.mark.parametrize("text, ratios", [("0,0.5", [0, 0.5]), ("0.9", [0.9]), ("[0, 1]", [0, 1]), (".5,1", [0.5, 1])])
def test_lists_may_be_written_with_commas(text, ratios):
    needed = NEEDED["eval"]
    assert load(EvalConfig, [*needed, "--mask_ratios", text])[0].mask_ratios == ratios
    assert load(EvalConfig, [*needed, f"--mask_ratios={text}"])[0].mask_ratios == ratios


def test_switches_need_no_value():
    assert load(EvalConfig, [*NEEDED["eval"], "--overwrite", "--ema"])[0].overwrite
    assert not load(EvalConfig, [*NEEDED["eval"], "--overwrite", "false"])[0].overwrite


def test_missing_options_are_named():
    with pytest.raises(UserError, match="checkpoint"):
        load(EvalConfig, ["--output", "x"])
