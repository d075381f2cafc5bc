"""Checkpoints: ours, and files of others, read without running their code.

Our file is a dict of tensors and plain values: {"format": "mjp", "arguments": what build_model takes, "model": weights,
"normalize": {"mean", "std"} or "tokenizer": JSON text, "classes": class names, ...training state}. In any other file
the weights are looked for (models/containers.py), recognised by their names (models/layouts.py) and described by their
shapes and by what lies beside them (models/inference.py, models/descriptions.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from torch import Tensor, nn

from models import build_model
from models.archives import check_bytes, check_declared, check_description, check_numbers, check_size, odd_contents
from models.containers import TAKE_EMA, plain_weights
from models.descriptions import assume_classifier, read_description, read_tokenizer_beside
from models.file_kinds import SAVED, foreign_kind, is_safetensors
from models.inference import infer_arguments
from models.jax_vit import is_jax_vit, read_jax_vit
from models.layouts import MARKS, layout_of
from models.position import resize_pos_embed
from models.unpickling import unpickle
from utils.errors import UserError, reason
from utils.files import write_atomic
from utils.notes import Notes

FORMAT = "mjp"
FINE_TUNED = (
    "head.",
    "fc.",
    "unknown_pos_embed",
    "index_embed",
    "localization.",
    "pooler.",
)  # new when training starts from a file


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Write a checkpoint atomically: a reader finds the old file or the new one, never half of one."""
    write_atomic(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def read_checkpoint(path: str | Path) -> dict:
    """Return the content of a checkpoint file, or of a folder that holds one, on the CPU.

    The file may come from a stranger: nothing in it is run, and little more than its own size is allocated. Raises
    UserError when it is missing or truncated, and says what it is where it is something else.
    """
    path = _file_of(Path(path))
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        if kind := foreign_kind(path):
            raise UserError(f"checkpoint '{path}' is {kind[0]}: {kind[1]}")
        check_size(path)
        content = _content_of(path)
        check_declared(content, path)
        if isinstance(content, dict) and content.get("format") == FORMAT:  # others may have written no checksums
            check_bytes(path)
    except UserError:
        raise
    except Exception as error:
        what = f"checkpoint '{path}' is truncated or not a checkpoint ({reason(error)})"
        raise UserError(f"{what}; use another file") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint '{path}' holds a {type(content).__name__}, not a dict of weights")
    return content


def _content_of(path: Path) -> object:
    if is_safetensors(path):
        return read_safetensors(path)
    return read_jax_vit(path) if is_jax_vit(path) else unpickle(path)


def _file_of(path: Path) -> Path:
    """Return the file itself, or the one with the weights in a folder as HuggingFace and timm save a model."""
    if path.is_dir():
        files = [path / name for name in SAVED if (path / name).is_file()]
        if not files:
            if any((path / f"{name}.index.json").is_file() for name in SAVED):
                remedy = "save it in one, save_pretrained(FOLDER, max_shard_size='100GB')"
                raise UserError(f"checkpoint '{path}' is split over several files: {remedy}")
            runs = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
            remedy = f": did you mean '{runs[0]}'?" if runs else ""
            raise UserError(f"checkpoint '{path}' is a folder without {' or '.join(SAVED)}{remedy or ': pass a file'}")
        path = files[0]
    if not path.is_file():
        raise UserError(f"checkpoint '{path}' does not exist")
    return path


def read_safetensors(path: Path) -> dict:
    """Return the weights of a safetensors file, or all of our checkpoint where its header carries the rest of it.

    Weights of others may say more of themselves as JSON under `config` of the header (scripts/prepare_weights.py).
    """
    with safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        header = file.metadata() or {}
    if FORMAT in header:
        return {**json.loads(header[FORMAT]), "format": FORMAT, "model": weights}
    config = json.loads(header["config"]) if header.get("config", "").startswith("{") else {}
    return {**config, "state_dict": weights} if config else weights


def save_safetensors(path: str | Path, model: nn.Module) -> None:
    """Write a model's weights as safetensors, atomically, with its arguments, normalize and classes as JSON in the
    header: `load_model` reads it like a checkpoint, any other reader as plain weights."""
    described = {key: getattr(model, key) for key in ("arguments", "normalize", "classes")}
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    header = {"format": "pt", FORMAT: json.dumps(described)}
    write_atomic(path, lambda file: file.write(save(weights, header)))


def load_model(path: str | Path, *, ema: bool = False, **overrides) -> nn.Module:
    """Rebuild the model a checkpoint was saved from and load its weights (evaluation mode, on the CPU).

    overrides: build_model arguments that differ, e.g. `image_size` (the PE grid is then resized) or, for files of other
    projects, `name` and `num_heads`. A classifier (num_classes) or unknown row (unknown) that they add to the file's
    model is drawn as in a new one. ema: the averaged weights. The model carries `normalize` (and `normalize_from`) and
    `classes` when the file knows them, in `privacy` the account of its training under DP-SGD (defenses/training.py,
    `Account.state`), else None, and in `assumed` what it did not say. Raises UserError naming the keys that
    do not fit.
    """
    content, notes = read_checkpoint(path), Notes()
    overrides = {key: value for key, value in overrides.items() if value is not None}
    ours = content.get("format") == FORMAT
    weights = weights_of(content, path, ema=ema, notes=notes)
    if not weights or not all(value.numel() for value in weights.values()):
        raise UserError(f"checkpoint '{path}' has no weights, or empty ones; use another file")
    if ours:
        check_description(content, weights, path)
        arguments = content["arguments"]
        about = {"normalize": content.get("normalize"), "normalize_from": "the checkpoint"}
        about |= {"classes": content.get("classes"), "loss": content.get("loss", "cross_entropy")}
    else:
        with odd_contents(path):
            said = read_description(content, path)
            given = {key: overrides.get(key) for key in ("num_heads", "num_classes")}
            arguments = infer_arguments(weights, path, said, notes, **given)
            assume_classifier(said, notes)
        known = said.classes is not None and len(said.classes) == arguments["num_classes"]
        about = {"normalize": said.normalize, "normalize_from": said.normalize_from}
        about |= {"classes": said.classes if known else None, "loss": said.loss}
    made_for, asked = arguments.get("image_size"), _asked(overrides)
    arguments = {**arguments, **overrides}
    with odd_contents(path):
        with torch.device("meta"):  # sizes are compared before memory is given to them
            fit_weights(build_model(**arguments), weights, path, asked)
        model = build_model(**arguments)
        if new := load_weights(model, weights, path, asked):
            notes.assume("new", f"drawn anew, as asked for and not in the file: {', '.join(new)}")
            about["classes"] = None if any(name.startswith(("head.", "fc.")) for name in new) else about["classes"]
    if made_for not in (None, side := model.arguments.get("image_size")):
        notes.assume("image_size", f"the model was made for images of {made_for} pixels and is used at {side}")
    if not ours and hasattr(model, "vocab_size") and about["loss"] != "cross_entropy":
        notes.assume("loss", "sentences are of one class each here, and the file's model tells several")
        about["loss"] = "cross_entropy"
    for key, value in about.items():
        setattr(model, key, value)
    model.tokenizer = content.get("tokenizer") or read_tokenizer_beside(path)
    model.assumed = notes.assumed
    model.privacy = content.get("privacy") if ours else None
    return model.eval()


def _asked(overrides: dict) -> tuple[str, ...]:
    """Return the prefixes of parameters a user asked for, which are new where the file lacks them."""
    parts = {
        "num_classes": ("head.", "fc.", "pooler."),
        "unknown": ("unknown_pos_embed",),
    }
    return tuple(prefix for key in parts if overrides.get(key) for prefix in parts[key])


def weights_of(content: dict, path: str | Path, *, ema: bool = False, notes: Notes | None = None) -> dict[str, Tensor]:
    """Return the model's weights in a checkpoint of any known layout, under our names. The notes get the choice."""
    if content.get("format") != FORMAT:
        weights = plain_weights(content, path, MARKS, ema=ema, notes=notes)
        layout = layout_of(weights, content, path)
        with odd_contents(path):
            return layout.rename(weights) if layout else weights
    weights = content.get("model_ema" if ema else "model")
    if weights is None:
        raise UserError(
            f"checkpoint '{path}' holds no averaged weights: it was trained without --optim.ema of train.py"
        )
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint '{path}' has a 'model' that is not a dict of tensors; use another file")
    if not ema and content.get("model_ema") is not None and notes:
        notes.assume("weights", f"the last weights were taken and the averaged ones passed over ({TAKE_EMA})")
    return weights


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, may_stay_new: Sequence[str] = ()
) -> list[str]:
    """Load by name and shape, resizing the PE table to the model's grid. Every key must fit.

    may_stay_new: prefixes of parameters that keep their fresh initialisation where the file lacks them or has another
    shape, as in fine-tuning; returns their names. Raises UserError naming the keys that do not fit, and tensors that
    hold no weights (integers, NaN).
    """
    weights, new = fit_weights(model, weights, path, may_stay_new)
    check_numbers(weights, model.state_dict(), path)
    model.load_state_dict(weights)
    return new


