"""How fast the attacks are beside their peers: ratios of time per image and iteration.

    python -m benchmarks.attacks [--only lenet,vit,bf16,convnet,dlg,gradvit,terms,overhead] [--rounds 20] [--json FILE]

The attacks of a comparison take turns in one process on one thread: in every round each runs a few iterations, in
rotating order (benchmarks/interleaved_timing.py). A ratio is the median over rounds of (time of the peer / time of
ours), set-up and compilation not counted. Time is that of the processor, which a busy machine disturbs less than the
clock. The process starts anew with a malloc that keeps large blocks, for all alike. The peers are in
benchmarks/peers.py.

lenet     Inverting Gradients (cosine, total variation, signed Adam, boxed) on independent LeNet victims at 32 px,
          vectorised and compiled; peer: breaching, one victim at a time.
vit       the same on one ViT-Ti/16 at 224 px: float32 matrix products at precision 'medium', which is as exact but
          lets oneDNN do them, the same compiled, and compiled with a finite difference in place of the second
          derivative; peer: breaching. PSNR after the same few iterations from the same start.
bf16      the same at 'medium' and in bfloat16, in which a processor without bfloat16 arithmetic is many times slower;
          there it is left out, and so is bfloat16 in `convnet`, unless --only names them.
convnet   one ConvNet at 32 px, in float32 and in bfloat16; peer: breaching.
dlg       L-BFGS on image and label; peer: the closure of the DLG authors around torch.optim.LBFGS.
gradvit   both halves of the schedule on DeiT-S/16; peer: the loop of the MJP authors, written anew. Compiled it is
          gradvit_compiled, which only --only runs: its graphs take 10 minutes of a processor to compile.
terms     two terms of GradViT, forward and backward, on tensors as large as those of DeiT-S/16 and of the ResNet-50;
          peer: the same from torch's simplest calls.
overhead  the whole loop beside nothing but forward, backward and backward; here the ratio is ours / theirs.

How much 'medium' gains depends on the processor: twofold where MKL knows half of what it can do (AMD Zen 5), nothing
where it does not (Zen 3 and 4). The photographs ship with scikit-image. lenet, vit, bf16 and convnet
need `pip install breaching` (0.1.2).
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from skimage import data
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate
from torchvision.models import resnet50

from attacks.matching import MatchingOptions
from attacks.matching.derivative import build_derivative
from attacks.matching.initialization import first_images
from attacks.matching.loss import ReconstructionLoss, phases_of
from attacks.matching.objectives import mean_squared
from attacks.matching.priors import channel_statistics
from attacks.matching.problem import build_problem
from attacks.presets.dlg import dlg
from attacks.presets.gradvit import gradvit
from attacks.presets.inverting_gradients import inverting_gradients
from attacks.threat_model.leak import Leak
from benchmarks import peers
from benchmarks.interleaved_timing import Loop, Table, benchmark_parser, interleave, start_anew, stop, take_turns
from eval.psnr_ssim import psnr
from models import build_model
from utils.errors import look_up, run_command

TV = 0.2  # breaching's weight
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


def photographs(number: int, side: int) -> Tensor:
    """Return (number, 3, side, side) in [0, 1]: squares of half the height, cut out of photographs at random places."""
    generator, squares = torch.Generator().manual_seed(0), []
    for k in range(number):
        pixels = torch.from_numpy(getattr(data, PHOTOGRAPHS[k % len(PHOTOGRAPHS)])()).permute(2, 0, 1) / 255
        edge = min(pixels.shape[1:]) // 2
        top, left = (int(torch.randint(length - edge, (), generator=generator)) for length in pixels.shape[1:])
        square = pixels[None, :, top : top + edge, left : left + edge]
        squares.append(interpolate(square, (side, side), mode="bilinear", antialias=True))
    return torch.cat(squares)


def victims(model: nn.Module, number: int, side: int, *, mean: float = 0.5, std: float = 0.25, known: bool = True):
    """Return (leaks of one image each, labels told if `known`; the images' pixels)."""
    pixels, leaks = photographs(number, side), []
    for k in range(number):
        label = torch.tensor([7 * k % 100])
        loss = cross_entropy(model((pixels[k : k + 1] - mean) / std), label)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        told = label if known else None
        leaks.append(Leak(model, gradients, (3, side, side), 1, told, mean=(mean,) * 3, std=(std,) * 3))
    return leaks, pixels


def seeds(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(k) for k in range(number)]


def loop(attack: Callable, leaks: list[Leak], *, steps: int, **options) -> Loop:
    """Return the loop of one of our attacks on all leaks together."""

    def run(tick: Callable) -> Tensor:
        found = attack(leaks, generator=seeds(len(leaks)), watch=lambda *state: tick(), **options)
        return torch.cat([each.images for each in found])

    return Loop(run, steps=steps, images=len(leaks))


def derivative(leak: Leak, images: Tensor, options: MatchingOptions) -> Tensor:
    """Return d/d images (B, C, H, W) of what is minimised at first, as our attacks compute it."""
    problem = build_problem([leak], options, [torch.Generator()])
    function = build_derivative(ReconstructionLoss(problem, options), phases_of(options)[0], options)
    return function(images[None].detach(), problem.targets, problem.data)[0][0][0]


def decibel(images: Tensor, leak: Leak, pixels: Tensor) -> float:
    return float(psnr((images * leak.std[0] + leak.mean[0]).clamp(0, 1), pixels))


def lenet(table: Table, rounds: int) -> None:
    leaks, _ = victims(build_model("lenet", num_classes=100), 32, 32)
    options = {"tv": TV, "tv_form": "padded", "iterations": (rounds + 2) * 30, "compile": True}
    goals = {1: "", 16: ">= 8", 32: ">= 8"}
    loops = {str(n): loop(inverting_gradients, leaks[:n], steps=30, **options) for n in goals}
    theirs = partial(peers.breaching, leaks[0], seeds(1)[0], iterations=(rounds + 2) * 60, tv=TV)
    loops["breaching"] = Loop(theirs, steps=60)
    times = take_turns(loops, rounds)
    stop(loops)
    for n, goal in goals.items():
        table.add(f"LeNet 32 px, {n} compiled / breaching", times, str(n), "breaching", goal)


WAYS = {
    "highest": {"precision": "highest"},
    "medium": {"precision": "medium"},
    "compiled": {"precision": "medium", "compile": True},
    "difference": {"precision": "medium", "compile": True, "finite_difference": 3e-6},
    "bf16": {"precision": "bf16"},
}
VIT = {"compiled": ">= 1.6", "bf16": ">= 2"}
CONVNET = {"bf16": ">= 1.77"}


def vit(table: Table, rounds: int, names: Sequence[str] = ("medium", "compiled", "difference")) -> None:
    single(
        table,
        rounds,
        "ViT-Ti/16 224 px",
        victims(build_model("deit_tiny", num_classes=1000).eval(), 1, 224),
        names,
        VIT,
    )


def convnet(table: Table, rounds: int, names: Sequence[str] = ("highest", "bf16")) -> None:
    single(
        table, rounds, "ConvNet 32 px", victims(build_model("convnet", num_classes=10).eval(), 1, 32), names, CONVNET
    )


def single(table: Table, rounds: int, what: str, victim: tuple, names: Sequence[str], goals: dict[str, str]) -> None:
    """Compare one victim, (leaks, pixels), attacked in these ways with breaching, and their gradients with float64."""
    leaks, pixels = victim
    steps, iterations = 3, (rounds + 2) * 3
    options = {"tv": TV, "tv_form": "padded", "iterations": iterations, "steps": steps}
    loops = {name: loop(inverting_gradients, leaks, **options | WAYS[name]) for name in names}
    theirs = partial(peers.breaching, leaks[0], seeds(1)[0], iterations=iterations, tv=TV)
    loops["breaching"] = Loop(theirs, steps=steps)
    times = take_turns(loops, rounds)
    for name in names:
        table.add(f"{what}, {name} / breaching", times, name, "breaching", goals.get(name, ""))
    scores = ", ".join(f"{name} {decibel(each.finish(), leaks[0], pixels):.2f} dB" for name, each in loops.items())
    table.note(f"PSNR after {iterations} iterations from one start: {scores}")
    start = first_images(leaks[0], "randn", 1, seeds(1)[0])[0]
    exact = peers.bare(leaks[0], dtype=torch.float64)(start)
    for name in names:
        arithmetic = {key: value for key, value in WAYS[name].items() if key != "compile"}
        found = derivative(leaks[0], start, MatchingOptions(objective="cosine", **arithmetic)).double()
        cosine = float(cosine_similarity(found.flatten(), exact.flatten(), dim=0))
        signs = float((found.sign() == exact.sign()).double().mean())
        table.note(f"image gradient, {name} beside float64: cosine {cosine:.6f}, signs equal {signs:.4f}")


def dlg_lenet(table: Table, rounds: int) -> None:
    leaks, pixels = victims(build_model("lenet", num_classes=100), 16, 32, mean=0.0, std=1.0, known=False)
    steps = 1800 // (rounds + 2)  # from this start torch is at work for 1,860 evaluations, and has converged then
    goals = {1: ">= 2", 4: ">= 3", 16: ">= 3"}
    loops = {str(n): loop(dlg, leaks[:n], steps=steps // (1 if n == 1 else 2), compile=True) for n in goals}
    loops["torch"] = Loop(partial(peers.textbook_dlg, leaks[0], seeds(1)[0], calls=300), steps=steps)
    times = take_turns(loops, rounds)
    for n, goal in goals.items():
        table.add(f"DLG on LeNet, {n} / torch.optim.LBFGS", times, str(n), "torch", goal)
    ends = (decibel(loops[name].finish()[:1], leaks[0], pixels[:1]) for name in ("torch", "1", "4"))
    table.note("PSNR of one victim and start: {:.1f} dB torch.optim, {:.1f} alone, {:.1f} among four".format(*ends))
    stop(loops)


def gradvit_deit(table: Table, rounds: int, compile: bool = False) -> None:  # noqa: A002
    model = build_model("deit_small", num_classes=1000).eval()
    leaks, _ = victims(model, 1, 224)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "resnet50.pth")
        torch.save(resnet50().state_dict(), file)
        options = {"image_prior_checkpoint": file, "restarts": 1, "group": 0.0, "precision": "medium", "steps": 2}
        loops = {}
        for half, switch in {"first": 0.5, "second": 0.0}.items():
            theirs = partial(peers.official_gradvit, leaks[0], file, seeds(1)[0], second_half=half == "second")
            loops[f"official {half}"] = Loop(theirs, steps=1)
            loops[half] = loop(gradvit, leaks, second_phase=switch, compile=compile, **options)
        times = take_turns(loops, rounds)
        stop(loops)
        for half, goal in {"first": ">= 3.2", "second": ">= 2.2"}.items():
            what = f"GradViT on DeiT-S/16, {half} half" + ", compiled" * compile
            table.add(what, times, half, f"official {half}", goal)
        start = first_images(leaks[0], "uniform", 1, seeds(1)[0])[0].requires_grad_()
        terms = peers.common_terms(leaks[0], peers.unfused(model), file, start)
        ours = {"matching": {"objective_weight": 1.0}, "image": {"image_prior": 1.0}, "extra": {"tv": 1.0, "l2": 1.0}}
        for name, weights in ours.items():
            (theirs,) = torch.autograd.grad(terms[name], start)
            options = MatchingOptions("mean_squared", 0.0, precision="medium", image_prior_checkpoint=file)
            found = derivative(leaks[0], start.detach(), replace(options, **weights))
            error = float((found - theirs).norm() / theirs.norm())
            table.note(f"gradient of the {name} term: relative difference {error:.1e}")


def terms(table: Table, rounds: int) -> None:
    model, trunk, features = build_model("deit_small", num_classes=1000), resnet50().eval(), []
    for layer in trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0]))
    with torch.no_grad():
        trunk(torch.zeros(1, 3, 224, 224))
    maps = [torch.randn_like(value).requires_grad_() for value in features]
    ours, theirs = (
        {name: torch.randn_like(value).requires_grad_(own) for name, value in model.named_parameters()}
        for own in (True, False)
    )

    def matching(distance: Callable) -> Callable:
        return lambda: torch.autograd.grad(distance(ours, theirs), [*ours.values()])

    def statistics(summary: Callable) -> Callable[[], None]:
        def run() -> None:
            total = torch.stack([value.sum() for each in maps for value in summary(each)]).sum()
            torch.autograd.grad(total, maps)

        return run

    def squares(candidate: dict, target: dict) -> Tensor:
        return torch.stack([(candidate[name] - target[name]).square().mean() for name in target]).sum()

    def textbook(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.mean(dim=(0, 2, 3)), images.var(dim=(0, 2, 3), unbiased=False)

    candidates = {"ours": matching(mean_squared), "squares": matching(squares)}
    candidates |= {"statistics": statistics(channel_statistics), "textbook": statistics(textbook)}
    times = interleave(candidates, rounds)
    table.add("objective of GradViT / square().mean()", times, "ours", "squares")
    table.add("statistics of its image prior / var()", times, "statistics", "textbook")


def overhead(table: Table, rounds: int) -> None:
    cases = [
        ("LeNet", "lenet", 32, 1, 100, False),
        ("ViT-Ti/16 224 px", "deit_tiny", 224, 1, 2, False),
        ("ConvNet 32 px", "convnet", 32, 1, 2, False),
        ("LeNet, compiled", "lenet", 32, 1, 100, True),
        ("16 LeNets, compiled", "lenet", 32, 16, 30, True),
    ]
    for what, name, side, number, steps, compiled in cases:
        leaks, _ = victims(build_model(name, num_classes=100).eval(), number, side)
        slope = peers.bare_compiled(leaks) if compiled else peers.bare(leaks[0])
        start = torch.cat([first_images(leaks[0], "randn", 1, own) for own in seeds(number)])
        images = start if compiled else start[0]

        def repeat(tick: Callable, slope=slope, images=images) -> None:
            while True:
                tick()
                slope(images)

        options = {"iterations": (rounds + 2) * steps, "compile": compiled, "tv": 0.0}
        loops = {"ours": loop(inverting_gradients, leaks, steps=steps, **options)}
        loops["bare"] = Loop(repeat, steps=steps, images=number)
        table.add(f"{what}: loop / derivative", take_turns(loops, rounds), "ours", "bare", "<= 1.10", overhead=True)
        stop(loops)


COMPARISONS = {"lenet": lenet, "vit": vit, "bf16": partial(vit, names=("medium", "bf16"))}
COMPARISONS |= {"convnet": convnet, "dlg": dlg_lenet}
COMPARISONS |= {"gradvit": gradvit_deit, "terms": terms, "overhead": overhead}
NAMED = {"gradvit_compiled": partial(gradvit_deit, compile=True)}  # by --only alone
IN_FLOAT32 = {name: work for name, work in COMPARISONS.items() if name != "bf16"}
IN_FLOAT32["convnet"] = partial(convnet, names=("highest",))
SLOW = 3.0


def bf16_slowdown() -> float:
    """Return how many times as long a matrix product takes in bfloat16 as in float32 on this machine."""
    factor = torch.rand(512, 512)
    products = {str(dtype): partial(torch.mm, *[factor.to(dtype)] * 2) for dtype in (torch.float32, torch.bfloat16)}
    plain, half = (median(times) for times in interleave(products, 3).values())
    return half / plain


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=20)
    parser.add_argument("--only", help="comma-separated comparisons (default: all that are not bound to be slow here)")
    arguments = parser.parse_args()
    named = arguments.only.split(",") if arguments.only else COMPARISONS
    chosen = [look_up(COMPARISONS | NAMED, name, "comparison") for name in named]
    start_anew("benchmarks.attacks")
    table = Table(arguments.rounds)
    if not arguments.only and (times := bf16_slowdown()) > SLOW:
        chosen = list(IN_FLOAT32.values())
        table.note(f"bf16 is left out: a product takes {times:.0f} times as long here (--only bf16,convnet runs it)")
    for compare in chosen:
        compare(table, arguments.rounds)
        table.write(arguments.json)  # after each, so that one that fails costs no other its rows


if __name__ == "__main__":
    run_command(main)
