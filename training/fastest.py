"""Which precision and kernels make a step fastest on this machine, found by trying them for seconds.

What is fast differs between processors: some multiply float32 twice as fast in another library and stay exact, some
round to bf16 there; fused attention is the fastest in float32 and the slowest in bf16 on many CPUs. So `recipe` takes
turns between the candidates on the model itself, forward and backward, and keeps what it found for this machine.
"""

import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from training.options import OptimOptions
from training.precision import Precision, choose_kernels
from utils.channels import channels_of
from utils.distributed import Processes
from utils.errors import UserError
from utils.files import write_text
from utils.machine import processor

ROUNDS = 3
IMAGES = 2  # of a trial on a CPU; on a GPU the whole batch, without which it would not be busy
TRUE_FLOAT32 = 1e-5  # relative error of a product up to which it counts as float32
SAME_GRADIENT = 0.05  # relative distance from the float32 gradient up to which a reduced precision may be chosen
GAIN = 0.97  # of the time of the default: what is not faster than that is not worth a change


def choose_recipe(
    model: nn.Module, options: OptimOptions, batch_size: int, processes: Processes, log: Callable[[str], None] | None
) -> OptimOptions:
    """Return the options with amp, matmul and attention as fast as this machine allows, where `options.recipe` asks.

    'float32' keeps to products that are true float32 here; 'auto' also tries TF32 or bf16, and takes them only where
    the gradient stays within 5 % of the float32 one. Rank 0 decides for all, and remembers it in `cache_file`. Raises
    UserError for models that take no images.
    """
    if options.recipe == "given":
        return options
    if hasattr(model, "vocab_size"):
        raise UserError("--optim.recipe is measured on images, and this model takes sentences: leave it out")
    names = candidates(model, options.recipe, processes.device)
    place = torch.zeros((), dtype=torch.int64, device=processes.device)
    if processes.is_main:
        chosen, why = _remembered(model, options.recipe, names, batch_size, processes.device)
        place.fill_(names.index(chosen))
        if log:
            log(f"recipe {options.recipe}: {_words(chosen)} ({why})")
    processes.broadcast([place])
    amp, matmul, attention = names[int(place)]
    return replace(options, amp=amp, matmul=matmul, attention=attention)


def candidates(model: nn.Module, recipe: str, device: torch.device) -> list[tuple[str, str, str]]:
    """Return (amp, matmul, attention) of all that may be tried, the default first."""
    two_kernels = any(hasattr(layer, "fused_attn") for layer in model.modules())
    attentions = ("fused", "plain") if two_kernels else ("fused",)
    other = "high" if device.type == "cuda" else "medium"  # what differs there from the highest: TF32, another library
    names = list(product(("none",), ("highest", other), attentions))
    return names + [("bf16", "highest", kind) for kind in attentions if recipe == "auto"]


def is_true_float32(name: tuple[str, str, str], device: torch.device) -> bool:
    """Return whether products of a candidate are float32 on this device, up to rounding."""
    amp, matmul, _ = name
    return amp == "none" and (matmul == "highest" or Precision(amp, matmul, device).error() < TRUE_FLOAT32)


def measure(model: nn.Module, names: list[tuple[str, str, str]], images: int, device: torch.device) -> list[dict]:
    """Return for every candidate its time of a forward and backward pass over the first one's (ratio: median over
    rounds in turns) and the relative distance of its gradient from the first one's. The model is left as it is."""
    generator = torch.Generator().manual_seed(0)
    side = model.arguments["image_size"]
    batch = torch.randn(images, channels_of(model), side, side, generator=generator).to(device)
    steps = [_step(model, name, batch, device) for name in names]
    first, *_ = gradients = [step() for step in steps]  # each has run once before it is timed
    away = [float((gradient - first).norm() / first.norm()) for gradient in gradients]
    times: list[list[float]] = [[] for _ in steps]
    for k in range(ROUNDS):
        for place in [*range(k, len(steps)), *range(k)]:
            began = _clock(device)
            steps[place]()
            times[place].append(_clock(device) - began)
    ratios = [statistics.median(a / b for a, b in zip(own, times[0], strict=True)) for own in times]
    rows = zip(names, ratios, away, strict=True)
    return [{"name": list(name), "ratio": ratio, "gradient": far} for name, ratio, far in rows]


def fastest(rows: list[dict]) -> tuple[str, str, str]:
    """Return the fastest candidate whose gradient is that of the first, and the first unless it is clearly faster."""
    best = min((row for row in rows if row["gradient"] <= SAME_GRADIENT), key=lambda row: row["ratio"])
    return tuple(best["name"] if best["ratio"] < GAIN else rows[0]["name"])


def cache_file() -> Path:
    """Return where measured recipes are kept: mjp/recipes.json in XDG_CACHE_HOME, default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mjp" / "recipes.json"


def _remembered(
    model: nn.Module, recipe: str, names: list[tuple[str, str, str]], batch_size: int, device: torch.device
) -> tuple[tuple[str, str, str], str]:
    """Return (candidate, how it is known), measured unless this machine has done so for such a model before."""
    if recipe == "float32":
        names = [name for name in names if is_true_float32(name, device)]
    images = batch_size if device.type == "cuda" else min(batch_size, IMAGES)
    key, file = " | ".join([recipe, *_situation(model, images, device)]), cache_file()
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    with suppress(KeyError, TypeError, ValueError):  # an entry of another version, or one that somebody edited
        if (chosen := fastest(known[key])) in names:
            return chosen, f"measured before, kept in {file}"
    began, rows = time.monotonic(), measure(model, names, images, device)
    each = (("/".join(row["name"]), row["ratio"], row["gradient"]) for row in rows)
    said = ", ".join(f"{name} {ratio:.2f} of the time, {away:.0e} off" for name, ratio, away in each)
    why = f"measured in {time.monotonic() - began:.0f} s: {said}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({**known, key: rows}, indent=1) + "\n")
    except OSError as error:
        why += f"; not kept: {error}"
    return fastest(rows), why


def _situation(model: nn.Module, images: int, device: torch.device) -> list[str]:
    """Return what a measurement holds for: machine, versions, model and batch."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    size = sum(value.numel() for value in model.parameters())
    about = f"{type(model).__name__} {size} {model.arguments['image_size']} px x {images}"
    return [where, f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", about]


def _step(model: nn.Module, name: tuple[str, str, str], batch: Tensor, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that takes a forward and backward pass of a copy and returns its gradient, flat."""
    amp, matmul, attention = name
    own = copy.deepcopy(model).eval()  # no dropout: the gradients are compared
    choose_kernels(own, attention, channels_last=False)
    precision = Precision(amp, matmul, device)
    weights = [value for value in own.parameters() if value.requires_grad]

    def step() -> Tensor:
        with precision.products():
            with precision.forward():
                output = own(batch)
            found = torch.autograd.grad(output.float().logsumexp(dim=1).sum(), weights, allow_unused=True)
        return torch.cat([value.flatten() for value in found if value is not None])

    return step


def _clock(device: torch.device) -> float:
    """Return seconds: of the processor, which others disturb less; of the wall with a GPU, once that is idle."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _words(name: tuple[str, str, str]) -> str:
    amp, matmul, attention = name
    return f"--optim.amp {amp} --optim.matmul {matmul} --optim.attention {attention}"
