"""From YAML files and a command line to a checked dataclass.

`load(TrainConfig, argv)` reads `--config FILE.yaml` (repeatable, later wins) and dotted overrides (`--optim.lr 1e-3`,
or `--lr` where no other option ends so). Unknown keys, wrong types and values out of range stop the run in one line
before data or model are touched. Only a run that goes on loads torch.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from utils.arguments import arrange
from utils.errors import UserError, did_you_mean, no_such_path
from utils.help import help_asked, help_text
from utils.schema import option_types, part_options, script_of, unknown_option
from utils.signatures import CALLER, Unknown

__all__ = ["load", "option_types", "options", "plain", "read_options"]
set_parsing_settings(docstring_parse_attribute_docstrings=True)
Config = TypeVar("Config")
NUMBER = re.compile(r"[-+]?[\d._]+([eE][-+]?\d+)?")


class Parser(ArgumentParser):
    """jsonargparse with one-line errors that name the key and its nearest valid neighbour."""

    schema: type

    def error(self, message, ex=None):
        text = " ".join(re.sub(r"<class '(\w+)'>", r"\1", str(message)).replace("typing.", "").split())
        if unknown := re.search(
            r"(?:arguments: --|[Oo]ption '|[Kk]ey ')([\w.]+)(?:' is not accepted|' is not exp|[^']*$)", text
        ):
            raise unknown_option(unknown[1], self.schema, {})
        if in_group := re.search(r"Group '([\w.]+)' does not accept .*'([\w.]+)'", text):
            raise unknown_option(f"{in_group[1]}.{in_group[2]}", self.schema, {})
        if missing := re.search(r"arguments are required: (.+)", text):
            text = f"missing: {', '.join(f'--{name}' for name in missing[1].split(', '))}"
        elif wrong := self._value_error(text):
            text = self._wrong(*wrong.groups())
        raise UserError(f"{text} (see {self.prog} --help)")

    def _value_error(self, text: str) -> re.Match | None:
        """Return key, expected type and value, from the parser's two ways of saying it."""
        single = re.search(r'key "([\w.]+)": Expected an? (.+?)\. Got value: (.*)', text)
        return single or re.search(r'key "([\w.]+)": .*Subtypes: \[(.+)\] Errors.*Given value: (.*)', text)

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


def load(schema: type[Config], argv: Sequence[str] | None = None) -> tuple[Config, str]:
    """Parse a command line into `schema`. Returns (config, resolved YAML that repeats the run).

    Lists may be written 0,0.1,0.3 and switches without a value. --help ends the process. Raises UserError for anything
    that is not right.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if help_asked(words):
        with suppress(BrokenPipeError):  # of `--help | head`
            print(help_text(schema, words), flush=True)
        sys.exit(0)
    parser = _build_parser(schema)
    try:
        parsed = parser.parse_args(arrange(words, schema))
        for name, hint in get_type_hints(schema).items():
            if is_dataclass(hint) and not isinstance(parsed[name], Namespace):
                raise UserError(f"section '{name}' must hold options as 'key: value' lines or be left out")
        values = parser.instantiate(parsed)
    except RecursionError:
        raise UserError("an option is nested too deeply to be one") from None
    names = [item.name for item in fields(schema)]
    resolved = yaml.dump({name: parsed.as_dict()[name] for name in names}, Dumper=Dumper, sort_keys=False)
    config = schema(**{name: values[name] for name in names})
    for selector, (key, _) in getattr(schema, "parts", {}).items():
        known = {name: one.default for name, one in part_options(schema, selector, getattr(config, selector)).items()}
        _check_options(getattr(config, key), known, key)
    return config, resolved


def read_options(schema: type[Config], argv: Sequence[str] | None = None) -> tuple[Config, str]:
    """Load the options and check that the files and folders the run will read (`schema.inputs()`) exist. What is right
    makes a run, for which torch, torchvision and timm are loaded here, the quick way."""
    config, resolved = load(schema, argv)
    for path in filter(None, config.inputs()):
        if not Path(path).exists():
            raise UserError(no_such_path(path))
    import utils.light_imports  # noqa: F401

    return config, resolved


@cache
def _build_parser(schema: type) -> Parser:
    parser = Parser(prog=script_of(schema), description=schema.__doc__, allow_abbrev=False)
    parser.schema = schema
    parser.add_argument("--config", action="config", help="YAML file of options; repeatable, later files win.")
    parser.add_class_arguments(schema, as_group=False)
    return parser


def options(given: dict, function: Callable, prefix: str) -> dict:
    """Return the values for the keyword-only parameters of `function`, checked by name and read as YAML (`1e-3` is a
    number)."""
    parameters = signature(function).parameters.values()
    known = {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}
    return _check_options(given, {name: default for name, default in known.items() if name not in CALLER}, prefix)


def _check_options(given: dict, known: Mapping[str, object], prefix: str) -> dict:
    """Return the options of a part as values, checked against the names and the types of its defaults."""
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) if known else "it takes none"
            raise UserError(f"unknown option '{prefix}.{key}': {hint}")
    values = plain(given)
    for key, value in values.items():
        wanted = type(known[key])
        if wanted is str and not isinstance(value, (str, dict, list)):
            value = values[key] = "" if value is None else str(given[key])  # a policy such as 26 is not a number
        fits = known[key] in (None, Unknown) or isinstance(value, (float, int) if wanted is float else wanted)
        if not fits:
            raise UserError(f"--{prefix}.{key}: expected {wanted.__name__}, got '{value}'")
    return values


def plain(given: dict) -> dict:
    """Return command-line strings as the YAML values they mean; PyYAML alone reads 1e-3 as a string."""
    number = re.compile(r"[-+]?[\d.]+[eE][-+]?\d+")
    values = {}
    for key, value in given.items():
        try:
            is_number = isinstance(value, str) and number.fullmatch(value)
            values[key] = float(value) if is_number else yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise UserError(f"option '{key}': '{value}' is not a value") from error
    return values
