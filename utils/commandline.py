"""From YAML files and a command line to a checked dataclass.

`load(TrainConfig, argv)` reads `--config FILE.yaml` (repeatable, later wins) and dotted overrides (`--optim.lr 1e-3`).
Unknown keys, wrong types and values out of range stop the run in one line before data or model are touched.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from utils.errors import UserError, did_you_mean

set_parsing_settings(docstring_parse_attribute_docstrings=True)
Config = TypeVar("Config")
NUMBER = re.compile(r"[-+]?[\d._]+([eE][-+]?\d+)?")
LARGEST = 100_000  # values of a config file: references to references can make a billion of a few lines


class Parser(ArgumentParser):
    """jsonargparse with one-line errors that name the key and its nearest valid neighbour."""

    known_keys: list[str] = []

    def error(self, message, ex=None):
        text = " ".join(re.sub(r"<class '(\w+)'>", r"\1", str(message)).replace("typing.", "").split())
        if unknown := re.search(
            r"(?:arguments: --|[Oo]ption '|[Kk]ey ')([\w.]+)(?:' is not accepted|' is not exp|[^']*$)", text
        ):
            text = self._unknown(unknown[1])
        elif in_group := re.search(r"Group '([\w.]+)' does not accept .*'([\w.]+)'", text):
            text = self._unknown(f"{in_group[1]}.{in_group[2]}")
        elif wrong := self._value_error(text):
            text = self._wrong(*wrong.groups())
        raise UserError(f"{text} (see {self.prog} --help)")

    def _value_error(self, text: str) -> re.Match | None:
        """Key, expected type and value, from the parser's two ways of saying it."""
        single = re.search(r'key "([\w.]+)": Expected an? (.+?)\. Got value: (.*)', text)
        return single or re.search(r'key "([\w.]+)": .*Subtypes: \[(.+)\] Errors.*Given value: (.*)', text)

    def _unknown(self, key: str) -> str:
        return f"unknown option '{key}': {did_you_mean(key, self.known_keys)}"

    def _wrong(self, key: str, expected: str, value: str) -> str:
        choices = re.findall(r"'(\w+)'", expected)
        if choices and not re.search(r"\b(int|float)\b", expected):
            return f"--{key}: unknown value '{value}': {did_you_mean(value, choices)}"
        return f"--{key}: expected {expected.replace('NoneType', 'null').replace(', ', ' or ')}, got '{value}'"


class Dumper(yaml.SafeDumper):
    """YAML that the parser reads back as it was: it takes 1e-3 for a number, which PyYAML writes as a bare string."""

    def represent_str(self, data: str) -> yaml.Node:
        quoted = NUMBER.fullmatch(data) or not data.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if quoted else None)


Dumper.add_representer(str, Dumper.represent_str)


def option_types(schema: type, prefix: str = "") -> dict[str, type]:
    """Every dotted option of a schema with its type."""
    hints, types = get_type_hints(schema), {}
    for item in fields(schema):
        hint = hints[item.name]
        types |= option_types(hint, f"{prefix}{item.name}.") if is_dataclass(hint) else {prefix + item.name: hint}
    return types


def load(schema: type[Config], argv: Sequence[str] | None = None) -> tuple[Config, str]:
    """Parse a command line into `schema`. Returns (config, resolved YAML that repeats the run).

    Lists may be written 0,0.1,0.3 and switches without a value. Raises UserError for anything that is not right.
    """
    parser = _build_parser(schema, Path(sys.argv[0]).name)
    arguments = _normalize(list(sys.argv[1:] if argv is None else argv), option_types(schema))
    _check_config_files(arguments)
    try:
        parsed = parser.parse_args(arguments)
        for name, hint in get_type_hints(schema).items():
            if is_dataclass(hint) and not isinstance(parsed[name], Namespace):
                raise UserError(f"section '{name}' must hold options as 'key: value' lines or be left out")
        values = parser.instantiate(parsed)
    except RecursionError:
        raise UserError("an option is nested too deeply to be one") from None
    names = [item.name for item in fields(schema)]
    resolved = yaml.dump({name: parsed.as_dict()[name] for name in names}, Dumper=Dumper, sort_keys=False)
    return schema(**{name: values[name] for name in names}), resolved


