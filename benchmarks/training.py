"""What MJP costs in training, and which options make a step fast on this machine.

    python -m benchmarks.training [--only step,shuffle,recipe,limit] [--rounds 13] [--json FILE]
    python -m benchmarks.training --only step,limit --device cuda --batch 256 --amp bf16 --compile

Candidates take turns on the same model shape, batch and precision; ratios are medians over rounds of times in the same
round, with quartiles. On a CPU: one thread, time of the processor, a malloc that keeps large blocks.

step      our whole training step of DeiT-S/16 with MJP (ratio 0.27 in every step, shared unknown row, nonlinear
          localization) beside a plain step of timm's deit_small_patch16_224 with equal loss, clipping and AdamW, and
          the same with the naive shuffle, which has to move patches.
shuffle   moving masked patches: the official way, written anew (unfold, copy, index in NumPy, fold), beside ours on
          pixels, on patch embeddings and on position embeddings, mask and all; and drawing the mask alone.
recipe    our step at every precision, attention kernel and way to multiply matrices, beside timm's plain float32
          step as it comes. Names the options of the fastest: use those on this machine. A way to multiply that is
          not true float32 here (relative error above 1e-5) counts as reduced precision.
limit     the rate of large matrix products, and the share of it that a step reaches: 27.5 GFLOP per image for
          DeiT-S/16 at 224 pixels (two per multiply-add, forward and backward).
"""

import copy
import math
import random
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from timm import create_model
from torch import Tensor, nn
from torch.nn.functional import fold, unfold
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.interleaved_timing import Table, benchmark_parser, interleave, start_anew
from data.loaders import Batch
from defenses import build_defense
from models import build_model
from models.jigsaw import Jigsaw, move_tokens, shuffle_patches
from training.masking import MaskPolicy
from training.optim import build_optimizer
from training.options import JigsawOptions, LogOptions, OptimOptions
from training.precision import Precision, choose_kernels
from training.trainer import Trainer
from utils.distributed import Processes
from utils.errors import look_up, run_command

TIMM = {"deit_tiny": "deit_tiny_patch16_224", "deit_small": "deit_small_patch16_224"}
MJP = {"unknown": True, "localization": "nonlinear"}
CLASSES, SMOOTHING = 1000, 0.1
TRUE_FLOAT32 = 1e-5  # relative error of products


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, 3, 224, 224, generator=generator)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    return Batch(images, labels, torch.arange(number), torch.zeros(number, dtype=torch.int64))


