"""Former names of options and values: command lines, configs, run folders and result files may still hold them.

This is the only place that knows them; everything else speaks the present names.
"""

from collections.abc import Mapping
from pathlib import Path

OPTIONS = {"tier": "attacker_knowledge", "defences": "defenses"}
ATTACKS = {"adaptive": "mjp_aware"}
VALUES = {
    "attack": ATTACKS,
    "attacker_knowledge": {"T0": "none", "T1": "method", "T2": "mask", "T3": "permutation"},
}


FILES = {"configs/attack/adaptive.yaml": "configs/attack/mjp_aware.yaml"}


def current_file(path: str) -> str:
    """Return the present name of a config file of the project; a file that is there keeps its own."""
    former = next((name for name in FILES if Path(path).as_posix().endswith(name)), None)
    return path if former is None or Path(path).exists() else path[: -len(former)] + FILES[former]


def current_option(name: str) -> str:
    """Return the present name of an option, dotted or not."""
    return OPTIONS.get(name, name)


def current_value(option: str, value: object) -> object:
    """Return the present name of a value of the option `option`."""
    return VALUES.get(option, {}).get(value, value) if isinstance(value, str) else value


def current(options: Mapping) -> dict:
    """Return the options of a stored run, or the top of its results, under their present names and values."""
    renamed = {current_option(key): value for key, value in options.items()}
    return {key: current_value(key, value) for key, value in renamed.items()}


def every_name(option: str, value: str) -> list[str]:
    """Return a value and its former names: those that folders may be called by."""
    return [value, *(former for former, now in VALUES.get(option, {}).items() if now == value)]
