"""What a schema, a frozen dataclass of options, offers: its options, the sections they stand in, and its relatives.

A schema of a script says of itself, as class variables: `script` (how people call it), `usage` (a line that shows the
options one always gives), `common` (the options --help describes), and `parts` ({option that selects a part: (option
that holds the part's own options, registry)}), and, where a relative has options that this script has no use for,
`idle` (their names: --help leaves them out).
"""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

from utils.aliases import current_value
from utils.checks import check
from utils.errors import UserError
from utils.signatures import Option, read_object, read_part

NEAR = 0.6  # least similarity of names that are taken for misspellings of each other


def option_types(schema: type, prefix: str = "") -> dict[str, type]:
    """Return every dotted option of a schema with its type."""
    hints, types = get_type_hints(schema), {}
    for item in fields(schema):
        hint = hints[item.name]
        types |= option_types(hint, f"{prefix}{item.name}.") if is_dataclass(hint) else {prefix + item.name: hint}
    return types


def changed(config: object, names: Iterable[str] | None = None) -> list[str]:
    """Return which options of a configuration, or which of these, do not have their default."""
    found = []
    for item in fields(config):
        if names is None or item.name in names:
            default = item.default if item.default is not MISSING else item.default_factory()
            found += [item.name] * (getattr(config, item.name) != default)
    return found


def refuse_changed(config: object, rule: str, names: Iterable[str] | None = None, section: str = "") -> None:
    """Raise UserError, naming the rule, where an option of a configuration, or one of these, has not its default: it
    would change nothing. section: that the options stand in, with its dot."""
    for name in changed(config, names):
        value = getattr(config, name)
        if is_dataclass(value):
            refuse_changed(value, rule, section=f"{section}{name}.")
        check(False, f"{section}{name}", rule, value)


def sections_of(options: Iterable[str]) -> set[str]:
    """Return the sections that dotted options stand in: 'data' and 'data.text' for 'data.text.max_length'."""
    return {name[:place] for name in options for place, letter in enumerate(name) if letter == "."}


def alternatives(hint) -> tuple:
    """Return the types of a union, or the one type that is no union."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def script_of(schema: type) -> str:
    """Return how people call the script of a schema."""
    return getattr(schema, "script", Path(sys.argv[0]).name)


def relatives(schema: type) -> list[type]:
    """Return the schemas of the other scripts: classes that share a base with it and name a script of their own."""
    found, left = [], [base for base in schema.__mro__[1:] if base is not object]
    while left:
        one = left.pop(0)
        left += one.__subclasses__()
        if "script" in vars(one) and one is not schema and one not in found:
            found.append(one)
    return found


def full_name(name: str, known: Iterable[str]) -> str | None:
    """Return the option that is meant by a name with hyphens or without its sections; None where there is none.

    Raises UserError, listing the candidates, where several sections have an option of that name.
    """
    name, known = name.replace("-", "_"), set(known)
    if name in known or any(name.startswith(f"{option}.") for option in known):  # the latter into a dictionary
        return name
    found = sorted(option for option in known if option.endswith(f".{name}"))
    if len(found) > 1:
        raise UserError(f"option '{name}' is ambiguous: write {' or '.join(f'--{option}' for option in found)}")
    return found[0] if found else None


def part_options(schema: type, selector: str, name: str) -> dict[str, Option]:
    """Return the options of the part `name` of the registry behind the option `selector`; none of unknown ones."""
    declaration = schema.parts[selector][1].data.get(name)
    if declaration is None:
        return {}
    return read_part(declaration).options if isinstance(declaration, str) else read_object(declaration)


def unknown_option(name: str, schema: type, chosen: dict[str, str]) -> UserError:
    """Return the error for an option a script does not have, with what may be meant. chosen: the parts by their
    selectors."""
    name, known = name.replace("-", "_"), list(option_types(schema))
    for selector, (options, _) in getattr(schema, "parts", {}).items():
        if name in part_options(schema, selector, chosen.get(selector, "")):
            hint = f"it is an option of {selector} '{chosen[selector]}', write --{options}.{name}"
            return UserError(f"unknown option '{name}': {hint}")
    hint = suggest(name, known)
    if not hint:
        others = [(one, option) for one in relatives(schema) for option in option_types(one)]
        found = [(one, option) for one, option in others if name in (option, option.rpartition(".")[2])]
        hint = f"{script_of(found[0][0])} has --{found[0][1]}, this script does not" if found else "nothing is like it"
    return UserError(f"unknown option '{name}': {hint} (see {script_of(schema)} --help)")


def suggest(name: str, known: Sequence[str]) -> str:
    """Return a question that offers the known names a wrong one may stand for, empty where none is near."""
    last = {option: option.rpartition(".")[2] for option in known}
    near = [option for option in known if last[option] == name]
    if not near and len(name) > 2:
        near = [option for option in known if option.startswith(name) or last[option].startswith(name)]
    if not near or len(near) > 4:
        likeness = {option: max(_likeness(name, option), _likeness(name, last[option])) for option in known}
        near = [option for option in sorted(likeness, key=likeness.get, reverse=True)[:1] if likeness[option] >= NEAR]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def chosen_parts(schema: type, arguments: Sequence[str]) -> dict[str, str]:
    """Return the parts that a command line selects by name, with `--attack NAME` or `--attack=NAME`; the last one
    counts."""
    found = {}
    for selector in getattr(schema, "parts", {}):
        for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
            if match := re.fullmatch(rf"--{selector}(=(.*))?", argument.replace("-", "_").replace("__", "--", 1)):
                name = current_value(selector, match[2] if match[1] else after)
                found[selector] = name if name in schema.parts[selector][1].data else name.replace("-", "_")
    return found
