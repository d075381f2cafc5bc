"""Messages name only options of the script that speaks.

A module may speak for every script that imports it, directly or not. A message may name options of another script if it
names that script too.
"""

import ast
import re
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from options import AttackConfig, AuditConfig, ConsistencyConfig, EvalConfig, TrainConfig
from utils.errors import UserError
from utils.schema import full_name, option_types

ROOT = Path(__file__).parents[1]
PACKAGES = ("attacks", "campaigns", "data", "defenses", "eval", "models", "options", "reports", "training", "utils")
SCHEMAS = (TrainConfig, EvalConfig, ConsistencyConfig, AttackConfig)
NAMED = (*SCHEMAS, AuditConfig)  # scripts that messages may point to
OWN = {"config", "help", "help-all", "print_config"}
ONLY = {  # modules that several scripts load and fewer use
    "attacks/": ("attack.py",),
    "defenses/": ("train.py", "attack.py"),
    "defenses/base.py": ("train.py",),  # check_training; the rest names --defense_options, which both have
    "defenses/dp_sgd.py": ("train.py",),
    "defenses/mixup.py": ("train.py",),
    "campaigns/audit.py": (),  # of audit.py, which attack.py --audit stands for
    "campaigns/trials.py": (),
    "reports/audit.py": (),
    "data/augmentation_parameters.py": ("train.py",),
    "data/transforms.py": ("train.py",),
    "data/images.py": ("attack.py",),
    "data/folders.py": ("train.py", "eval.py", "consistency.py"),
    "data/loaders.py": ("train.py", "eval.py", "consistency.py"),
    "eval/image_folders.py": (),  # of python -m eval.mse and its like
    "eval/options.py": ("eval.py", "consistency.py"),
    "eval/subject.py": ("train.py", "eval.py", "consistency.py"),  # attack.py opens sentences with it
    "models/external.py": ("attack.py",),
    "models/partial.py": ("attack.py",),
    "models/timm_models.py": ("eval.py", "consistency.py", "attack.py"),
    "models/huggingface_models.py": ("attack.py",),
    "models/file_kinds.py": ("eval.py", "consistency.py", "attack.py"),
    "utils/arguments.py": (),  # placeholders: --name VALUE
    "utils/help.py": (),
    "utils/machine.py": (),  # options of git
}
GENERAL = (  # messages that say themselves that not every script has the option, or that only loaders raise
    "where the script has it",
    "a loader worker died",
    "what is finished is kept, continue with",  # said of runs that have a state to continue from
)
WORD = re.compile(r"--[a-z][a-z_]+[\w.]*")


def file_of(module: str) -> Path | None:
    place = ROOT / module.replace(".", "/")
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[Path]:
    """Modules of the project that a file imports, at its head or in a function, or declares in a registry."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[a-z_.]+:\w+", str(node.value)):
            names.add(node.value.partition(":")[0])
    return frozenset(filter(None, map(file_of, filter(None, names))))


@cache
def reached(script: str) -> frozenset[Path]:
    found, left = set(), [ROOT / script]
    while left:
        path = left.pop()
        if path not in found:
            found.add(path)
            left += imports(path)
    return frozenset(found)


def speaks(place: str, schema: type) -> bool:
    """Whether a module that a script reaches raises its messages there."""
    return all(schema.script in scripts for start, scripts in ONLY.items() if place.startswith(start))


def classes(schema: type) -> set[str]:
    """The names of the dataclasses a schema is made of."""
    inner = [hint for hint in get_type_hints(schema).values() if is_dataclass(hint)]
    return {cls.__name__ for cls in schema.__mro__}.union(*map(classes, inner))


def messages(path: Path, schema: type) -> list[str]:
    """The texts a module may print, each f-string as one with {} for its values; not docstrings. Of the dataclasses of
    options only those of the schema."""
    tree, texts, inside = parsed(path), [], set()
    if "options" in (path.parent.name, path.stem):
        tree = ast.Module([node for node in tree.body if getattr(node, "name", "") in classes(schema)], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inside.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            inside |= {id(part) for part in node.values}
    every = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return texts + [node.value for node in every if id(node) not in inside]


def has(schema: type, word: str) -> bool:
    """Whether a script has an option, of which a message may only give the beginning ('--defense_options.')."""
    name, known = word[2:].rstrip("."), option_types(schema)
    try:
        return name in OWN or full_name(name, known) is not None or f"{name}." in " ".join(known)
    except UserError:  # the short name of several
        return True


@pytest.mark.parametrize("schema", SCHEMAS)
def test_messages_name_options_of_the_script_that_speaks(schema):
    wrong = []
    for path in sorted(reached(schema.script)):
        place = path.relative_to(ROOT).as_posix()
        if runs_alone(path) or not speaks(place, schema):
            continue
        for text in messages(path, schema):
            named = any(name in text for name in (*(other.script for other in NAMED), "scripts/"))
            for word in WORD.findall(text):
                known = has(schema, word) or (named and ("scripts/" in text or any(has(one, word) for one in NAMED)))
                if not known and not any(words in text for words in GENERAL):
                    wrong.append(f"{place}: {word}: {text[:100]}")
    assert not wrong, "\n" + "\n".join(wrong)


def runs_alone(path: Path) -> bool:
    """Whether a module is a tool of its own, `python -m`, with its own options."""
    return 'if __name__ == "__main__"' in path.read_text() and path.parent != ROOT
