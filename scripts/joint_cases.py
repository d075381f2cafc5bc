"""The cases that scripts/joint_table.py measures: which victims, on which pictures, by preset."""

from dataclasses import dataclass, field
from functools import partial

S32 = {"patch_size": 32, "embed_dim": 384, "depth": 12, "num_heads": 6}
B32 = {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12}
S16 = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
D192 = {"patch_size": 16, "embed_dim": 192, "depth": 8, "num_heads": 3, "num_classes": 10}
SMALL = {"patch_size": 8, "embed_dim": 96, "depth": 5, "num_heads": 3, "num_classes": 10}
WIDER = SMALL | {"embed_dim": 180}
S14 = {"num_classes": 1000}  # of the trained one: patches of 14 pixels, D = 384, 12 blocks with LayerScale
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
    return {
        "paper": _paper(),
        "equal": _equal(),
        "trained": _trained(),
        "half": _half(),
        "clients": _clients(),
        "claims": _claims(),
        "mixtures": _mixtures(),
    }


def _paper() -> dict[str, Case]:
    cases = {f"S/32, B = {size}": Case(size) for size in (1, 2, 3)}
    cases |= {f"S/32, B = {size}, float64": Case(size, dtype="float64") for size in (1, 2, 3)}
    for color in ("white", "black"):
        cases |= {f"S/32, B = {size}, {color} border": Case(size, border=color) for size in (1, 2, 3)}
    cases |= {f"D = 192, B = {size}": Case(size, D192, side=64) for size in (4, 5)}
    cases["D = 192, B = 5, float64"] = Case(5, D192, dtype="float64", side=64, batches=20)
    cases |= {"B/32, B = 5": Case(5, B32), "B/32, B = 7, float64": Case(7, B32, dtype="float64")}
    for ratio in (0.27, 0.5):
        cases |= {f"DeiT-S/16, MJP {ratio}": Case(1, S16, ratio, batches=10)}
        cases |= {f"DeiT-S/16, MJP {ratio}, float64": Case(1, S16, ratio, "float64", 20)}
    return cases


def _equal() -> dict[str, Case]:
    cases = {}
    for kind, size in (("twice", 2), ("twice", 3), ("grey", 2), ("pasted", 1), ("pasted", 2), ("pasted", 3)):
        cases[f"S/32, B = {size}, {kind}"] = Case(size, shown=kind, batches=2)
        cases[f"S/32, B = {size}, {kind}, float64"] = Case(size, shown=kind, batches=2, dtype="float64")
    return cases


def _trained() -> dict[str, Case]:
    own, cases = partial(Case, options=S14, trained=True), {}
    for dtype in ("float64", "float32"):
        cases |= {f"98 px, B = {size}, {dtype}": own(size, side=98, dtype=dtype, batches=3) for size in (1, 2, 3)}
        number = 20 if dtype == "float64" else 3  # at ratio 0.5 more than D - N - 4 patches are hidden
        cases[f"224 px, MJP 0.27, {dtype}"] = own(1, mask_ratio=0.27, dtype=dtype, batches=number)
    return cases


def _half() -> dict[str, Case]:
    own, cases = partial(Case, options=S14, trained=True), {}
    for sent in ("float16", "bfloat16"):
        cases |= {f"S/32, B = {size}, {sent}": Case(size, batches=1, sent=sent) for size in (1, 2, 3)}
        cases[f"S/32, B = 1, FedAvg of 2 steps, {sent}"] = Case(1, batches=2, sent=sent, local=(2, 1e-3))
        cases[f"DeiT-S/16, MJP 0.27, {sent}"] = Case(1, S16, 0.27, batches=1, sent=sent)
        cases |= {f"trained ViT-S/14, 98 px, B = {n}, {sent}": own(n, side=98, batches=1, sent=sent) for n in (1, 2, 3)}
    return cases


def _clients() -> dict[str, Case]:
    return {
        f"S/32, {size} clients, MJP 0.27 each, {dtype}": Case(size, S32, 0.27, dtype, 2, apart=True)
        for dtype in ("float64", "float32")
        for size in (2, 3)
    }


def _claims() -> dict[str, Case]:
    cases = {}
    for dtype in ("float32", "float64"):
        small = partial(Case, options=SMALL, dtype=dtype, side=24)
        cases |= {f"small, B = {size}, {dtype}": small(size, batches=17) for size in (2, 3)}
        cases[f"small, B = 2, black border, {dtype}"] = small(2, batches=16, border="black")
    for size, color in ((2, "white"), (3, "black")):  # nine patches inside the border, 16 in it
        name = f"25 patches, B = {size}, {color} border, float32"
        cases[name] = Case(size, WIDER, batches=17, border=color, side=40)
    return cases


def _mixtures() -> dict[str, Case]:
    return {
        f"{kind}, B = {size}, MJP {ratio}, positions x {positions}": Case(
            size, SMALL, ratio, side=side, shown=kind, positions=positions
        )
        for kind in PATCHES
        for size, ratio, side in ((1, 0.3, 32), (2, 0.0, 32), (3, 0.0, 24))
        for positions in (1, 50)
    }
