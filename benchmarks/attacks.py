"""How fast the attacks are beside their peers: ratios of time per image and iteration.

    python -m benchmarks.attacks [--only lenet,vit,dlg,gradvit,overhead] [--rounds 20] [--json FILE]

All attacks of a comparison take turns in one process on one thread: in every round each runs a few iterations, in
rotating order. A ratio is the median over rounds of (time of the peer / time of ours); compilation and set-up are not
counted. Time is that of the CPU: it equals the clock's on an idle machine and suffers less on a busy one. The process
starts itself anew with one thread and a malloc that keeps large blocks, for all alike.

lenet     Inverting Gradients (cosine, total variation, signed Adam, boxed) on 16 and 32 independent LeNet victims,
          32 px, vectorised and compiled; peer: the optimisation loop of breaching, one victim at a time, as it has to.
vit       the same attack on one ViT-Ti/16 at 224 px, in float32 by oneDNN and in bfloat16; peer: breaching, with the
          plain attention that has a second derivative. All end after the same few iterations from the same start.
dlg       L-BFGS on image and label; peer: the closure of the DLG paper's code around torch.optim.LBFGS.
gradvit   both halves of the schedule; peer: the MJP authors' loop, re-enacted here (`official_gradvit`).
overhead  the whole loop over nothing but forward and double backward; this ratio is ours / bare, lower is better.

The photographs ship with scikit-image. lenet and vit need `pip install breaching` (0.1.2).
"""

import argparse
import copy
import io
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, interpolate, mse_loss, one_hot
from torchvision.models import resnet50

from attacks.dlg import dlg
from attacks.energy import Energy, Phase
from attacks.gradvit import gradvit
from attacks.inverting_gradients import inverting_gradients
from attacks.leak import Leak
from attacks.priors import total_variation
from attacks.start import first_images, first_labels
from eval.psnr_ssim import psnr
from models import build_model
from utils.errors import UserError, look_up, run_command

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
}
TV = 0.2  # the weight in breaching's configuration


class Stop(Exception):  # noqa: N818, not an error
    """Ends an attack that nobody waits for."""


class Loop(threading.Thread):
    """An attack that only runs while `advance` lets it, so that several can take turns.

    attack(tick) calls tick() once per iteration and works on `images` images; a turn is `steps` iterations.
    """

    def __init__(self, attack, *, steps: int, images: int = 1):
        super().__init__(daemon=True)
        self.attack, self.steps, self.images = attack, steps, images
        self.left, self.result, self.error = 0, None, None
        self.granted, self.returned = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self.granted.acquire()
        try:
            self.result = self.attack(self.tick)
        except Exception as error:
            self.error = error
        self.returned.release()

    def tick(self) -> None:
        if self.left == 0:
            self.returned.release()
            self.granted.acquire()
            if self.left == 0:
                raise Stop
        self.left -= 1

    def advance(self, iterations: float) -> float:
        """Run that many iterations, or to the end; returns the seconds of CPU time they took."""
        self.left, start = iterations, time.process_time()
        self.granted.release()
        self.returned.acquire()
        if self.error and not isinstance(self.error, Stop):
            raise self.error
        return time.process_time() - start

    def finish(self):
        self.advance(math.inf)
        return self.result


