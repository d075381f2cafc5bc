"""Small victims of gradient matching, and the attack on them that the tests of the loop share."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attacks.matching import MatchingOptions, gradient_matching, problem
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import Leak, Reconstruction
from defenses import no_defense
from models import build_model
from models.checkpoints import save_checkpoint
from models.jigsaw import Jigsaw

UNDEFENDED = partial(no_defense, generator=torch.Generator())
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.24, 0.26)
VIT = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}


class Net(nn.Module):
    """Convolution, BatchNorm, dropout and a classifier for 8 x 8 pictures in four cells."""

    hides_positions, grid, patch_size = False, (2, 2), 4

    def __init__(self, norm: bool = False, dropout: float = 0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.avg_pool2d(self.norm(self.conv(images)).sigmoid(), 2)
        return self.fc(self.drop(features.flatten(1)))


def net(seed: int = 0, **options) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Net(**options)
        if options.get("norm"):
            nn.init.uniform_(model.norm.running_var, 0.5, 2)
            nn.init.normal_(model.norm.running_mean)
        return model.double().eval()


def vit(**options) -> nn.Module:
    return build_model("vit", num_classes=5, **{**VIT, **options}).double().eval()


def swin() -> nn.Module:
    return build_model("swin_tiny", num_classes=5, **SWIN).double().eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def client(model: nn.Module, number: int = 1, seed: int = 0, ratio: float = 0.0, hidden: bool = False, **options):
    """(private batch, its leak): smooth pictures, normalised, with labels that differ."""
    own, side = generator(seed), model.grid[0] * model.patch_size
    coarse = torch.rand(number, 3, 4, 4, generator=own, dtype=torch.float64)
    pixels = nn.functional.interpolate(coarse, size=side, mode="bilinear")
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels = torch.randperm(5, generator=own).repeat(2)[:number]
    dtype = next(model.parameters()).dtype
    private = prepare(model, images.to(dtype), labels, Jigsaw(model.grid, ratio, "uniform", seed=seed), 0)
    return private, share(model, private, UNDEFENDED, not hidden, mean=MEAN, std=STD, **options)


def leaks_of(model: nn.Module, victims: int = 3, **options) -> list[Leak]:
    return [client(model, seed=seed, **options)[1] for seed in range(victims)]


match = gradient_matching(MatchingOptions())


def attack(leaks: Leak | list[Leak], seeds: list[int] | None = None, **options):
    options = {"iterations": 4} | options
    if isinstance(leaks, Leak):
        return match(leaks, generator=generator(seeds[0] if seeds else 0), **options)
    return match(leaks, generator=[generator(seed) for seed in seeds or range(len(leaks))], **options)


def start_at(monkeypatch: pytest.MonkeyPatch, *restarts: Tensor) -> None:
    """Let every attack of the test start at these batches, one per restart."""
    monkeypatch.setattr(problem, "first_images", lambda leak, init, number, own: torch.stack(restarts))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1e-12, float(other.abs().max())))


def same(one: Reconstruction, other: Reconstruction, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(one.images, other.images, rtol=tolerance, atol=tolerance)
    assert one.labels.equal(other.labels)
    approximately = pytest.approx(other.diagnostics["objective"], rel=1e-6, abs=1e-15)
    assert one.diagnostics == other.diagnostics | {"objective": approximately}


def image_prior_file(folder: Path, **options) -> str:
    cnn = build_model("resnet20_4", num_classes=3, image_size=8, width=2, **options)
    for layer in cnn.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, generator=generator(3))
    normalize = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    content = {"arguments": cnn.arguments, "model": cnn.state_dict(), "normalize": normalize}
    save_checkpoint(folder / "cnn.pt", content)
    return str(folder / "cnn.pt")
