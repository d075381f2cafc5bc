"""A command line and its config files as people write them, rewritten as the parser wants them.

Hyphens are underscores, sections may be left out where that is unambiguous, lists are written 0,0.5 or with spaces,
switches without a value.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml

from utils.aliases import current_file, current_option, current_value
from utils.errors import UserError, no_such_path
from utils.schema import (
    alternatives,
    chosen_parts,
    full_name,
    option_types,
    relatives,
    script_of,
    sections_of,
    unknown_option,
)

LARGEST = 100_000  # values of a config file: references to references can make a billion of a few lines
OWN = ("config", "print_config")  # options of the parser itself


def arrange(arguments: Sequence[str], schema: type) -> list[str]:
    """Return the command line as `--option=value` words, config files as their content. Raises UserError naming an
    option that is unknown or ambiguous, a word that belongs to none, and a config file that cannot be used."""
    types, result, place = option_types(schema), [], 0
    while place < len(arguments):
        word, place = arguments[place], place + 1
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected '{word}': write options as --name VALUE, config files as --config FILE")
        written, equals, value = word[2:].partition("=")
        name = full_name(current_option(written.replace("-", "_")), [*types, *sections_of(types), *OWN])
        if name is None:
            raise unknown_option(written, schema, chosen_parts(schema, arguments))
        values = [registered(name, value, types.get(name))] if equals else []
        several = any(get_origin(each) in (list, tuple) for each in alternatives(types.get(name)))
        while not equals and place < len(arguments) and not arguments[place].startswith("--"):
            values.append(registered(name, arguments[place], types.get(name)))
            place += 1
            if not several:
                break
        result.append(_word(name, values, types.get(name), schema))
    return result


def registered(name: str, value: str, hint) -> str:
    """Return the present name of a value of an option; of listed names, with hyphens or underscores alike."""
    value = current_value(name, value)
    listed = [choice for each in alternatives(hint) if get_origin(each) is Literal for choice in get_args(each)]
    return value if value in listed or (meant := value.replace("-", "_")) not in listed else meant


def _word(name: str, values: list[str], hint, schema: type) -> str:
    if name == "config" and values:
        return f"--config={read_config(values[0], schema)}"
    if not values:
        return f"--{name}=true" if hint is bool else f"--{name}"
    types = alternatives(hint)
    sequence = next((each for each in types if get_origin(each) in (list, tuple)), None)
    if sequence is None:
        return f"--{name}={values[0]}"
    if values[0].startswith("[") and not os.path.exists(values[0]):  # YAML
        return f"--{name}={' '.join(values)}"
    if str not in alternatives(get_args(sequence)[0]):
        return f"--{name}=[{','.join(values)}]"
    items = [item for value in values for item in ([value] if os.path.exists(value) else value.split(","))]
    if len(items) == 1 and str in types:
        return f"--{name}={items[0]}"
    tree = items  # as a config, which does not take words such as 'yes' or '3:6' for something else
    for section in reversed(name.split(".")):
        tree = {section: tree}
    return f"--config={json.dumps(tree)}"


def read_config(path: str, schema: type) -> str:
    """Return the text of a config file, with the full names of its options.

    Raises UserError where it cannot be read, is no YAML of options, has an option the script does not have, or is a
    config of another script.
    """
    path = current_file(path)
    if not Path(path).exists():
        raise UserError(f"config file {no_such_path(path)}")
    try:
        text = Path(path).read_text()
        content = yaml.safe_load(text)
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
    tree, types = yaml.compose(text, yaml.SafeLoader), option_types(schema)
    if odd := _misfits(tree, types):
        if others := [script_of(other) for other in relatives(schema) if not _misfits(tree, option_types(other))]:
            raise UserError(
                f"config file '{path}' is a config of {' or '.join(others)}, and this is {script_of(schema)}: "
                f"'{odd[0]}' does not fit here"
            )
        if odd[0] not in types:
            raise UserError(f"config file '{path}': {unknown_option(odd[0], schema, {})}")
    for name, key, value in _keys(tree, types):
        key.value = current_option(key.value.replace("-", "_")) if name in types else key.value
        if isinstance(value, yaml.ScalarNode):
            value.value = registered(name, value.value, types.get(name))
    return yaml.serialize(tree, Dumper=yaml.SafeDumper)


def _misfits(tree: yaml.MappingNode, types: dict[str, type]) -> list[str]:
    """Return the options in a config file that a script does not have, or that hold a section where it has a value."""
    return [
        name
        for name, _, value in _keys(tree, types)
        if name not in types or (isinstance(value, yaml.MappingNode) and dict not in alternatives(types[name]))
    ]


def _keys(
    tree: yaml.MappingNode, options: dict[str, type], prefix: str = ""
) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (full name, node of its key, of its value) of every option in a config file; unknown ones as they are
    written."""
    sections = sections_of(options)
    for key, value in tree.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from _keys(merged, options, prefix)
            continue
        if not isinstance(key, yaml.ScalarNode):
            yield prefix + yaml.serialize(key).strip(), key, value
            continue
        written = f"{prefix}{key.value}"
        name = current_option(written.replace("-", "_"))
        if name in sections and name not in options:
            if isinstance(value, yaml.MappingNode):
                key.value = key.value.replace("-", "_")
                yield from _keys(value, options, f"{name}.")
            continue
        yield (name if name in options else written), key, value


def _is_large(tree: object) -> bool:
    """Return whether a tree has more than `LARGEST` values, those that references stand for counted each time."""
    left, number = [tree], 0
    while left and number <= LARGEST:
        item = left.pop()
        number += 1
        left += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return number > LARGEST