def read_options(schema: type[Config], argv: Sequence[str] | None = None) -> tuple[Config, str]:
    """`load`, and check that the files and folders the run will read (`schema.inputs()`) exist."""
    config, resolved = load(schema, argv)
    for path in filter(None, config.inputs()):
        if not Path(path).exists():
            raise UserError(f"'{path}' does not exist: check the path")
    return config, resolved


@cache
def _build_parser(schema: type, prog: str) -> Parser:
    parser = Parser(prog=prog, description=schema.__doc__, allow_abbrev=False)
    parser.known_keys = list(option_types(schema))
    parser.add_argument("--config", action="config", help="YAML file of options; repeatable, later files win.")
    parser.add_class_arguments(schema, as_group=False)
    return parser


def _normalize(arguments: list[str], types: dict[str, type]) -> list[str]:
    """Rewrite `--mask_ratios 0,0.1` as the YAML list the parser wants, and `--overwrite` as `--overwrite true`."""
    sequences = {
        f"--{key}" for key, hint in types.items() if {list, tuple} & {get_origin(h) for h in (hint, *get_args(hint))}
    }
    switches = {f"--{key}" for key, hint in types.items() if hint is bool}
    result = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        if equals and name in sequences and not value.startswith("["):
            argument = f"{name}=[{value}]"
        elif position and arguments[position - 1] in sequences and not argument.startswith(("[", "--")):
            argument = f"[{argument}]"
        elif argument in switches and following.startswith("--"):
            argument = f"{argument}=true"
        result.append(argument)
    return result


def _check_config_files(arguments: list[str]) -> None:
    """Name the file that cannot be read, which the parser does not."""
    for position, argument in enumerate(arguments):
        name, equals, path = argument.partition("=")
        if name != "--config" or (not equals and position + 1 == len(arguments)):
            continue
        path = path if equals else arguments[position + 1]
        try:
            content = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise UserError(
                f"config file '{path}' cannot be read ({error.strerror}): pass an existing YAML file"
            ) from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"config file '{path}' is not YAML: {' '.join(str(error).split())[:160]}") from error
        if _is_large(content):
            raise UserError(f"config file '{path}' grows to more than {LARGEST} values: write out what it refers to")
        if not isinstance(content, dict):
            raise UserError(f"config file '{path}' must hold options as 'key: value' lines")


def _is_large(tree: object) -> bool:
    """Whether a tree has more than `LARGEST` values, those that references stand for counted each time."""
    left, number = [tree], 0
    while left and number <= LARGEST:
        item = left.pop()
        number += 1
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return number > LARGEST


def options(given: dict, function: Callable, prefix: str) -> dict:
    """Values for the keyword-only parameters of `function`, checked by name and read as YAML (`1e-3` is a number).

    `generator` and `watch` are the caller's business, not the user's.
    """
    allowed = {name for name, item in signature(function).parameters.items() if item.kind is item.KEYWORD_ONLY}
    allowed -= {"generator", "watch"}
    for key in given:
        if key not in allowed:
            known = did_you_mean(key, allowed) if allowed else "it takes none"
            raise UserError(f"unknown option '{prefix}.{key}': {known}")
    values = plain(given)
    for key, value in values.items():
        wanted = type(signature(function).parameters[key].default)
        if wanted is str and not isinstance(value, (str, dict, list)):
            value = values[key] = "" if value is None else str(given[key])  # a policy such as 26 is not a number
        if not isinstance(value, (float, int) if wanted is float else wanted) and wanted is not type(None):
            raise UserError(f"--{prefix}.{key}: expected {wanted.__name__}, got '{value}'")
    return values


def plain(given: dict) -> dict:
    """Command-line strings as the YAML values they mean; PyYAML alone reads 1e-3 as a string."""
    number = re.compile(r"[-+]?[\d.]+[eE][-+]?\d+")
    values = {}
    for key, value in given.items():
        try:
            is_number = isinstance(value, str) and number.fullmatch(value)
            values[key] = float(value) if is_number else yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise UserError(f"option '{key}': '{value}' is not a value") from error
    return values