def take_turns(loops: dict[str, Loop], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image and iteration of each loop, by round."""
    times, names = {name: [] for name in loops}, list(loops)
    for loop in loops.values():
        loop.advance(loop.steps)  # set-up, compilation, warm-up
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            loop = loops[name]
            times[name].append(loop.advance(loop.steps) / (loop.steps * loop.images) * 1e3)
    return times


def stop(loops: dict[str, Loop]) -> None:
    for loop in loops.values():
        if loop.is_alive():
            loop.advance(0)


class Table:
    """Prints the rows as they come and keeps them for --json."""

    def __init__(self):
        self.rows, self.notes = [], []
        print(f"{'what':<34}{'ours ms':>9}{'peer ms':>9}{'ratio':>8}   {'[min, max]':<16}goal", flush=True)

    def add(self, what: str, times: dict, ours: str, peer: str, goal: str, *, overhead: bool = False) -> None:
        pairs = zip(times[ours], times[peer], strict=True)
        ratios = [own / other if overhead else other / own for own, other in pairs]
        row = {"what": what, "ours_ms": statistics.median(times[ours]), "peer_ms": statistics.median(times[peer])}
        row |= {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "goal": goal}
        self.rows.append(row)
        spread = f"[{row['min']:.2f}, {row['max']:.2f}]"
        print(
            f"{what:<34}{row['ours_ms']:>9.3f}{row['peer_ms']:>9.3f}{row['ratio']:>8.2f}   {spread:<16}{goal}",
            flush=True,
        )

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"    {text}", flush=True)


def photographs(number: int, side: int) -> Tensor:
    """(number, 3, side, side) in [0, 1]: squares cut at random places out of real photographs."""
    from skimage import data

    sources, generator = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()], torch.Generator()
    cut = []
    for k in range(number):
        pixels = torch.from_numpy(sources[k % len(sources)]).permute(2, 0, 1) / 255
        edge = min(pixels.shape[1:]) // 2
        top, left = (int(torch.randint(length - edge, (), generator=generator)) for length in pixels.shape[1:])
        square = pixels[None, :, top : top + edge, left : left + edge]
        cut.append(interpolate(square, (side, side), mode="bilinear", antialias=True))
    return torch.cat(cut)


def victims(model: nn.Module, number: int, side: int, *, mean: float = 0.5, std: float = 0.25, known: bool = True):
    """(leaks of one image each, their pixels (number, 3, side, side))."""
    pixels, leaks = photographs(number, side), []
    for k in range(number):
        label = torch.tensor([7 * k % 100])
        loss = cross_entropy(model((pixels[k : k + 1] - mean) / std), label)
        gradients = dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True)
        )
        leaks.append(
            Leak(model, gradients, (3, side, side), 1, label if known else None, mean=(mean,) * 3, std=(std,) * 3)
        )
    return leaks, pixels


def seeds(leaks: list[Leak]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(len(leaks))]


def ours(attack, leaks: list[Leak], tick, **options):
    return attack(leaks, generator=seeds(leaks), watch=lambda *state: tick(), **options)


def quality(images: Tensor, leak: Leak, pixels: Tensor) -> float:
    return float(psnr((images * leak.std[0] + leak.mean[0]).clamp(0, 1), pixels))


def unfused(model: nn.Module) -> nn.Module:
    """A copy whose attention has a second derivative."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def breaching_attack(leak: Leak, tick, *, iterations: int) -> Tensor:
    """The reconstruction by breaching's own attacker, as its users call it."""
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import breaching

            options = [f"optim.max_iterations={iterations}", f"regularization.total_variation.scale={TV}"]
            config = breaching.get_attack_config("invertinggradients", options)
    except ImportError as error:
        raise UserError(
            f"the peer is not installed ({error}): pip install breaching, or leave out lenet and vit"
        ) from error
    model = unfused(leak.model)
    model.register_forward_pre_hook(lambda module, inputs: tick())
    about = SimpleNamespace(shape=leak.image_shape, mean=leak.mean, std=leak.std, modality="vision")
    payload = {"parameters": [*model.parameters()], "buffers": [*model.buffers()], "metadata": about}
    client = {"num_data_points": 1, "labels": leak.labels, "local_hyperparams": None}
    shared = {"gradients": [*leak.gradients.values()], "buffers": None, "metadata": client}
    attacker = breaching.attacks.prepare_attack(model, nn.CrossEntropyLoss(), config)
    start = first_images(leak, "randn", 1, seeds([leak])[0])[0]
    return attacker.reconstruct([payload], [shared], {}, initial_data=start)[0]["data"]


def lenet(table: Table, rounds: int) -> None:
    model = build_model("lenet", num_classes=100)
    leaks, _ = victims(model, 32, 32)
    options = {"tv": TV, "tv_form": "padded", "iterations": (rounds + 2) * 30, "compile": True}
    loops = {
        f"N={n}": Loop(partial(ours, inverting_gradients, leaks[:n], **options), steps=30, images=n)
        for n in (1, 16, 32)
    }
    loops["breaching"] = Loop(lambda tick: breaching_attack(leaks[0], tick, iterations=(rounds + 2) * 60), steps=60)
    times = take_turns(loops, rounds)
    for n, goal in ((1, ""), (16, ">= 8"), (32, ">= 8")):
        table.add(f"LeNet 32 px, {n} compiled / breaching", times, f"N={n}", "breaching", goal)
    stop(loops)


def vit(table: Table, rounds: int) -> None:
    model = build_model("deit_tiny", num_classes=1000).eval()
    leaks, pixels = victims(model, 1, 224)
    options = {"tv": TV, "tv_form": "padded", "iterations": (rounds + 2) * 5}
    loops = {
        precision: Loop(partial(ours, inverting_gradients, leaks, precision=precision, **options), steps=5)
        for precision in ("medium", "bf16")
    }
    loops["breaching"] = Loop(partial(breaching_attack, leaks[0], iterations=options["iterations"]), steps=5)
    times = take_turns(loops, rounds)
    table.add("ViT-Ti/16 224, float32 / breaching", times, "medium", "breaching", ">= 1.6")
    table.add("ViT-Ti/16 224, bf16 / breaching", times, "bf16", "breaching", ">= 2")
    ends = {name: loop.finish() for name, loop in loops.items()}
    ends = {name: end if name == "breaching" else end[0].images for name, end in ends.items()}
    scores = ", ".join(f"{name} {quality(end, leaks[0], pixels):.2f} dB" for name, end in ends.items())
    table.note(f"PSNR after {options['iterations']} iterations from one start: {scores}")
    start = first_images(leaks[0], "randn", 1, seeds(leaks)[0])[0]
    exact = bare_derivative(leaks[0], torch.float64)(start)
    for precision in ("highest", "medium", "bf16"):
        found = derivative(leaks[0], start, objective="cosine", precision=precision).double()
        signs = float((found.sign() == exact.sign()).double().mean())
        cosine = float(torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0))
        table.note(f"image gradient in {precision} against float64: cosine {cosine:.7f}, signs equal {signs:.4f}")


