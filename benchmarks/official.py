"""The authors' MJP code beside ours, from a clone of it: the training step, its shuffle and its localization head.

    git clone https://github.com/yhlleo/MJP && pip install munch
    python -m benchmarks.official --clone MJP [--rounds 13] [--json FILE]

Their model, JigsawPuzzleMaskedRegion and DenseLocRegress are used as they are, in the loop of their main.py less what
is of GPUs: ratio 0.1 in every step, nonlinear localization, AdamW as a loop over parameters and as a fused kernel. Ours
is training.trainer.Trainer at equal settings, with fused and plain attention (theirs is plain). One thread, candidates
in turns, time of the processor. Loading the clone's files runs them. Two things are put right so that it starts: its
package `ssl` is found instead of Python's, and it does not register its models over timm's.
"""

import importlib.util
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.interleaved_timing import Table, benchmark_parser, interleave, start_anew
from benchmarks.training import CLASSES, MJP, SMOOTHING, batch, ours
from data.loaders import Batch
from models.jigsaw import Jigsaw, move_tokens, shuffle_patches
from models.localization import Localization
from training.optim import build_optimizer
from training.options import OptimOptions
from utils.errors import UserError, run_command

CPU = torch.device("cpu")


@contextmanager
def in_the_place_of(**replaced: types.ModuleType) -> Iterator[None]:
    """Let the block import these modules by those names (dots as underscores)."""
    names = {key: key.replace("_", ".") for key in replaced}
    before = {name: sys.modules.get(name) for name in names.values()}
    sys.modules.update({names[key]: module for key, module in replaced.items()})
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def load(clone: Path, file: str) -> types.ModuleType:
    path = clone / file
    if not path.is_file():
        raise UserError(f"--clone '{clone}' has no {file}: pass the folder of a clone of github.com/yhlleo/MJP")
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's old module names
            spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"'{path}' does not start ({error}): pip install munch") from error
    return module


def official_parts(clone: Path) -> tuple[type, type, type]:
    """Return (VisionTransformer, JigsawPuzzleMaskedRegion, DenseLocRegress) of the clone."""
    head = load(clone, "ssl_mjp/dlocr.py" if (clone / "ssl_mjp/dlocr.py").is_file() else "ssl/dlocr.py")
    named, registry = types.ModuleType("ssl"), types.ModuleType("registry")
    named.DenseLocRegress, registry.register_model = head.DenseLocRegress, lambda function: function
    with in_the_place_of(ssl=named, ssl_mjp=named), in_the_place_of(timm_models_registry=registry):
        vit = load(clone, "models/vit_timm.py")
    return (
        vit.VisionTransformer,
        load(clone, "data/masking_generator.py").JigsawPuzzleMaskedRegion,
        head.DenseLocRegress,
    )


def official_step(model: nn.Module, jigsaw: Callable, images: Batch, *, fused: bool) -> Callable[[], Tensor]:
    """Return their train_one_epoch for one batch: forward, both losses, backward, clipping, AdamW, reading the loss."""
    optimizer = build_optimizer(model.train(), OptimOptions(decay_pos_embed=True, fused=fused), 1e-3)
    criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

    def step() -> float:
        shown, mask = jigsaw(images.images)
        outputs = model(shown, torch.from_numpy(mask).long())
        loss = criterion(outputs.sup, images.labels)
        for place, predicted in zip(outputs.xy, outputs.predxy, strict=True):
            loss = loss + 0.01 * nn.functional.l1_loss(place, predicted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=13)
    parser.add_argument("--clone", type=Path, required=True, help="folder of a clone of github.com/yhlleo/MJP")
    parser.add_argument("--batch", type=int, default=8, help="images of a step (default: %(default)s)")
    given = parser.parse_args()
    vit, puzzle, regressor = official_parts(given.clone)
    start_anew("benchmarks.official")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    images, table = batch(given.batch), Table(given.rounds)

    jigsaw = puzzle()
    jigsaw._update_masking_generator(300, 20, 0.1)
    shape = {"embed_dim": 384, "depth": 12, "num_heads": 6, "num_classes": CLASSES}
    parts = {"use_unk": True, "use_dlocr": True, "dlocr_type": "nonlinear"}
    candidates = {
        name: official_step(vit(**shape, **parts), jigsaw, images, fused=fused)
        for name, fused in (("theirs", False), ("theirs, fused AdamW", True))
    }
    for attention in ("plain", "fused"):
        candidates[attention] = ours("deit_small", images, CPU, ratio=0.1, **MJP, attention=attention)
    times = interleave(candidates, given.rounds)
    for attention in ("plain", "fused"):
        for theirs in ("theirs", "theirs, fused AdamW"):
            table.add(f"step, {attention} attention / {theirs}", times, attention, theirs, overhead=True)

    own, tokens = Jigsaw((14, 14), 0.1), torch.randn(given.batch, 196, 384)
    candidates = {
        "theirs": partial(jigsaw, images.images),
        "pixels": lambda: shuffle_patches(images.images, own.draw()[1], 16),
        "positions": lambda: move_tokens(tokens[:1], own.draw()[1]),
    }
    times = interleave(candidates, 3 * given.rounds, repeat=5)
    table.add("mask and shuffle, positions / theirs", times, "positions", "theirs", "<= 0.05", overhead=True)
    table.add("mask and shuffle, pixels / theirs", times, "pixels", "theirs", overhead=True)

    mask = own.draw()[0]
    theirs, head = regressor(384, mlp_type="nonlinear"), Localization("nonlinear", 384, (14, 14))
    embedding, rows = nn.Embedding(198, 384), torch.randn(196, 384, requires_grad=True)
    visible = (~mask).long()

    def theirs_once() -> None:
        place, predicted = theirs(embedding, visible)
        nn.functional.l1_loss(place, predicted).backward()

    times = interleave({"theirs": theirs_once, "ours": lambda: head(rows, mask).backward()}, 3 * given.rounds, repeat=5)
    table.add("localization, both ways / theirs", times, "ours", "theirs", overhead=True)
    table.write(given.json)


if __name__ == "__main__":
    run_command(main)
