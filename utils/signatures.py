"""The options of a part of the project, read from its source without importing it: --help does not wait for torch.

A part is a function (its keyword-only arguments, documented under `Args:`), a `partial` of one (other defaults), a
dataclass (its fields, documented by the string below each), an instance of one (other defaults) or its `replace`, or
what a function makes of such an instance: `gradient_matching(MatchingOptions(lr=1.0))`.
"""

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from inspect import cleandoc, getdoc, signature
from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the project, whose parts these are
CALLER = ("generator", "watch")  # arguments that are the caller's business, not the user's


class Unknown:
    """A default that is no plain value, such as the result of a call."""


@dataclass(frozen=True)
class Option:
    """One option. default: its value; `Unknown` where the source has more than a plain value, None where it is
    required. kind, text: type and default as they are written. help: what it means, in one paragraph."""

    name: str
    kind: str
    default: object
    text: str
    help: str = ""


@dataclass(frozen=True)
class Part:
    """What a part says of itself. doc: of its module. place: its file, from the root of the project."""

    doc: str
    place: str
    options: dict[str, Option]


@cache
def read_part(declaration: str) -> Part:
    """Read 'package.module:object'. Raises LookupError where that is no function, partial or dataclass."""
    module, _, name = declaration.partition(":")
    tree, path = parse(module)
    parts = module.split(".")
    place = "/".join([*parts, path.name] if path.name == "__init__.py" else [*parts[:-1], path.name])
    return Part(cleandoc(ast.get_docstring(tree) or ""), place, _options(module, name))


def read_object(part: Callable) -> dict[str, Option]:
    """Return the options of a part that is at hand as an object."""
    parameters = [item for item in signature(part).parameters.values() if item.kind is item.KEYWORD_ONLY]
    documented = described(getdoc(part) or "")
    return {
        item.name: Option(
            item.name, str(item.annotation), item.default, repr(item.default), documented.get(item.name, "")
        )
        for item in parameters
        if item.name not in CALLER
    }


@cache
def parse(module: str) -> tuple[ast.Module, Path]:
    """Return (syntax tree, file) of a module of the project; neither it nor a package it is in is imported. __main__ is
    the one that runs, as by `python -m`."""
    if module == "__main__" and (running := getattr(sys.modules[module], "__file__", None)):
        return ast.parse(Path(running).read_text(encoding="utf-8")), Path(running)
    place = ROOT.joinpath(*module.split("."))
    path = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    if not path.is_file():
        raise LookupError(f"no module {module}")
    return ast.parse(path.read_text(encoding="utf-8")), path


def described_fields(module: str, name: str) -> dict[str, str]:
    """Return what a dataclass says of each field it declares itself, from the strings below them."""
    tree, _ = parse(module)
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {key: option.help for key, option in _of_class(node).items()}


def _options(module: str, name: str) -> dict[str, Option]:
    tree, _ = parse(module)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of_function(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [_options(*_find(module, base.id)) for base in node.bases if isinstance(base, ast.Name)]
            return {key: value for base in reversed(bases) for key, value in base.items()} | _of_class(node)
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return _of_value(module, node.value)
    found = _find(module, name)
    if found == (module, name):
        raise LookupError(f"{module} has no {name}")
    return _options(*found)


def _find(module: str, name: str) -> tuple[str, str]:
    """Return (module, name there) of what a module calls `name`."""
    for node in parse(module)[0].body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return node.module or "", alias.name
    return module, name


def _of_function(node: ast.FunctionDef) -> dict[str, Option]:
    documented = described(ast.get_docstring(node) or "")
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return {
        argument.arg: _option(argument.arg, argument.annotation, default, documented.get(argument.arg, ""))
        for argument, default in pairs
        if argument.arg not in CALLER
    }


def _of_class(node: ast.ClassDef) -> dict[str, Option]:
    found = {}
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).startswith("ClassVar"):
            continue
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        name = ast.unparse(field.target)
        found[name] = _option(name, field.annotation, field.value, " ".join(str(text).split()))
    return found


def _of_value(module: str, value: ast.expr) -> dict[str, Option]:
    """Read the options behind an expression; what it sets by keyword are other defaults."""
    if isinstance(value, ast.Name):
        return _options(module, value.id)
    if not isinstance(value, ast.Call):
        raise LookupError(f"{module}: {ast.unparse(value)[:40]} is no part")
    if not value.args:  # a dataclass and its values
        options = dict(_options(module, ast.unparse(value.func)))
    elif ast.unparse(value.func) in ("partial", "replace"):
        options = dict(_of_value(module, value.args[0]))
    else:
        return _of_value(module, value.args[0])
    for keyword in value.keywords:
        before = options[keyword.arg]
        options[keyword.arg] = replace(before, default=_value(keyword.value), text=ast.unparse(keyword.value))
    return options


def _option(name: str, annotation: ast.expr | None, default: ast.expr | None, text: str) -> Option:
    kind = ast.unparse(annotation) if annotation else ""
    return Option(name, kind, _value(default), ast.unparse(default) if default else "", text)


def _value(node: ast.expr | None) -> object:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return Unknown


def described(docstring: str) -> dict[str, str]:
    """Return what the `Args:` of a docstring say of each argument, as one paragraph; `a, b: text` describes both."""
    lines, found, names = cleandoc(docstring).splitlines(), {}, []
    start = lines.index("Args:") + 1 if "Args:" in lines else len(lines)
    for line in lines[start:]:
        if line and not line.startswith(" "):
            break
        if head := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = head[1].split(", ")
            found |= dict.fromkeys(names, head[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