def derivative(
    leak: Leak, images: Tensor, *, objective: str, precision: str, weight: float = 1.0, file: str = "", **priors
):
    """d/d images of what our attacks minimise, (B, C, H, W)."""
    options = {"objective": objective, "layer_weights": "equal", "tv_form": "anisotropic", "joint": False}
    options |= {"image_prior_checkpoint": file, "finite_difference": 0.0, "precision": precision}
    energy = Energy(leak, list(leak.gradients), torch.zeros(()), **options)
    given = {f"target/{name}": value[None] for name, value in leak.gradients.items()}
    targets = one_hot(leak.labels, energy.classes).float()
    slope = energy.derivative(Phase(weight, 0.0, priors), 1, chunk=0, compile=False)
    return slope(images[None], targets[None], given)[0][0][0]


def textbook_dlg(leak: Leak, generator: torch.Generator, tick, *, calls: int) -> Tensor:
    """The closure of the DLG paper around torch.optim.LBFGS, up to 20 gradients per call; returns the image."""
    model, images = leak.model, first_images(leak, "randn", 1, generator)[0].requires_grad_()
    logits = first_labels(leak, "joint", 100, 1, generator)[0].requires_grad_()
    optimizer = torch.optim.LBFGS([images, logits])

    def closure() -> Tensor:
        tick()
        optimizer.zero_grad()
        loss = -(logits.softmax(dim=1) * model(images).log_softmax(dim=1)).sum(dim=1).mean()
        gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
        distance = sum(((a - b) ** 2).sum() for a, b in zip(gradients, leak.gradients.values(), strict=True))
        distance.backward()
        return distance

    for _ in range(calls):
        optimizer.step(closure)
    return images.detach()


