"""What lies around the weights in files of others: dicts in dicts, prefixes of wrappers, several sets of weights.

A file is flattened to tensors under dotted names ('state_dict.model.blocks.0.norm1.weight'). The weights of a network
are then all names that share a prefix behind which the network's own names begin, whatever that prefix is.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.unpickling import Array
from utils.errors import UserError, shorten
from utils.notes import Notes

DEPTH = 5  # dicts in dicts that are looked into
LARGEST = 200_000  # entries of a file: references to references can make a billion of a few bytes
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch, anywhere in a name
AVERAGED = {
    "ema",
    "teacher",
    "swa",
    "averaged",
    "average",
    "avg",
    "momentum",
    "target",
    "shadow",
}  # words in such names
TAKE_EMA = "--ema true, or --model_options.ema true for attack.py, takes them"
NOT_WEIGHTS = {"optimizer", "optimizers", "optim", "scheduler", "schedulers", "scaler", "callbacks", "loops", "amp"}
USUAL = ("model", "state_dict", "model_state_dict", "model_state", "net", "network", "student", "module", "weights")
QUANTIZED = {"zero_point", "qweight", "qzeros", "SCB", "absmax"}  # beside packed weights: torch, GPTQ, bitsandbytes
CLASSIFIERS = (
    "head", "classifier", "fc", "linear", "heads.head", "cls_classifier", "distillation_classifier", "lm_head"
)  # fmt: skip


def flatten(content: Mapping, path: str | Path) -> dict[str, Tensor]:
    """Return all tensors of nested dicts under dotted names, those of optimizers left out. Raises UserError."""
    found: dict[str, Tensor] = {}
    seen = 0
    left: list[tuple[str, object, int]] = [("", content, 0)]
    while left:
        prefix, item, depth = left.pop()
        seen += 1
        if seen > LARGEST:
            raise UserError(f"checkpoint '{path}' has more than {LARGEST} entries: use another file")
        if isinstance(item, Tensor):
            found[prefix] = item
        elif isinstance(item, Array):
            found[prefix] = torch.from_numpy(item.values.copy())
        elif isinstance(item, Mapping) and depth < DEPTH:
            inner = [(key, value) for key, value in item.items() if isinstance(key, str) and not _aside(key, value)]
            left += [(f"{prefix}.{key}" if prefix else key, value, depth + 1) for key, value in reversed(inner)]
    if name := next((name for name in found if name.rpartition(".")[2] in QUANTIZED), None):
        raise UserError(f"checkpoint '{path}' holds quantised weights ('{name}'): use the model before quantisation")
    if any(".lora_A." in name for name in found):
        raise UserError(f"checkpoint '{path}' holds LoRA adapters: save the model after merge_and_unload()")
    for wrapper in WRAPPERS:
        found = {name.replace(wrapper, ""): value for name, value in found.items()}
    return found


def plain_weights(
    content: Mapping,
    path: str | Path,
    names: Collection[str],
    *,
    all_names: bool = False,
    ema: bool = False,
    notes: Notes | None = None,
) -> dict[str, Tensor]:
    """Return the weights of one network in a file's content, under the names they have in it less their prefix.

    names: some that tell the network from others, or (all_names) all it has; where none is found, or not half of all,
    nothing is removed: this is another network, which the caller says.
    ema: the averaged weights; those that are passed over are noted. A classifier that lies beside the network, and not
    in it, comes along. Raises UserError where there are no weights, no averaged ones, or several sets to choose from.
    """
    notes, tensors = notes or Notes(), flatten(content, path)
    if not tensors:
        keys = ", ".join(map(str, list(content)[:5]))
        raise UserError(f"checkpoint '{path}' holds no weights (keys: {keys})")
    prefixes = _prefixes(tensors, set(names))
    if all_names and max(map(len, prefixes.values()), default=0) < len(set(names)) / 2:
        prefixes = {}
    prefix = _choose(prefixes, path, ema, notes)
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    beside = _beside(prefix, tensors)
    return beside | weights


def _aside(key: str, value: object) -> bool:
    """Return whether an entry is the state of an optimizer or the like, whose tensors have the weights' names."""
    return isinstance(value, Mapping) and any(word in NOT_WEIGHTS for word in _words(key))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", name.lower()) if word]