def ours(name: str, images: Batch, device: torch.device, *, ratio: float = 0.27, **options) -> Callable[[], Tensor]:
    """Return a function that takes one masked step of training.trainer.Trainer; `.model` is what it trains."""
    mjp = {key: options.pop(key) for key in MJP if key in options}
    model = build_model(name, num_classes=CLASSES, **mjp).to(device)
    puzzle = JigsawOptions(mask_ratio=ratio, probability=1.0, start_epoch=0)
    common = {"warmup_epochs": 0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": SMOOTHING}
    trainer = Trainer(
        model.train(),
        Processes(0, 1, device),
        MaskPolicy(model.grid, puzzle, 0),
        OptimOptions(**common, **options),
        LogOptions(every=10**6, checkpoint_minutes=0),
        steps=10**6,
        batch_size=len(images.labels),
        num_classes=CLASSES,
        seed=0,
        defense=build_defense("none", {}),
        normalize={"mean": (0.5,) * 3, "std": (0.25,) * 3},
    )

    def step() -> Tensor:
        with trainer.precision.products():
            return trainer._train_step(images)

    step.model = trainer.model
    return step


def plain(
    name: str,
    images: Batch,
    device: torch.device,
    *,
    amp: str = "none",
    matmul: str = "highest",
    attention: str = "fused",
    fused: bool = True,
    compile: bool = False,  # noqa: A002, as the option
) -> Callable[[], Tensor]:
    """Return a function that takes one step of timm's model, as in a loop written by hand."""
    model = create_model(TIMM[name], num_classes=CLASSES).to(device).train()
    choose_kernels(model, attention, channels_last=False)
    optimizer = build_optimizer(model, OptimOptions(fused=fused), OptimOptions.lr * len(images.labels) / 512)
    precision = Precision(amp, matmul, device)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
    network = torch.compile(model) if compile else model

    def step() -> Tensor:
        shown, labels = images.images.to(device, non_blocking=True), images.labels.to(device, non_blocking=True)
        with precision.products():
            with precision.forward():
                logits = network(shown)
            loss = criterion(logits.float(), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step.model = model
    return step


def step(table: Table, given) -> None:
    images, device = batch(given.batch), torch.device(given.device)
    kernels = {"amp": given.amp, "attention": given.attention, "matmul": given.matmul, "compile": given.compile}
    candidates = {
        "timm": plain(given.model, images, device, **kernels),
        "MJP": ours(given.model, images, device, **MJP, **kernels),
        "naive": ours(given.model, images, device, **kernels),
        "off": ours(given.model, images, device, ratio=0.0, **kernels),
    }
    times = interleave(candidates, given.rounds, device=given.device)
    what = f"{given.model}, batch {given.batch}, {given.amp}"
    table.add(f"{what}: MJP / timm", times, "MJP", "timm", "<= 1.01", overhead=True)
    table.add(f"{what}: naive shuffle / timm", times, "naive", "timm", "<= 1.01", overhead=True)
    table.add(f"{what}: jigsaw off / timm", times, "off", "timm", overhead=True)
    table.add(f"{what}: MJP / jigsaw off", times, "MJP", "off", overhead=True)


def official_shuffle(images: Tensor, jigsaw: Jigsaw, side: int = 16) -> Tensor:
    """Compute mask, permutation and the way through unfold, a deep copy, NumPy's index and fold, as the official code
    goes."""
    mask, source = jigsaw.draw()
    patches = unfold(images, side, stride=side).transpose(1, 2)
    moved = copy.deepcopy(patches)
    places = mask[0].numpy().nonzero()[0]
    moved[:, places] = patches[:, source[0].numpy()[places]]
    return fold(moved.transpose(1, 2), images.shape[2:], side, stride=side)


def shuffle(table: Table, given) -> None:
    device = torch.device(given.device)
    for number in (given.batch, 128):
        images = batch(number).images.to(device)
        tokens = torch.randn(number, 196, 384, device=device)
        jigsaws = {
            name: Jigsaw((14, 14), 0.1, seed=0) for name in ("official", "pixels", "tokens", "positions", "mask")
        }

        def on_pixels(images: Tensor = images, jigsaw: Jigsaw = jigsaws["pixels"]) -> Tensor:
            return shuffle_patches(images, jigsaw.draw()[1], 16)

        def on_tokens(tokens: Tensor, jigsaw: Jigsaw) -> Tensor:
            return move_tokens(tokens, jigsaw.draw()[1].to(tokens.device))

        candidates = {
            "official": partial(official_shuffle, images.cpu(), jigsaws["official"]),
            "pixels": on_pixels,
            "tokens": partial(on_tokens, tokens, jigsaws["tokens"]),
            "positions": partial(on_tokens, tokens[:1], jigsaws["positions"]),
            "mask": jigsaws["mask"].draw,
        }
        times = interleave(candidates, 3 * given.rounds, repeat=5, device=given.device)
        for name, goal in (("positions", "<= 0.05"), ("tokens", ""), ("pixels", ""), ("mask", "")):
            table.add(f"shuffle of {number} images, {name} / official", times, name, "official", goal, overhead=True)


def recipe(table: Table, given) -> None:
    images, device = batch(given.batch), torch.device(given.device)
    errors = {matmul: Precision("none", matmul, device).error() for matmul in ("highest", "high", "medium")}
    table.note("relative error of products: " + ", ".join(f"{key} {value:.1e}" for key, value in errors.items()))
    base = partial(plain, given.model, images, device, fused=False)
    amps = ("none", "bf16") if given.amp == "bf16" else ("none",)
    compiles = (False, True) if given.compile else (False,)
    grid = product(amps, ("highest", "medium"), ("fused", "plain"), compiles)
    goals, best = {"true float32": 0.52, "reduced precision": 0.30}, {}
    candidates, kinds = {"timm": base()}, {}
    for amp, matmul, attention, compiled in grid:
        if amp == "bf16" and matmul != "highest":
            continue  # no float32 products are left
        name = f"amp {amp}, matmul {matmul}, attention {attention}" + ", compile true" * compiled
        kernels = {"amp": amp, "matmul": matmul, "attention": attention, "compile": compiled}
        candidates[name] = ours(given.model, images, device, **MJP, **kernels)
        kinds[name] = "true float32" if amp == "none" and errors[matmul] < TRUE_FLOAT32 else "reduced precision"
    times = interleave(candidates, given.rounds, device=given.device)
    for name, kind in kinds.items():
        ratio = table.add(f"{name} / timm float32", times, name, "timm", f"<= {goals[kind]}", overhead=True)
        best[kind] = min(best.get(kind, (ratio, name)), (ratio, name))
    for kind, (ratio, name) in best.items():
        options = " ".join(f"--optim.{option}" for option in name.split(", "))
        table.note(f"fastest in {kind}: {options} ({ratio:.2f})")


def limit(table: Table, given) -> None:
    """Print GFLOP/s of products as large as those of the model, and what a step makes of them."""
    device = torch.device(given.device)
    model = create_model(TIMM[given.model], num_classes=CLASSES).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device="meta")).sum().backward()
    flops = counter.get_total_flops() * given.batch
    width = model.embed_dim
    shapes = {"2048^3": (2048, 2048, 2048), "fc1": (197 * given.batch, width, 4 * width)}
    dtype = torch.bfloat16 if given.amp == "bf16" else torch.float32
    candidates = {}
    for name, (rows, inner, columns) in shapes.items():
        one, other = torch.rand(rows, inner, device=device), torch.rand(inner, columns, device=device)
        candidates[name] = partial(torch.mm, one.to(dtype), other.to(dtype))
    kernels = {"amp": given.amp, "attention": given.attention, "matmul": given.matmul, "compile": given.compile}
    candidates["step"] = ours(given.model, batch(given.batch), device, **MJP, **kernels)
    with Precision("none", given.matmul, device).products():
        times = interleave(candidates, given.rounds, device=given.device)
    largest = {  # milliseconds of the step at the rate of the faster product, by round
        "products": [
            flops / max(2 * math.prod(shapes[name]) / times[name][k] for name in shapes) for k in range(given.rounds)
        ]
    }
    goal = "" if given.device == "cuda" else {"none": ">= 0.75", "bf16": ">= 0.70"}[given.amp]
    table.add("share of the products' rate in a step", times | largest, "step", "products", goal)
    rates = {
        name: 2e-6 * rows * inner * columns / statistics.median(times[name])
        for name, (rows, inner, columns) in shapes.items()
    }
    rates["step"] = 1e-6 * flops / statistics.median(times["step"])
    table.note(f"{flops / given.batch / 1e9:.2f} GFLOP per image, forward and backward")
    for name, rate in rates.items():
        share = f", {100 * rate / max(rates['2048^3'], rates['fc1']):.0f} % of the products" * (name == "step")
        table.note(f"{name}: {rate:.0f} GFLOP/s{share}")
    table.note(f"{1e3 * given.batch / statistics.median(times['step']):.1f} images/s")


COMPARISONS = {"step": step, "shuffle": shuffle, "recipe": recipe, "limit": limit}


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=13)
    parser.add_argument("--only", default=",".join(COMPARISONS), help="comma-separated comparisons (default: all)")
    parser.add_argument("--model", choices=TIMM, default="deit_small", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default: %(default)s)")
    parser.add_argument("--amp", choices=["none", "bf16"], default="none", help="default: %(default)s")
    parser.add_argument("--attention", choices=["fused", "plain"], default="fused", help="default: %(default)s")
    parser.add_argument(
        "--matmul", choices=["highest", "high", "medium"], default="highest", help="default: %(default)s"
    )
    parser.add_argument("--compile", action="store_true", help="compile both; in `recipe`, try it too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    given = parser.parse_args()
    chosen = [look_up(COMPARISONS, name, "comparison") for name in given.only.split(",")]
    if given.device == "cpu":
        start_anew("benchmarks.training")
    random.seed(0)
    torch.manual_seed(0)
    table = Table(given.rounds, given.device)
    for compare in chosen:
        compare(table, given)
        table.write(given.json)  # after each, so that one that fails costs no other its rows


if __name__ == "__main__":
    run_command(main)