def dlg_lenet(table: Table, rounds: int) -> None:
    model = build_model("lenet", num_classes=100)
    leaks, pixels = victims(model, 16, 32, mean=0.0, std=1.0, known=False)
    steps = 6000 // (rounds + 4)
    loops = {
        f"N={n}": Loop(partial(ours, dlg, leaks[:n], compile=True), steps=steps if n == 1 else steps // 2, images=n)
        for n in (1, 4, 16)
    }
    loops["torch"] = Loop(lambda tick: textbook_dlg(leaks[0], seeds(leaks)[0], tick, calls=300), steps=steps)
    times = take_turns(loops, rounds)
    for n, goal in ((1, ">= 2"), (4, ">= 3"), (16, ">= 3")):
        table.add(f"DLG on LeNet, {n} / torch.optim", times, f"N={n}", "torch", goal)
    ends = [loops["torch"].finish(), loops["N=1"].finish()[0].images, loops["N=4"].finish()[0].images]
    scores = [f"{quality(end, leaks[0], pixels[:1]):.1f}" for end in ends]
    table.note(f"PSNR of one victim and start: {scores[0]} dB torch.optim, {scores[1]} alone, {scores[2]} among four")
    stop(loops)


def official_gradvit(leak: Leak, file: str, tick, *, second_half: bool, iterations: int = 120000) -> None:
    """What one iteration of the MJP authors' gradvit code does, written anew.

    It builds the ResNet-50 and reads its file every time, evaluates it also while its weight is 0, puts a new random
    patch embedding into the patch prior, and differentiates for all parameters of both networks. To make common terms
    equal to ours it has the true label, evaluation mode and all BatchNorm layers: at best that makes it faster.
    """
    images = first_images(leak, "uniform", 1, seeds([leak])[0])[0].requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    model = unfused(leak.model)
    for _ in range(iterations):
        tick()
        model.zero_grad()
        weights = {"matching": 2e-3 if second_half else 4e-3, "image": 0.2 if second_half else 0, "extra": 1e-4}
        terms = official_terms(leak, model, file, images)
        total = sum(weight * terms[name] for name, weight in weights.items()) + 1e-4 * random_patch_prior(images)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        scheduler.step()


def official_terms(leak: Leak, model: nn.Module, file: str, images: Tensor) -> dict[str, Tensor]:
    """The terms that loop shares with `gradvit`."""
    loss = cross_entropy(model(images), leak.labels)
    gradients = torch.autograd.grad(loss, [*model.parameters()], create_graph=True)
    cnn = resnet50()
    cnn.load_state_dict(torch.load(file))
    cnn.eval()
    norms = [module for module in cnn.modules() if isinstance(module, nn.BatchNorm2d)]
    seen = []
    for module in norms:
        module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    cnn(images)
    return {
        "matching": sum(mse_loss(a, b) for a, b in zip(gradients, leak.gradients.values(), strict=True)),
        "image": sum(mse_loss(x.mean((0, 2, 3)), norm.running_mean) for x, norm in zip(seen, norms, strict=True))
        + sum(mse_loss(x.var((0, 2, 3), correction=0), norm.running_var) for x, norm in zip(seen, norms, strict=True)),
        "extra": total_variation(images, border="none") + images.norm(),
    }


def random_patch_prior(images: Tensor) -> Tensor:
    """Facing edges of neighbours in what a new random patch embedding makes of the image."""
    patches = nn.Conv2d(3, 768, 16, stride=16)(images).flatten(2).mT.reshape(1, 14, 14, 3, 16, 16)
    total = 0
    for k in range(13):
        total = total + mse_loss(patches[:, k + 1, :, :, 0], patches[:, k, :, :, 15])
        total = total + mse_loss(patches[:, :, k + 1, ..., 0], patches[:, :, k, ..., 15])
    return total


def gradvit_deit(table: Table, rounds: int) -> None:
    model = build_model("deit_small", num_classes=1000).eval()
    leaks, _ = victims(model, 1, 224)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "resnet50.pth")
        torch.save(resnet50().state_dict(), file)
        options = {"image_prior_checkpoint": file, "restarts": 1, "group": 0.0, "precision": "medium"}
        loops = {
            "first": Loop(partial(ours, gradvit, leaks, **options), steps=2),
            "second": Loop(partial(ours, gradvit, leaks, second_phase=0.0, **options), steps=2),
            "official first": Loop(partial(official_gradvit, leaks[0], file, second_half=False), steps=1),
            "official second": Loop(partial(official_gradvit, leaks[0], file, second_half=True), steps=1),
        }
        times = take_turns(loops, rounds)
        stop(loops)
        table.add("GradViT on DeiT-S, first half", times, "first", "official first", ">= 3.2")
        table.add("GradViT on DeiT-S, second half", times, "second", "official second", ">= 2.2")
        start = first_images(leaks[0], "uniform", 1, seeds(leaks)[0])[0].requires_grad_()
        terms = official_terms(leaks[0], unfused(model), file, start)
        for name, priors in {"matching": {}, "image": {"image_prior": 1.0}, "extra": {"tv": 1.0, "l2": 1.0}}.items():
            weight = float(name == "matching")
            theirs = torch.autograd.grad(terms[name], start)[0]
            found = derivative(
                leaks[0],
                start.detach(),
                objective="mean_squared",
                precision="medium",
                weight=weight,
                file=file,
                **priors,
            )
            error = float((found - theirs).norm() / theirs.norm())
            table.note(f"gradient of the {name} term: relative difference {error:.1e}")


