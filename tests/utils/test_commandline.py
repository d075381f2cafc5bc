"""Options as people write them: hyphens, short names, lists, and whose option or config it is."""

import re
from pathlib import Path

import pytest

from options import AttackConfig, ConsistencyConfig, EvalConfig, TrainConfig
from utils.commandline import load
from utils.errors import UserError
from utils.schema import full_name, option_types

ROOT = Path(__file__).parents[2]
SCHEMAS = (TrainConfig, EvalConfig, ConsistencyConfig, AttackConfig)
ATTACK = ["--model", "lenet", "--images", "d", "--output", "x"]
EVAL = ["--checkpoint", "f", "--output", "x"]
TRAIN = ["--output", "x"]


def fails(schema, *argv) -> str:
    with pytest.raises(UserError) as error:
        load(schema, argv)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_may_be_written_with_hyphens(schema):
    for name in option_types(schema):
        assert full_name(name.replace("_", "-"), option_types(schema)) == name


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_is_found_without_its_section_or_said_to_be_ambiguous(schema):
    known = option_types(schema)
    for name in known:
        short = name.rpartition(".")[2]
        same = [option for option in known if option.rpartition(".")[2] == short]
        if short in known:
            assert full_name(short, known) == short
        elif len(same) == 1:
            assert full_name(short, known) == name
        else:
            with pytest.raises(UserError, match="ambiguous: write") as error:
                full_name(short, known)
            assert all(f"--{option}" in str(error.value) for option in same)


def test_hyphens_and_short_names_on_a_command_line():
    config, _ = load(
        TrainConfig, [*TRAIN, "--lr", "1e-3", "--epochs=40", "--data.batch-size", "8", "--mask-ratio", ".5"]
    )
    assert (config.optim.lr, config.optim.epochs) == (1e-3, 40)
    assert (config.data.batch_size, config.jigsaw.mask_ratio) == (8, 0.5)
    config, _ = load(
        AttackConfig, [*ATTACK, "--batch-size", "2", "--attack", "dlg", "--attack-options.stop-below", "1"]
    )
    assert config.batch_size == 2 and config.attack_options == {"stop_below": "1"}
    assert load(EvalConfig, [*EVAL, "--batch_size", "3", "--overwrite"])[0].data.batch_size == 3


def test_listed_names_are_written_with_hyphens_or_underscores(tmp_path):
    (tmp_path / "options.yaml").write_text("attack: closed-form\ndefense: dp-sgd\n")
    config, _ = load(AttackConfig, ["--config", str(tmp_path / "options.yaml"), *ATTACK, "--model", "deit-small"])
    assert (config.attack, config.defense, config.model) == ("closed_form", "dp_sgd", "deit_small")
    assert load(AttackConfig, [*ATTACK, "--attack", "mjp-aware", "--images", "my-folder"])[0].images == "my-folder"
    assert "did you mean 'closed_form'" in fails(AttackConfig, *ATTACK, "--attack", "closed-for")


def test_a_config_that_was_renamed_is_found_by_its_former_name():
    config, _ = load(AttackConfig, ["--config", str(ROOT / "configs/attack/adaptive.yaml"), *ATTACK[2:]])
    assert config.attack == "mjp_aware"
    assert "'no/adaptive.yaml' does not exist" in fails(AttackConfig, "--config", "no/adaptive.yaml", *ATTACK)


def test_a_value_may_look_like_anything_but_an_option():
    config, _ = load(AttackConfig, ["--model", "lenet", "--images", "a-b_c", "--output=--x", "--seed", "3"])
    assert (config.images, config.output, config.seed) == ("a-b_c", "--x", 3)
    assert load(EvalConfig, [*EVAL, "--suite", "attention", "--block", "-2"])[0].block == -2


@pytest.mark.parametrize("text", [["0,0.5"], ["0", "0.5"], ["[0,0.5]"], ["[0,", "0.5]"]])
def test_lists_are_written_with_commas_or_spaces(text):
    config, _ = load(EvalConfig, ["--mask_ratios", *text, *EVAL])
    assert config.mask_ratios == [0, 0.5]


@pytest.mark.parametrize("text, names", [(["head.*"], ["head.*"]), (["*,a"], ["*", "a"]), (["yes", "1"], ["yes", "1"])])
def test_lists_of_words_are_taken_as_they_are(text, names):
    assert load(AttackConfig, [*ATTACK, "--withhold", *text])[0].withhold == names


