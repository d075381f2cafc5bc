"""Plans of scripts/benchmark.py: what they may hold, their cells, the options of each cell's runs, and results read."""

import json
from pathlib import Path

import yaml

from utils.errors import UserError, no_such_path, reason

WHO = ("naive", "adaptive")
KEYS = {"data", "seeds", "train", "models", "attack", "naive", "adaptive", "defenses"}
OPTIONAL = {"choose": "psnr"}  # key -> its default
OF_DEFENSE = {"train", "attack", "victim", "strength", "naive", "adaptive", "models", "factor", "weights"}
OF_ATTACK = ("victim", "images", "attack", "attacks")  # of a model; the rest are options of train.py


def read_plan(path: str) -> dict:
    """Return the plan, checked for what it must and may hold; `extends: FILE`, beside it, has what it leaves out."""
    plan = _opened(Path(path))
    while "extends" in plan:
        other = Path(path).parent / plan.pop("extends")
        plan = merged(_opened(other), plan)
    if "defences" in plan:  # as plans wrote it before
        plan["defenses"] = plan.pop("defences")
    if set(plan) - set(OPTIONAL) != KEYS:
        odd = sorted(map(str, (set(plan) - set(OPTIONAL)) ^ KEYS))
        raise UserError(f"plan '{path}' must hold {', '.join(sorted(KEYS))}; look at {', '.join(odd)}")
    plan = OPTIONAL | plan
    if plan["choose"] not in ("psnr", "claim"):
        raise UserError(f"choose of plan '{path}' must be psnr or claim, got '{plan['choose']}'")
    for name, cell in plan["defenses"].items():
        unknown = set(cell) - OF_DEFENSE
        missing = [name for who in WHO for name in cell.get(who, []) if name not in plan[who]]
        missing += [other for other in (cell.get("weights", name),) if other not in plan["defenses"]]
        missing += [model for model in cell.get("models", []) if model not in plan["models"]]
        if unknown or missing:
            raise UserError(f"defence '{name}' of plan '{path}': unknown {', '.join(sorted(unknown) + missing)}")
    return plan


def _opened(path: Path) -> dict:
    if not path.exists():
        raise UserError(f"plan {no_such_path(path)}")
    try:
        plan = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"plan '{path}' cannot be read as YAML: {reason(error)}") from error
    if not isinstance(plan, dict):
        raise UserError(f"plan '{path}' must hold options as 'key: value' lines")
    return plan


def options(tree: dict, prefix: str = "") -> list[str]:
    """Write options as words: {"optim": {"lr": 1}} -> ["--optim.lr", "1"]; lists as YAML."""
    found = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += options(value, f"{prefix}{key}.")
        else:
            text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            found.append(f"--{prefix}{key}={text.replace(' ', '') if isinstance(value, list) else text}")
    return found


def merged(*trees: dict) -> dict:
    """Merge settings: later values win, sections are merged."""
    result: dict = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


def cells(plan: dict) -> list[tuple[str, str]]:
    """Return (model, defence) pairs of the plan; a defence may be for some models only."""
    return [
        (model, name)
        for name, cell in plan["defenses"].items()
        for model in plan["models"]
        if model in cell.get("models", plan["models"])
    ]


def attacks_of(plan: dict, defense: str, model: str | None = None) -> dict[str, dict]:
    """Attack name -> its options: the naive ones that apply, then those who know the defence, and are told it; of a
    model that names its attacks, these alone."""
    cell = plan["defenses"][defense]
    only = plan["models"].get(model, {}).get("attacks", [*plan["naive"], *plan["adaptive"]])
    found = {name: plan["naive"][name] for name in cell.get("naive", plan["naive"]) if name in only}
    for name in [name for name in cell.get("adaptive", []) if name in only]:
        known = {key: value for key, value in cell.get("attack", {}).items() if key in ("defense", "defense_options")}
        told = {"attack_options": known} if plan["adaptive"][name]["attack"] == "defense_aware" else {}
        found[name] = merged(plan["adaptive"][name], told)
    return found


def shares(plan: dict) -> list[list[tuple[str, str]]]:
    """Return the cells in groups that one process runs: those of a model that attack the same training. Groups of a
    model follow each other, so that processes which take turns share its trainings."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for model, name in cells(plan):
        weights = name if "victim" in plan["models"][model] else plan["defenses"][name].get("weights", name)
        groups.setdefault((model, weights), []).append((model, name))
    models = list(plan["models"])
    return [groups[key] for key in sorted(groups, key=lambda key: models.index(key[0]))]


def attack_settings(plan: dict, model: str, defense: str) -> dict:
    """Return the options of attack.py that all attacks of a cell have."""
    own, cell = plan["models"][model], plan["defenses"][defense]
    victim = merged(own["victim"], cell.get("victim", {})) if "victim" in own else {}
    return merged(plan["attack"], victim, own.get("attack", {}), cell.get("attack", {}))


def images_of(plan: dict, model: str, data: str) -> str:
    return plan["models"][model].get("images", f"{data}/val")


def trainings(plan: dict, model: str, defense: str, output: Path) -> list[Path]:
    """Return the folders of the trainings, by seed, whose weights a cell attacks; none where weights are given."""
    if "victim" in plan["models"][model]:
        return []
    weights = plan["defenses"][defense].get("weights", defense)
    return [output / model / weights / f"train_{seed}" for seed in range(plan["seeds"])]


def cells_of(path: Path) -> list[dict]:
    """Return the cells of a benchmark. Raises UserError where the file holds none."""
    problem, cells = f"'{path}' is no results.json of scripts/benchmark.py: give one, or run it first", []
    try:
        cells = [cell | {"acc1": cell["acc1"]} for cell in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(problem) from error
    if not cells:
        raise UserError(problem)
    return cells