def _ends(name: str) -> Iterator[tuple[str, str]]:
    """Yield all ways to cut a dotted name in two: ('', whole), ('a.', rest), ..."""
    place = 0
    while True:
        yield name[:place], name[place:]
        place = name.find(".", place) + 1
        if place == 0:
            return


def _prefixes(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, frozenset[int]]:
    """Return the prefixes behind which most of `names` are found, in the order of the file, and their tensors by id."""
    found: dict[str, list[int]] = {}
    for name, value in tensors.items():
        for start, end in _ends(name):
            if end in names:
                found.setdefault(start, []).append(id(value))
    most = max(map(len, found.values()), default=0)
    return {prefix: frozenset(values) for prefix, values in found.items() if len(values) >= 0.8 * most}


def _choose(prefixes: Mapping[str, frozenset[int]], path: str | Path, ema: bool, notes: Notes) -> str:
    """Return the prefix of the weights that are meant, and note what is passed over. Raises UserError."""
    averaged = [prefix for prefix in prefixes if AVERAGED & set(_words(prefix))]
    plain = [prefix for prefix in prefixes if prefix not in averaged]
    if ema and not averaged:
        raise UserError(
            f"checkpoint '{path}' holds no averaged weights: leave out --ema (model_options.ema of attack.py)"
        )
    among = averaged if ema or not plain else plain
    among = list({prefixes[prefix]: prefix for prefix in reversed(among)}.values())[::-1]  # stored twice, counted once
    usual = [prefix for prefix in among if prefix.split(".")[0] in USUAL]
    if len(among) > 1 and len(usual) != 1:
        raise UserError(
            f"checkpoint '{path}' holds several sets of weights ({_named(among)}): save the one you mean alone"
        )
    chosen = usual[0] if len(among) > 1 else among[0] if among else ""
    if not ema and averaged and plain:
        text = f"the weights of {_named([chosen])} were taken and the averaged ones of {_named(averaged)} passed over"
        notes.assume("weights", f"{text} ({TAKE_EMA})")
    elif not ema and averaged:
        notes.assume("weights", f"the weights are averaged ones ({_named(averaged)}): the file has no others")
    elif len(among) > 1:
        others = [prefix for prefix in among if prefix != chosen]
        notes.assume(
            "weights", f"the weights of {_named([chosen])} were taken and those of {_named(others)} passed over"
        )
    return chosen


def _named(prefixes: list[str]) -> str:
    more = f" and {len(prefixes) - 3} more" if len(prefixes) > 3 else ""
    return ", ".join(f"'{prefix.rstrip('.')}'" if prefix else "the file itself" for prefix in prefixes[:3]) + more


def misfit(error: Exception) -> str:
    """Return what `load_state_dict` says is wrong, with the first names of each kind and how many more there are."""
    text, parts = " ".join(str(error).split()), []
    for kind in ("Missing", "Unexpected"):
        if found := re.search(kind + r' key\(s\) in state_dict: ((?:"[^"]+"(?:, )?)+)', text):
            names = re.findall('"([^"]+)"', found[1])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{kind.lower()}: {', '.join(names[:3])}{more}")
    shapes = re.findall(r"size mismatch for ([\w.]+): .*?(\(\[[^]]*\]\)).*?(\(\[[^]]*\]\))", text)
    for name, theirs, ours in shapes[:3]:
        parts.append(f"{name} is {theirs[2:-2]} in the file and {ours[2:-2]} in the model")
    return "; ".join(parts) or shorten(text, 200) or type(error).__name__


def _beside(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the classifiers that lie beside the network with `prefix`, from the nearest level that has any."""
    while prefix:
        prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
        found = {
            f"{name}.{part}": tensors[f"{prefix}{name}.{part}"]
            for name in CLASSIFIERS
            for part in ("weight", "bias")
            if f"{prefix}{name}.{part}" in tensors
        }
        if found:
            return found
    return {}
