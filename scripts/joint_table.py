"""Measure the joint attack on whole batches and whole masked images of photographs, in double and single precision.

    python scripts/joint_table.py --images DIR --output docs/results/joint_paper.json [--preset paper|equal|clients]
    python scripts/joint_table.py --images DIR --weights FILE --output docs/results/joint_trained.json --preset trained
    python scripts/joint_table.py --output docs/results/joint_claims.json --preset claims|mixtures

Random weights, one seed; labels hidden. Batches are taken in the order of the listing, spread over all of it. Each
measured batch is written at once, and not measured again. trained, half: also a trained ViT-S/14 with a random
classifier, weights of scripts/prepare_weights.py vit_small_patch14_saliency; half: gradients shared in 16 bits. claims:
small random victims on random pictures, none of them used while the attack was made, to see whether an error was ever
predicted too small; mixtures: the same on pictures whose patches are combinations of each other, or nearly equal.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import scipy
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from attacks import ATTACKS
from attacks.exactness import CERTAIN
from attacks.joint.block import Places
from attacks.joint.joint import forms_of
from attacks.joint.search import batch_tokens
from attacks.threat_model.client import Client, prepare, share
from attacks.threat_model.leak import LocalSteps, Reconstruction, RefusalError
from attacks.threat_model.victim import build_victim
from data.images import list_images, read_images
from defenses import build_defense
from eval.assignment import match_batch
from models.jigsaw import Jigsaw, patchify, unpatchify
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.progress import track
from utils.statistics import finite
from utils.tool_parser import ToolParser

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
S32 = {"patch_size": 32, "embed_dim": 384, "depth": 12, "num_heads": 6}
B32 = {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12}
S16 = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
D192 = {"patch_size": 16, "embed_dim": 192, "depth": 8, "num_heads": 3, "num_classes": 10}
SMALL = {"patch_size": 8, "embed_dim": 96, "depth": 5, "num_heads": 3, "num_classes": 10}
WIDER = SMALL | {"embed_dim": 180}
S14 = {"num_classes": 1000}  # of the trained one: patches of 14 pixels, D = 384, 12 blocks with LayerScale
WEIGHTS = "vit_small_patch14_saliency"
LIMITS = (60.0, 55.0, 35.0)  # dB
PATCHES = ("random", "greys", "colours", "ramp", "two greys", "few", "faint")  # kinds of patches of --preset mixtures


@dataclass(frozen=True)
class Case:
    """Batches of a victim. border: a white or black one, of half of the picture's patches; side: of a picture; shown:
    grey, twice (the last picture is the first one again), pasted (shrunk, at any place of a white one) or a kind of
    `of_patches`; trained: the weights are those of a file, `options` the changes; sent: the format of the shared
    gradients; local: (steps, rate) of a FedAvg update instead of a gradient; apart: each picture is that of a client of
    its own, with its own mask, and the clients are added up; positions: times which the table is larger."""

    batch_size: int
    options: dict = field(default_factory=lambda: S32)
    mask_ratio: float = 0.0
    dtype: str = "float32"
    batches: int = 5
    border: str = ""
    side: int = 224
    shown: str = ""
    trained: bool = False
    sent: str = "float32"
    local: tuple[int, float] | None = None
    apart: bool = False
    positions: float = 1.0


def presets() -> dict[str, dict[str, Case]]:
    """Return the cases of every preset by name."""
    paper = {f"S/32, B = {size}": Case(size) for size in (1, 2, 3)}
    paper |= {f"S/32, B = {size}, float64": Case(size, dtype="float64") for size in (1, 2, 3)}
    for color in ("white", "black"):
        paper |= {f"S/32, B = {size}, {color} border": Case(size, border=color) for size in (1, 2, 3)}
    paper |= {f"D = 192, B = {size}": Case(size, D192, side=64) for size in (4, 5)}
    paper["D = 192, B = 5, float64"] = Case(5, D192, dtype="float64", side=64, batches=20)
    paper |= {"B/32, B = 5": Case(5, B32), "B/32, B = 7, float64": Case(7, B32, dtype="float64")}
    for ratio in (0.27, 0.5):
        paper |= {f"DeiT-S/16, MJP {ratio}": Case(1, S16, ratio, batches=10)}
        paper |= {f"DeiT-S/16, MJP {ratio}, float64": Case(1, S16, ratio, "float64", 20)}
    equal = {}
    for kind, size in (("twice", 2), ("twice", 3), ("grey", 2), ("pasted", 1), ("pasted", 2), ("pasted", 3)):
        equal[f"S/32, B = {size}, {kind}"] = Case(size, shown=kind, batches=2)
        equal[f"S/32, B = {size}, {kind}, float64"] = Case(size, shown=kind, batches=2, dtype="float64")
    own = partial(Case, options=S14, trained=True)
    trained = {}
    for dtype in ("float64", "float32"):
        trained |= {f"98 px, B = {size}, {dtype}": own(size, side=98, dtype=dtype, batches=3) for size in (1, 2, 3)}
        number = 20 if dtype == "float64" else 3  # at ratio 0.5 more than D - N - 4 patches are hidden
        trained[f"224 px, MJP 0.27, {dtype}"] = own(1, mask_ratio=0.27, dtype=dtype, batches=number)
    half = {}
    for sent in ("float16", "bfloat16"):
        half |= {f"S/32, B = {size}, {sent}": Case(size, batches=1, sent=sent) for size in (1, 2, 3)}
        half[f"S/32, B = 1, FedAvg of 2 steps, {sent}"] = Case(1, batches=2, sent=sent, local=(2, 1e-3))
        half[f"DeiT-S/16, MJP 0.27, {sent}"] = Case(1, S16, 0.27, batches=1, sent=sent)
        half |= {f"trained ViT-S/14, 98 px, B = {n}, {sent}": own(n, side=98, batches=1, sent=sent) for n in (1, 2, 3)}
    clients = {
        f"S/32, {size} clients, MJP 0.27 each, {dtype}": Case(size, S32, 0.27, dtype, 2, apart=True)
        for dtype in ("float64", "float32")
        for size in (2, 3)
    }
    claims = {}
    for dtype in ("float32", "float64"):
        small = partial(Case, options=SMALL, dtype=dtype, side=24)
        claims |= {f"small, B = {size}, {dtype}": small(size, batches=17) for size in (2, 3)}
        claims[f"small, B = 2, black border, {dtype}"] = small(2, batches=16, border="black")
    for size, color in ((2, "white"), (3, "black")):  # nine patches inside the border, 16 in it
        name = f"25 patches, B = {size}, {color} border, float32"
        claims[name] = Case(size, WIDER, batches=17, border=color, side=40)
    mixtures = {}
    for kind in PATCHES:
        for size, ratio, side in ((1, 0.3, 32), (2, 0.0, 32), (3, 0.0, 24)):
            for positions in (1, 50):
                name = f"{kind}, B = {size}, MJP {ratio}, positions x {positions}"
                mixtures[name] = Case(size, SMALL, ratio, side=side, shown=kind, positions=positions)
    return {
        "paper": paper,
        "equal": equal,
        "trained": trained,
        "half": half,
        "clients": clients,
        "claims": claims,
        "mixtures": mixtures,
    }


def victims(case: Case, number: int, images: Path | None, weights: Path | None = None) -> tuple:
    """Return (leak, private) of batch `number` of a case: photographs, or random pictures where `images` is None;
    weights: the file of trained ones."""
    dtype, own = getattr(torch, case.dtype), torch.Generator().manual_seed(number)
    if images is None:
        shown, seed = random_pictures(case, own), number
    else:
        paths, seed = list_images(images), 0
        start, step = number * case.batch_size, max(1, len(paths) // (case.batch_size * case.batches))
        chosen = [paths[index * step] for index in range(start, start + case.batch_size)]
        shown = read_images(chosen, case.side, MEAN, STD)
    if case.border:
        shown = bordered(shown, case)
    if case.shown in PATCHES:
        shown = of_patches(shown, case, own)
    elif case.shown:
        shown = of_kind(shown, case.shown, own)
    unknown = {"unknown": True} if case.mask_ratio else {}
    name, file = (None, str(weights)) if case.trained else ("vit", None)
    model = build_victim(file, name, seed=seed, image_size=case.side, **case.options | unknown).to(dtype)
    model.pos_embed.data *= case.positions
    labels = torch.randint(model.arguments["num_classes"], (case.batch_size,), generator=own)
    jigsaw = Jigsaw(model.grid, case.mask_ratio, seed=seed)
    if case.apart:
        names = [str(place) for place in range(case.batch_size)]
        terms = {"reveal_labels": False, "mean": MEAN, "std": STD}
        classes = dict(zip(names, labels.tolist(), strict=True))
        sent = build_defense("half_precision", {"format": case.sent})
        client = Client(model, jigsaw, sent, seed, terms, classes, together=(case.batch_size, 1, None))
        private, leak, _ = client.round(number * case.batch_size, shown.to(dtype), names)
        return leak, private
    private = prepare(model, shown.to(dtype), labels, jigsaw, number)
    sent = partial(build_defense("half_precision", {"format": case.sent}).gradients, generator=torch.Generator())
    local = LocalSteps(*case.local, case.batch_size) if case.local else None
    return share(model, private, sent, False, mean=MEAN, std=STD, local=local), private


def random_pictures(case: Case, generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, S, S) of smooth colours with texture, normalised."""
    coarse = torch.rand(case.batch_size, 3, 4, 4, generator=generator)
    fine = torch.rand(case.batch_size, 3, case.side, case.side, generator=generator)
    pixels = 0.7 * torch.nn.functional.interpolate(coarse, size=case.side, mode="bilinear") + 0.3 * fine
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def bordered(images: Tensor, case: Case) -> Tensor:
    """Return the pictures (B, 3, S, S) with one patch at each side in one colour."""
    value = torch.full((1, 3, 1, 1), float(case.border == "white"))
    framed = ((value - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).expand_as(images).clone()
    inner = slice(case.options["patch_size"], -case.options["patch_size"])
    framed[..., inner, inner] = images[..., inner, inner]
    return framed


def of_kind(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Return normalised pictures (B, 3, S, S) as Case.shown says."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    if kind == "twice":
        return torch.cat([images[:-1], images[:1]])
    if kind == "grey":
        return ((images * std + mean).mean(dim=1, keepdim=True) - mean) / std
    side = images.shape[-1]
    inner, pasted = 5 * side // 7, ((1 - mean) / std).expand_as(images).clone()
    for image, (down, right) in enumerate(
        torch.randint(side - inner + 1, (len(images), 2), generator=generator).tolist()
    ):
        small = torch.nn.functional.interpolate(images[image][None], size=inner, mode="area")[0]
        pasted[image, :, down : down + inner, right : right + inner] = small
    return pasted


def of_patches(images: Tensor, case: Case, generator: torch.Generator) -> Tensor:
    """Return random pictures (B, 3, S, S) of which each patch is of one grey or colour, of one of two greys, or one of
    five patches; or which are a ramp from corner to corner; or of which each patch is its mean and little (faint)."""
    size = case.options["patch_size"]
    patches = patchify(images, size)  # (B, N, 3 p^2)
    number, channels = patches.shape[:2], (3, size * size)
    mean, std = (torch.tensor(value).view(3, 1) for value in (MEAN, STD))
    if case.shown in ("greys", "colours", "two greys"):
        value = torch.rand(*number, 3 if case.shown == "colours" else 1, 1, generator=generator)
        value = value.round() if case.shown == "two greys" else value
        patches = ((value - mean) / std).expand(*number, *channels).flatten(2)
    elif case.shown == "ramp":
        slopes, way = torch.rand(len(images), 2, 3, 1, 1, generator=generator), torch.linspace(0, 0.5, case.side)
        pixels = slopes[:, 0] * way[:, None] + slopes[:, 1] * way  # (B, 3, S, S)
        patches = patchify((pixels - mean[..., None]) / std[..., None], size)
    elif case.shown == "few":
        patches = patches[0, :5][torch.randint(5, number, generator=generator)]
    elif case.shown == "faint":
        average = patches.mean(dim=2, keepdim=True)
        patches = average + 0.02 * (patches - average)
    return unpatchify(patches, size, (case.side // size, case.side // size))


def measure(case: Case, number: int, images: Path | None, weights: Path | None) -> dict:
    """Return what `joint` reaches on one batch: PSNR of patches (dB) as a set and in place, and what it says itself."""
    leak, private = victims(case, number, images, weights)
    began = time.process_time()
    found = ATTACKS["joint"](leak, generator=torch.Generator().manual_seed(0))
    seconds, size = time.process_time() - began, leak.model.patch_size
    true = patchify(private.model_input.double(), size)  # (B, N, P)
    placed = patchify(found.images[match_batch(found.images, private.model_input)], size)
    whole, several = true.flatten(0, 1), placed.flatten(0, 1)
    as_set, in_place = decibels_of_set(several, whole), decibels(several, whole)
    scores, hidden = {"set": as_set, "in_place": in_place}, private.mask.expand(len(true), -1).flatten()
    if case.mask_ratio:
        scores |= {"visible": in_place[~hidden], "hidden": as_set[hidden]}
    told = {key: value for key, value in found.diagnostics.items() if isinstance(value, int | float)}
    row = {"seconds": seconds} | told | overclaimed(found, true)
    for name, values in scores.items():
        row |= {f"{name}_min": float(values.min()), f"{name}_median": float(values.median())}
        row |= {f"{name}_above_{int(limit)}": float((values > limit).double().mean()) for limit in LIMITS}
    return finite(row)  # what an attack could not measure is infinite in its diagnostics


def overclaimed(found: Reconstruction, true: Tensor) -> dict:
    """Return how many patches the certificate of a result claims, how many of those lie outside its radius around every
    patch of the batch (B, N, P), normalised, and how far at most, in radii; nothing without a certificate."""
    if found.certificate is None:
        return {}
    scale = torch.tensor(STD, dtype=torch.float64).repeat_interleave(true.shape[2] // 3)
    patches, radius = found.certificate.patches.flatten(0, 1), found.certificate.radius.flatten()
    away = torch.stack([((true.flatten(0, 1) - patch) * scale).abs().amax(dim=1).amin() for patch in patches])
    claimed = found.certificate.claimed.flatten()
    furthest = float((away / radius)[claimed].max()) if bool(claimed.any()) else 0.0
    return {
        "certified": int(claimed.sum()),
        "overclaimed": int((away > radius)[claimed].sum()),
        "furthest": furthest,
    }


def decibels(found: Tensor, true: Tensor) -> Tensor:
    """Return the PSNR (n,) of patches (n, P) of pixels in range 1, at most 400 dB."""
    scale = torch.tensor(STD, dtype=torch.float64).repeat_interleave(true.shape[1] // 3)
    return -10 * ((found - true) * scale).square().mean(dim=1).clamp_min(1e-40).log10()


def decibels_of_set(found: Tensor, true: Tensor) -> Tensor:
    """Return the PSNR (n,) of each true patch (n, P) in the pairing with found ones (n, P) that has the largest sum of
    them; one of least squared error gives exact patches away to bring a wrong one nearer."""
    apart = torch.stack([decibels(found, patch[None]) for patch in true])  # (n, n)
    rows, columns = scipy.optimize.linear_sum_assignment(apart.numpy(), maximize=True)
    return apart[rows, columns]


def claims(case: Case, number: int, images: Path | None, weights: Path | None = None) -> dict:
    """Return how many patches were claimed found, and the largest error of one, over what was predicted for it."""
    leak, private = victims(case, number, images, weights)
    places = Places.of(leak)
    tokens, rows, _ = batch_tokens(leak, forms_of(leak, places), places, torch.Generator().manual_seed(0))
    true = patchify(private.model_input.double(), leak.model.patch_size)  # (B, N, P)
    wrong = (tokens.patches[:, None] - true[:, rows].transpose(0, 1)).square().mean(dim=2).sqrt().amin(dim=1)
    sure = tokens.error * max(STD) < CERTAIN
    ratios = (wrong / tokens.error)[sure]
    return {
        "patches": true.shape[0] * true.shape[1],
        "claimed": int(sure.sum()),
        "worst": float(ratios.max()) if len(ratios) else 0.0,
        "over_10": int((ratios > 10).sum()),
        "median": float(ratios.median()) if len(ratios) else 0.0,
    }


def mixtures(case: Case, number: int, images: Path | None, weights: Path | None) -> dict:
    """Return what is certified of one batch, and how far it is off: the certificate's part of `measure`."""
    try:
        row = measure(case, number, images, weights)
    except RefusalError:  # hidden patches that are all equal: nothing is claimed of them
        row = {"certified": 0, "overclaimed": 0, "furthest": 0.0}
    return {key: row[key] for key in ("patches", "tokens", "certified", "overclaimed", "furthest") if key in row}


INVENTED = {"claims": claims, "mixtures": mixtures}  # presets without photographs, and what is measured of them


def summary(rows: list[dict]) -> dict:
    """Return n, and mean, sample standard deviation and extremes of every number over the batches that have it."""
    found = {"n": len(rows)}
    for key in rows[0]:
        numbers = [float(row[key]) for row in rows if row.get(key) is not None]
        if not numbers:
            continue
        values = torch.tensor(numbers, dtype=torch.float64)
        spread = float(values.std()) if len(numbers) > 1 else 0.0
        extremes = {"min": float(values.min()), "max": float(values.max())}
        found[key] = {"mean": float(values.mean()), "std": spread} | extremes
    return found


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of photographs")
    parser.add_argument("--weights", type=Path, help="file of the trained ViT-S/14, for trained and half")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; batches that are in it are kept")
    choices = "paper, trained: two hours of a core; half: an hour; mixtures: a quarter; others: some minutes"
    parser.add_argument("--preset", choices=sorted(presets()), default="paper", help=choices)
    parser.add_argument("--only", default="", help="measure only cases whose name contains this")
    parser.add_argument("--batches", type=int, default=20, help="at most so many batches of a case")
    options = parser.parse_args()
    if options.preset not in INVENTED and options.images is None:
        raise UserError(f"--preset {options.preset} needs --images: a folder of photographs")
    cases = {name: case for name, case in presets()[options.preset].items() if options.only in name}
    if not cases:
        raise UserError(f"--only {options.only}: no case of --preset {options.preset} contains it")
    if options.weights is None and any(case.trained for case in cases.values()):
        raise UserError(f"--preset {options.preset} needs --weights: of scripts/prepare_weights.py {WEIGHTS}")
    images = None if options.preset in INVENTED else options.images
    batches = json.loads(options.output.read_text())["batches"] if options.output.exists() else {}
    command = f"python scripts/joint_table.py --preset {options.preset}" + " --images PHOTOGRAPHS" * bool(images)
    command += " --weights FILE" * bool(options.weights)
    work = [
        (name, number)
        for number in range(options.batches)  # the first batch of every case, then the second
        for name, case in cases.items()
        if len(batches.get(name, [])) <= number < case.batches
    ]
    for name, number in track(work, len(work), "joint", print):
        done = batches.setdefault(name, [])
        done.append(INVENTED.get(options.preset, measure)(cases[name], number, images, options.weights))
        told = {
            key: asdict(case) | summary(batches[key])
            for key, case in presets()[options.preset].items()
            if batches.get(key)
        }
        write_json(options.output, {"command": command, "cases": told, "batches": batches})


if __name__ == "__main__":
    run_command(main)