def bare_derivative(leak: Leak, dtype: torch.dtype = torch.float32):
    """images -> d cosine / d images by plain autograd: forward, backward, backward."""
    model = unfused(leak.model).to(dtype)
    parameters = [*model.parameters()]
    targets = [value.to(dtype) for value in leak.gradients.values()]

    def slope(images: Tensor) -> Tensor:
        images = images.to(dtype).requires_grad_()
        gradients = torch.autograd.grad(cross_entropy(model(images), leak.labels), parameters, create_graph=True)
        return torch.autograd.grad(plain_cosine(gradients, targets), images)[0]

    return slope


def bare_compiled(leaks: list[Leak]):
    """images (V, 1, C, H, W) -> the same for several victims, vectorised and compiled."""
    model, labels = leaks[0].model, torch.stack([leak.labels for leak in leaks])
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    targets = {name: torch.stack([leak.gradients[name] for leak in leaks]) for name in parameters}

    def distance(images: Tensor, label: Tensor, target: dict[str, Tensor]) -> Tensor:
        gradients = grad(lambda own: cross_entropy(functional_call(model, own, images), label))(parameters)
        return plain_cosine(gradients.values(), target.values())

    slopes = torch.compile(vmap(grad(distance)), dynamic=False)
    return torch.no_grad()(lambda images: slopes(images, labels, targets))


def plain_cosine(gradients, targets) -> Tensor:
    pairs = list(zip(gradients, targets, strict=True))
    dot, own, other = (
        sum((x * y).sum() for x, y in some) for some in (pairs, [(x, x) for x, _ in pairs], [(y, y) for _, y in pairs])
    )
    return 1 - dot / (own.sqrt() * other.sqrt())


def repeat(slope, images: Tensor, tick) -> None:
    while True:
        tick()
        slope(images)


def overhead(table: Table, rounds: int) -> None:
    small, conv, tiny = (build_model(name, num_classes=100).eval() for name in ("lenet", "convnet", "deit_tiny"))
    cases = [
        ("LeNet, 1", small, 1, 32, 100, False),
        ("LeNet, 1 compiled", small, 1, 32, 100, True),
        ("LeNet, 16 compiled", small, 16, 32, 30, True),
        ("ConvNet 32 px, 1", conv, 1, 32, 3, False),
        ("ViT-Ti/16 224, 1", tiny, 1, 224, 3, False),
    ]
    for what, model, number, side, steps, compiled in cases:
        leaks, _ = victims(model, number, side)
        start = torch.cat([first_images(leak, "randn", 1, own) for leak, own in zip(leaks, seeds(leaks), strict=True)])
        bare = partial(
            repeat, bare_compiled(leaks) if compiled else bare_derivative(leaks[0]), start if compiled else start[0]
        )
        options = {"tv": 0.0, "iterations": (rounds + 2) * steps, "compile": compiled}
        loops = {"ours": Loop(partial(ours, inverting_gradients, leaks, **options), steps=steps, images=number)}
        loops["bare"] = Loop(bare, steps=steps, images=number)
        table.add(f"{what}: loop / derivative", take_turns(loops, rounds), "ours", "bare", "<= 1.10", overhead=True)
        stop(loops)


BENCHMARKS = {"lenet": lenet, "vit": vit, "dlg": dlg_lenet, "gradvit": gradvit_deit, "overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="comma-separated names of comparisons")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each attack (default: 20)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    chosen = [look_up(BENCHMARKS, name, "comparison") for name in arguments.only.split(",")]
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # read before the process has a line
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.attacks", *sys.argv[1:]], os.environ | ENVIRONMENT)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}", flush=True)
    table = Table()
    for benchmark in chosen:
        benchmark(table, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": table.rows, "notes": table.notes}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
