"""What --help prints: the options one mostly needs, all of them with --help-all, those of one attack with
--attack NAME --help."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from textwrap import wrap
from typing import Literal, get_args, get_origin, get_type_hints

from utils.errors import look_up
from utils.schema import alternatives, chosen_parts, script_of
from utils.signatures import Part, Unknown, described_fields, read_object, read_part

WIDTH = 110  # columns of the text
COLUMN = 33  # at which descriptions start
HELP = ("-h", "--help", "--help-all")
WORDS = {int: "INT", float: "FLOAT", str: "TEXT", bool: "true|false", dict: "{NAME:VALUE}"}


@dataclass(frozen=True)
class Entry:
    """One option of a script: dotted name, type and default as people read them, and what it means."""

    name: str
    kind: str
    default: str
    help: str
    required: bool


def help_asked(words: Sequence[str]) -> bool:
    """Return whether a command line asks for help."""
    return any(word.replace("_", "-") in HELP for word in words)


def help_text(schema: type, words: Sequence[str]) -> str:
    """Return the help that a command line asks for. Raises UserError for a part that does not exist."""
    if chosen := chosen_parts(schema, words):
        return "\n\n".join(_part_text(schema, selector, name) for selector, name in chosen.items())
    everything = any(word.replace("_", "-") == "--help-all" for word in words)
    script, lines = script_of(schema), []
    for owner, entries in _groups(schema):
        lines.append(f"Options of {script}:" if owner is schema else f"{_title(owner)}:")
        shown = [entry for entry in entries if everything or entry.name in schema.common]
        for entry in shown:
            lines += _lines(entry, whole=everything)
        if more := [entry.name for entry in entries if entry not in shown]:
            lines += _wrapped(f"more: {' '.join(f'--{name}' for name in more)}")
    head = [f"usage: {schema.usage}", "", *wrap(" ".join((schema.__doc__ or "").split()), WIDTH)]
    head += _columns("  --config FILE", "YAML file of options; may be given several times, later files win")
    head += _columns("  --print_config", "Print all options as YAML, and end")
    parts = "|".join(f"--{name}" for name in schema.parts)
    tail = [f"{script} {parts} NAME --help: what it does, and its options"] if parts else []
    if not everything:
        tail.insert(0, f"{script} --help-all: every option with its meaning, unit, type and default")
    tail.append(
        "Hyphens stand for underscores. The part before a dot may be left out where one option ends so (--path)."
    )
    return "\n".join([*head, "", *lines, "", *tail])


def _wrapped(text: str) -> list[str]:
    return wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _groups(schema: type) -> list[tuple[type, list[Entry]]]:
    """Return (class, options) of every class that declares options, the schema's own first."""
    groups: dict[type, list[Entry]] = {}
    owners = [cls for cls in schema.__mro__ if is_dataclass(cls)]
    for owner, entry in _entries(schema, owners, ""):
        groups.setdefault(owner, []).append(entry)
    order = [*owners, *(owner for owner in groups if owner not in owners)]
    return [(owner, groups[owner]) for owner in order if owner in groups]


def _entries(schema: type, owners: Sequence[type], prefix: str) -> Iterator[tuple[type, Entry]]:
    hints, texts, idle = get_type_hints(schema), {}, getattr(schema, "idle", ())
    for cls in reversed(owners):
        texts |= described_fields(cls.__module__, cls.__name__)
    for item in (item for item in fields(schema) if item.name not in idle):
        hint = hints[item.name]
        if is_dataclass(hint):
            inner = [cls for cls in hint.__mro__ if is_dataclass(cls)]
            yield from _entries(hint, inner, f"{prefix}{item.name}.")
            continue
        first = schema if prefix else [cls for cls in owners if item.name in vars(cls).get("__annotations__", {})][-1]
        required = item.default is MISSING and item.default_factory is MISSING
        default = None if required else item.default if item.default is not MISSING else item.default_factory()
        yield first, Entry(prefix + item.name, _kind(hint), _value(default), texts.get(item.name, ""), required)


def _title(owner: type) -> str:
    return " ".join((owner.__doc__ or owner.__name__).split("\n\n")[0].split()).rstrip(".")


def _kind(hint) -> str:
    """Return a type as people read it: INT, FLOAT,..., one|two."""
    found, repeated = [], []
    for each in alternatives(hint):
        if get_origin(each) is Literal:
            found += [str(value) for value in get_args(each)]
        elif get_origin(each) is list:
            repeated += [_kind(one) for one in alternatives(get_args(each)[0])]
            found.append(f"{_kind(get_args(each)[0])},...")
        elif get_origin(each) is tuple:
            found.append(",".join("..." if one is Ellipsis else _kind(one) for one in get_args(each)))
        elif each is not type(None):
            found.append(WORDS.get(each, str(each)))
    return "|".join(dict.fromkeys(one for one in found if one not in repeated))  # a list may hold one alone


def _value(value: object) -> str:
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _lines(entry: Entry, whole: bool) -> list[str]:
    """Return one option as lines: all that is known of it, or its name and what it is in a few words."""
    kind = entry.kind if len(entry.kind) <= 24 else "NAME"
    notes = ["required"] if entry.required else [f"default {entry.default}"] if entry.default else []
    if whole and not notes and "default" not in entry.help:
        notes = ["default none"]
    text = entry.help if whole else brief(entry.help)
    notes += [f"one of {entry.kind.replace('|', ', ')}"] * (whole and kind == "NAME")
    return _columns(f"  --{entry.name} {kind}", text + (f" ({'; '.join(notes)})" if notes else ""))


def brief(text: str) -> str:
    """Return the first clause of a description, of three words at least."""
    for found in re.finditer(r"(?<!e\.g)[.;:](?= |$)", text):
        inside = text.count("(", 0, found.start()) > text.count(")", 0, found.start())
        if text.count(" ", 0, found.start()) >= 2 and not inside:
            return text[: found.start()]
    return text


def _columns(head: str, text: str) -> list[str]:
    rest = wrap(text, WIDTH - COLUMN, break_on_hyphens=False) or [""]
    first = [head.ljust(COLUMN) + rest.pop(0)] if len(head) < COLUMN else [head]
    return [line.rstrip() for line in [*first, *(" " * COLUMN + line for line in rest)]]


def _part_text(schema: type, selector: str, name: str) -> str:
    """Return one attack or defence and its options."""
    options, registry = schema.parts[selector]
    declaration = look_up(registry.data, name, selector)
    if isinstance(declaration, str):
        part = read_part(declaration)
    else:
        part = Part((declaration.__doc__ or "").strip(), declaration.__module__, read_object(declaration))
    lines = [f"{selector} '{name}' ({part.place})", "", *part.doc.splitlines(), ""]
    if not part.options:
        return "\n".join([*lines, "It has no options."])
    lines.append(f"options, as --{options}.NAME VALUE:")
    for option in part.options.values():
        kind = "|".join(WORDS.get(_type(word), word) for word in option.kind.split(" | ") if word != "None")
        default = _value(option.default) if option.default is not Unknown else option.text
        lines += _columns(f"  {option.name} {kind}", f"{option.help} (default {default or 'none'})".strip())
    return "\n".join(lines)


def _type(word: str) -> type | None:
    return {kind.__name__: kind for kind in WORDS}.get(word)
