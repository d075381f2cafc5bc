"""Every YAML file in configs/ parses into its schema, is headed by its command, builds its model; --help is whole."""

from pathlib import Path

import pytest
import torch

from config import AttackConfig, ConsistencyConfig, EvalConfig, TrainConfig
from models import build_model
from utils.commandline import load, option_types
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
SCHEMAS = {"train": TrainConfig, "eval": EvalConfig, "consistency": ConsistencyConfig, "attack": AttackConfig}
NEEDED = {
    "train": ["--output", "x"],
    "eval": ["--output", "x", "--checkpoint", "f"],
    "consistency": ["--output", "x", "--checkpoint", "f"],
    "attack": ["--output", "x", "--images", "d"],
}
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_config_parses_and_says_how_to_run_it(path):
    kind = path.parent.name
    victim = ["--checkpoint", "f"] if kind == "attack" and "model:" not in path.read_text() else []
    config, _ = load(SCHEMAS[kind], ["--config", str(path), *NEEDED[kind], *victim])
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    script = "train.py" if kind == "train" else f"{kind}.py"
    assert any(script in line and "--config" in line for line in head)
    assert any("Cost" in line for line in head) and any("xpected" in line or "numbers" in line for line in head)
    if kind == "train" and path.name != "official.yaml":
        with torch.device("meta"):
            options = {key: value for key, value in vars(config.model).items() if key != "name"}
            build_model(config.model.name, image_size=config.data.image_size or 224, **options)


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


@pytest.mark.parametrize("schema", SCHEMAS.values())
def test_help_documents_every_option(schema, capsys):
    with pytest.raises(SystemExit) as stop:
        load(schema, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in option_types(schema):
        assert f"--{key} " in text
    undocumented = text.count("(type:") + text.count("(required, type:")
    assert undocumented >= len(option_types(schema))


def test_missing_options_are_named():
    with pytest.raises(UserError, match="checkpoint"):
        load(EvalConfig, ["--output", "x"])