@pytest.mark.parametrize(
    "schema, argv, words",
    [
        (AttackConfig, ["--mask", "1"], ["unknown option 'mask'", "'mask_ratio'"]),
        (AttackConfig, ["--lr", "1"], ["unknown option 'lr'", "train.py has --optim.lr"]),
        (AttackConfig, ["--attack", "dlg", "--lr", "1"], ["option of attack 'dlg'", "--attack_options.lr"]),
        (
            AttackConfig,
            ["--defense=laplace", "--scale", "1"],
            ["of defense 'laplace'", "--defense_options.scale"],
        ),
        (AttackConfig, ["--timm", "x"], ["eval.py has --timm"]),
        (EvalConfig, ["--lr", "1"], ["train.py has --optim.lr"]),
        (TrainConfig, ["--crop", "1"], ["--augment.crop", "--data.crop"]),
        (TrainConfig, ["--warmup", "1"], ["'optim.warmup_lr'", "'optim.warmup_epochs'"]),
        (TrainConfig, ["--epoch", "1"], ["did you mean 'optim.epochs'?"]),
        (TrainConfig, ["--quux", "1"], ["unknown option 'quux'", "train.py --help"]),
        (
            TrainConfig,
            ["configs/train/deit_small.yaml"],
            ["unexpected 'configs/train/deit_small.yaml'", "--config FILE"],
        ),
        (TrainConfig, ["--optim.lr"], ["--optim.lr"]),
        (TrainConfig, [], ["missing: --output"]),
        (TrainConfig, [*TRAIN, "--optim", "{lrr: 1}"], ["optim.lrr", "did you mean 'optim.lr'?"]),
        (TrainConfig, [*TRAIN, "--device", "gpu"], ["--device must be auto, cpu, cuda or cuda:i, got 'gpu'"]),
        (AttackConfig, [*ATTACK, "--attack_options.steps", "3"], ["unknown option 'attack_options.steps'", "noise"]),
        (AttackConfig, [*ATTACK, "--attack_options.noise", "much"], ["expected float, got 'much'"]),
        (TrainConfig, [*TRAIN, "--defense", "noise", "--defense_options.sd", "3"], ["did you mean 'std'?"]),
    ],
)
def test_what_is_wrong_and_what_may_be_meant(schema, argv, words):
    text = fails(schema, *argv)
    for word in words:
        assert word in text
    assert len(text) < 300


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_config_of_another_script_is_named_as_such(schema):
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if path.parent.name in ("train", "attack", "eval"):
            own = {"train": TrainConfig, "attack": AttackConfig, "eval": EvalConfig}[path.parent.name]
            try:
                load(schema, ["--config", str(path), *EVAL, *(["--model", "lenet"] if schema is AttackConfig else [])])
            except UserError as error:
                if found := re.search(r"is a config of (.*), and this is", str(error)):
                    assert own.script in found[1] and schema.script not in found[1]
                else:
                    assert "config file" not in str(error) and "expected" not in str(error)


def test_names_in_a_config_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "optim: {warmup-epochs: 3, lr: 1e-3, mixup: 0, cutmix: 0}\ndata: {kind: text, text: {max-length: 9}}\n"
        "model.name: text_small\njigsaw.mask-ratio: 0.5\n"
    )
    config, _ = load(TrainConfig, ["--config", str(path), *TRAIN])
    assert (config.optim.warmup_epochs, config.optim.lr) == (3, 1e-3)
    assert (config.data.text.max_length, config.jigsaw.mask_ratio) == (9, 0.5)
    path.write_text("lr: 1\n")
    assert "'lr': did you mean 'optim.lr'?" in fails(TrainConfig, "--config", str(path), *TRAIN)
    path.write_text("optim: {warmup: 1}\n")
    text = fails(TrainConfig, "--config", str(path), *TRAIN)
    assert "options.yaml" in text and "optim.warmup_epochs" in text
    path.write_text("base: &b {lr: 1e-2}\noptim: {<<: *b, epochs: 2}\n")
    assert "unknown option 'base'" in fails(TrainConfig, "--config", str(path), *TRAIN)
    path.write_text("? [a, b]\n: 1\n")
    assert "is not YAML" in fails(TrainConfig, "--config", str(path), *TRAIN)


def test_values_of_a_config_file_are_read_as_they_stand(tmp_path):
    (tmp_path / "options.yaml").write_text(
        "model: &name lenet\nimages: 'yes'\noutput: \"1e-3\"\nmean: [0.1, .2, 3e-1]\nlocal_steps: 2\nlocal_lr: 1e-4\n"
        "defense: noise\ndefense_options: {std: 1e-2}\nwithhold: [*name]\n"
    )
    config, _ = load(AttackConfig, ["--config", str(tmp_path / "options.yaml")])
    assert (config.images, config.output, config.local_lr) == ("yes", "1e-3", 1e-4)
    assert config.mean == (0.1, 0.2, 0.3) and config.defense_options == {"std": 1e-2} and config.withhold == ["lenet"]


def test_print_config(capsys):
    with pytest.raises(SystemExit):
        load(TrainConfig, [*TRAIN, "--print-config"])
    assert "warmup_epochs: 20" in capsys.readouterr().out