def start_from(model: nn.Module, path: str | Path, run) -> dict:
    """Load what a training starts from, as `load_weights` does in fine-tuning, and return the content of the file. The
    run's log says which parts stay new."""
    content = read_checkpoint(path)
    new = load_weights(model, weights_of(content, path, notes=run.notes), path, FINE_TUNED)
    run.log(f"starting from {path}" + f"; newly initialised: {', '.join(new)}" * bool(new))
    return content


def fit_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, may_stay_new: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights as `load_weights` gives them to the model, and the names of those that stay new."""
    weights = dict(weights)
    if "patch_embed.proj.weight" in weights and "layers.0.blocks.0.attn.qkv.weight" in weights:
        weights = filter_swin(weights, model)
    prefix = getattr(model, "num_prefix_tokens", 0)
    for key in ("pos_embed", "index_embed"):
        target = getattr(model, key, None)
        if key not in weights or target is None or weights[key].shape == target.shape or weights[key].dim() != 3:
            continue
        number = weights[key].shape[1] - prefix
        if len(model.grid) == 1:
            weights[key] = weights[key][:, : target.shape[1]]  # of more places than the model has, the first ones
        elif number > 0 and round(number**0.5) ** 2 == number:  # anything else is reported below as a different shape
            weights[key] = resize_pos_embed(weights[key], model.grid, None, prefix)
    own, new = model.state_dict(), []
    for key, value in own.items():
        if key.startswith(tuple(may_stay_new)) and (key not in weights or weights[key].shape != value.shape):
            weights[key] = value
            new.append(key)
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "different shape": [key for key in own if key in weights and own[key].shape != weights[key].shape],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        raise UserError(f"checkpoint '{path}' does not fit model '{model.arguments['name']}' ({listed})")
    return weights, new
