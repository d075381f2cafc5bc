"""Whatever stands on a command line or in a config file, it ends in options or in one clear line."""

import json
import os
import string

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from defenses.ats.search import SearchConfig
from options import AttackConfig, ConsistencyConfig, EvalConfig, TrainConfig
from utils.commandline import load, option_types, options, plain
from utils.errors import UserError

SCHEMAS = (TrainConfig, EvalConfig, ConsistencyConfig, AttackConfig, SearchConfig)
KEYS = sorted({key for schema in SCHEMAS for key in option_types(schema)} - {"config"})
LONG = int(os.environ.get("FUZZ", 1))  # `make fuzz` multiplies the examples
FEW = {"deadline": None, "database": None, "derandomize": LONG == 1}
FEW["suppress_health_check"] = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**30, -1, 0, 2**63, 1e308]))
words = st.one_of(
    numbers.map(str),
    st.text(max_size=12),
    st.sampled_from(["[", "{", "}", "[1", "null", "~", "!!python/object/apply:os.system [id]", "&a [*a]", "- -", "\0"]),
    st.text(string.printable, max_size=20),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
names = st.one_of(st.sampled_from(KEYS), st.text(string.ascii_lowercase + "._-", min_size=1, max_size=12))


def one_line(function, *arguments) -> None:
    """The function returns, or raises a UserError of one printable line."""
    try:
        function(*arguments)
    except UserError as error:
        assert str(error) and str(error).isprintable()
    except SystemExit as stop:
        assert stop.code == 0  # --help, --print_config


@settings(max_examples=25 * LONG, **FEW)
@given(st.sampled_from(SCHEMAS), st.lists(st.tuples(names, words), max_size=4))
@example(TrainConfig, [("seed", str(2**70))])
@example(TrainConfig, [("output", "\0")])
@example(AttackConfig, [("attack_options", "[" * 3000)])
def test_command_lines(schema, pairs):
    argv = ["--output=run", "--checkpoint=model.pt", *(f"--{key}={value}" for key, value in pairs)]
    one_line(load, schema, argv)


@settings(max_examples=15 * LONG, **FEW)
@given(st.sampled_from(SCHEMAS), st.lists(st.one_of(words, names.map("--{}".format)), max_size=5))
def test_arguments_in_any_order(schema, argv):
    one_line(load, schema, ["--output", "run", *argv])


@settings(max_examples=25 * LONG, **FEW)
@given(st.sampled_from(SCHEMAS), st.dictionaries(names, trees, max_size=4))
def test_config_files_of_any_values(tmp_path, schema, tree):
    nested = {}
    for key, value in tree.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place.get(section, {}), dict) else {}
        place[last] = value
    (tmp_path / "options.yaml").write_text(json.dumps({"output": "run"} | nested))
    one_line(load, schema, [f"--config={tmp_path / 'options.yaml'}"])


@settings(max_examples=25 * LONG, **FEW)
@given(st.binary(max_size=60))
@example(b"a: !!python/object/apply:os.system [touch pwned]")
@example(b"a: &a [*a]")
@example(b"output: run\nmodel: &a {name: *a}")
@example(b"[" * 1000)
def test_config_files_of_any_bytes(tmp_path, content):
    (tmp_path / "options.yaml").write_bytes(content)
    one_line(load, TrainConfig, ["--output", "run", f"--config={tmp_path / 'options.yaml'}"])


def test_a_config_file_that_grows_when_it_is_read_is_refused(tmp_path):
    """Nine lines of references to references are a billion values (the 'billion laughs')."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"bomb.yaml' grows to more than \d+ values"):
        load(TrainConfig, ["--output", "run", "--config", str(tmp_path / "bomb.yaml")])


@pytest.mark.parametrize("section", ["", " []", " 3", " text"])
def test_a_section_without_options_is_named(tmp_path, section):
    (tmp_path / "empty.yaml").write_text(f"optim:{section}\nmodel: {{depth: 3}}\n")
    with pytest.raises(UserError, match="optim"):
        load(TrainConfig, ["--output", "run", "--config", str(tmp_path / "empty.yaml")])


def test_references_between_options_are_fine(tmp_path):
    (tmp_path / "ok.yaml").write_text("model: {depth: &n 3}\noptim: {epochs: *n}\n")
    config, _ = load(TrainConfig, ["--output", "run", "--config", str(tmp_path / "ok.yaml")])
    assert (config.model.depth, config.optim.epochs) == (3, 3)


@settings(max_examples=15 * LONG, **FEW)
@given(st.dictionaries(st.sampled_from(["lr", "name", "x"]), st.one_of(words, trees), max_size=3))
def test_options_of_parts(given_options):
    def part(*, lr: float = 0.1, name: str = "a", generator=None):
        raise AssertionError

    one_line(options, given_options, part, "part_options")
    one_line(plain, given_options)


def test_options_cannot_be_abbreviated():
    with pytest.raises(UserError, match="unknown option 'overwr': did you mean 'overwrite'"):
        load(TrainConfig, ["--output", "run", "--overwr", "true"])


def test_what_is_resolved_reads_back_the_same(tmp_path):
    """config.yaml of a run repeats it, whatever its strings hold."""
    for text in ("a: b", "1e-3", "1_0", "0x1", "é ü \u2028", "- x", "{", "yes"):
        config, resolved = load(AttackConfig, ["--model=lenet", "--images=pictures", f"--output={text}"])
        (tmp_path / "config.yaml").write_text(resolved)
        again, _ = load(AttackConfig, ["--config", str(tmp_path / "config.yaml")])
        assert again == config and again.output == text
        assert yaml.safe_load(resolved)["output"] == text
