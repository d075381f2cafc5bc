"""Servers that put an imprint block in front of a network: bins of a functional, or trap rows."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attacks.malicious.bins import expected_share, thresholds
from attacks.malicious.imprint_block import READS, ImprintBlock, plant
from attacks.malicious.server import Knowledge, Server, require
from models.jigsaw import patchify
from utils.errors import UserError

FUNCTIONALS = ("brightness", "cosine", "random")
SPREAD = {"brightness": 0.5, "cosine": 0.3, "random": 0.08}  # assumed deviation in units of |x| / sqrt(P)


@dataclass(frozen=True, kw_only=True)
class Imprint(Server):
    power = "malicious_model"
    attack = "imprint"
    bins: int = 256
    """Rows of the block, and bins of its functional; for `reads` place: at every place."""
    reads: str = "image"
    """What a row reads: the whole image; a patch, all places alike; or the patch of one place."""
    structure: str = "cumulative"
    """cumulative: a row is active from its threshold on (ReLU); sparse: in its bin alone; one_shot: one bin that one of
    `expected_images` images is expected to lie in."""
    functional: str = "brightness"
    """What is binned: mean brightness, the lowest cosine, or a random direction."""
    expected_images: int = 64
    """one_shot: images behind the leak, over all clients."""
    gain: float = 1e-3
    """Size of what the block adds to its input; small values change little of what the network computes."""
    disguise: float = 0.0
    """Noise of high frequency in every row, in parts of its length, and rows out of order: photographs have little of
    it, so that bins stay what they are, and rows no longer look alike."""

    def __post_init__(self):
        require(0 <= self.disguise < math.inf, "disguise", "0 or more and finite", self.disguise)
        require(self.bins >= 2, "bins", "2 or more", self.bins)
        require(self.reads in READS, "reads", " or ".join(READS), self.reads)
        known = ("cumulative", "sparse", "one_shot")
        require(self.structure in known, "structure", " or ".join(known), self.structure)
        require(self.functional in FUNCTIONALS, "functional", " or ".join(FUNCTIONALS), self.functional)
        require(self.expected_images >= 2, "expected_images", "2 or more", self.expected_images)
        require(0 < self.gain < math.inf, "gain", "above 0 and finite", self.gain)

    def check(self, model: nn.Module) -> None:
        check_images(model)

    def masses(self) -> Tensor:
        """Return the probabilities (K,) of the bins, in ascending order of the functional."""
        if self.structure == "one_shot":
            one = 1 / self.expected_images
            return torch.tensor([(1 - one) / 2, one, (1 - one) / 2], dtype=torch.float64)
        return torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)

    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        self.check(model)
        model = copy.deepcopy(model)
        groups = model.grid[0] * model.grid[1] if self.reads == "place" else 1
        direction = _direction(self.functional, self.reads, model.patch_size, knowledge.image_shape, generator)
        cells = None if knowledge.public is None else _cells(knowledge.public, self.reads, model.patch_size)
        size = len(direction) - (self.reads != "image")
        spread = SPREAD[self.functional] * size**0.5 * (1.0 if self.reads == "image" else 1.5)
        edges = [
            thresholds(_values(cells, direction, place if groups > 1 else None), 0.0, spread, self.masses())
            for place in range(groups)
        ]
        edges = torch.stack(edges)  # (G, K)
        weight, bias, order = direction.expand(*edges.shape, -1), -edges, torch.arange(edges.shape[1])
        if self.disguise:
            shape = knowledge.image_shape
            side = shape if self.reads == "image" else (shape[0], model.patch_size, model.patch_size)
            noise = _high_frequencies((*edges.shape, *side), generator).flatten(2)
            weight = weight + self.disguise * nn.functional.pad(noise, (0, len(direction) - size))
            order = torch.randperm(edges.shape[1], generator=generator)
        if self.structure == "sparse":  # slope one over the width: from 0 to 1 inside the bin
            last = (edges[:, -1:] - edges[:, 1:2]).clamp_min(1e-6)
            width = torch.cat([edges[:, 1:] - edges[:, :-1], last], dim=1).clamp_min(1e-9)
            weight, bias = weight / width[..., None], bias / width
        place = order.argsort()  # row order[k] holds threshold k
        weight, bias = weight[:, place], bias[:, place]
        block = ImprintBlock(
            weight.to(next(model.parameters())).contiguous(),
            bias.to(next(model.parameters())).contiguous(),
            edges=edges,
            functional=direction,
            reads=self.reads,
            structure="sparse" if self.structure == "sparse" else "cumulative",
            patch_size=model.patch_size,
            grid=model.grid,
            gain=self.gain,
            order=order,
            sure=not self.disguise,
        )
        return plant(model, block)

    def guarantee(self, images: int, public: int | None = None) -> float:
        masses = self.masses().tolist()
        if self.structure == "one_shot":
            masses = masses[1:2]
        return expected_share(masses, images, public)


@dataclass(frozen=True, kw_only=True)
class TrapWeights(Server):
    power = "malicious_model"
    attack = "imprint"
    rows: int = 256
    """Rows of the block."""
    scale: float = 0.95
    """Positive half of a row in parts of its negative half: the smaller, the fewer images a row is active for."""
    deviation: float = 0.5
    """Standard deviation of the negative entries."""
    gain: float = 1e-3
    """Size of what the block adds to its input."""

    def __post_init__(self):
        require(self.rows >= 1, "rows", "1 or more", self.rows)
        require(0 < self.scale < 2, "scale", "above 0 and below 2", self.scale)
        require(0 < self.deviation < math.inf, "deviation", "above 0 and finite", self.deviation)
        require(0 < self.gain < math.inf, "gain", "above 0 and finite", self.gain)

    def check(self, model: nn.Module) -> None:
        check_images(model)

    def tamper(self, model: nn.Module, knowledge: Knowledge, *, generator: torch.Generator) -> nn.Module:
        self.check(model)
        model = copy.deepcopy(model)
        size = math.prod(knowledge.image_shape)
        half = size // 2
        negative = -(self.deviation * torch.randn(self.rows, half, generator=generator, dtype=torch.float64)).abs()
        pairs = torch.stack([torch.randperm(half, generator=generator) for _ in range(self.rows)])
        values = torch.cat([negative, -self.scale * negative.gather(1, pairs)], dim=1)  # (K, 2 half)
        values = torch.nn.functional.pad(values, (0, size - 2 * half))
        places = torch.stack([torch.randperm(size, generator=generator) for _ in range(self.rows)])
        weight = torch.zeros_like(values).scatter_(1, places, values)
        # The rows are meant for pixels in [0, 1]: fold the normalisation of the input into weight and bias.
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (knowledge.mean, knowledge.std))
        area = size // len(mean)
        mean, std = mean.repeat_interleave(area), std.repeat_interleave(area)
        like = next(model.parameters())
        block = ImprintBlock(
            (weight * std)[None].to(like),
            (weight @ mean)[None].to(like),
            edges=torch.full((1, self.rows), -math.inf, dtype=torch.float64),
            functional=torch.zeros(size, dtype=torch.float64),
            reads="image",
            structure="trap",
            patch_size=model.patch_size,
            grid=model.grid,
            gain=self.gain,
        )
        return plant(model, block)


def trap_share(active: Tensor, images: int) -> float:
    """Return the expected share of `images` images that some trap row reads alone, 0 to 1.

    active (M, K) bool: which rows are active for public pictures. An image drawn from them is read by a row that is
    active for it and for none of the n - 1 others, drawn independently: the mean over pictures of
    1 - prod over its active rows of (1 - (1 - p_k)^(n - 1)), rows taken as independent.
    """
    alone = (1 - active.double().mean(dim=0)) ** (images - 1)  # (K,)
    missed = torch.where(active, 1 - alone, torch.ones_like(alone)).prod(dim=1)
    return float((1 - missed).mean())


def check_images(model: nn.Module) -> None:
    """Raise UserError unless the model takes images and has no malicious part yet."""
    if hasattr(model, "vocab_size"):
        raise UserError("this server changes models of images, and this one is of sentences")
    if hasattr(model, "imprint"):
        raise UserError("the model has an imprint block already: choose one server")


def _cells(images: Tensor, reads: str, patch_size: int) -> Tensor:
    """Return what the rows read of images: (M, 1, P), or patches with the mean of their picture (M, N, P + 1)."""
    if reads == "image":
        return images.flatten(1)[:, None]
    patches = patchify(images, patch_size)
    mean = images.flatten(1).mean(dim=1)[:, None, None].expand(-1, patches.shape[1], 1)
    return torch.cat([patches, mean], dim=2)


def _values(cells: Tensor | None, direction: Tensor, place: int | None) -> Tensor | None:
    """Return the functional of public cells, of one place or of all, (M,); None without public pictures."""
    if cells is None:
        return None
    chosen = cells if place is None else cells[:, place : place + 1]
    return (chosen.double().cpu() @ direction).flatten()


def _high_frequencies(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return noise (..., H, W) without frequencies below a quarter of the sampling rate in either direction, each of
    its pictures (..., C, H, W) of length 1."""
    noise = torch.fft.fft2(torch.randn(shape, generator=generator, dtype=torch.float64))
    rows, columns = (torch.fft.fftfreq(size).abs() >= 0.25 for size in shape[-2:])
    noise = torch.fft.ifft2(noise * (rows[:, None] & columns)).real
    return noise / noise.flatten(-3).norm(dim=-1)[..., None, None, None]


def _direction(
    kind: str, reads: str, patch_size: int, image_shape: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Return the functional (P,) of a cell, of length 1; of patches with an entry of 0 for the mean of the picture."""
    channels, height, width = image_shape if reads == "image" else (image_shape[0], patch_size, patch_size)
    if kind == "random":
        pattern = torch.randn(channels, height, width, generator=generator, dtype=torch.float64)
    else:
        steps = torch.arange(width, dtype=torch.float64)
        wave = torch.cos(math.pi * (steps + 0.5) / width) if kind == "cosine" else torch.ones(width).double()
        pattern = wave.expand(channels, height, width)
    direction = (pattern / pattern.norm()).flatten()
    return direction if reads == "image" else nn.functional.pad(direction, (0, 1))
