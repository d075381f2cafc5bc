"""LPIPS, the learned perceptual distance of Zhang et al. (CVPR 2018), version 0.1, with its AlexNet, VGG or SqueezeNet.

    python -m eval.lpips --source_dir DIR --target_dir DIR [--net alex] [--trunk FILE] [--json FILE]

The package lpips brings the learned heads; the trunk, torchvision's ImageNet classifier, is downloaded or read from a
local copy of torchvision's file. Any other weights, random ones above all, give numbers that look like LPIPS and are
not: a file whose SHA-256 is not torchvision's is scored under a name of its own.
"""

import hashlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eval.mse import chunks, comparable
from models.checkpoints import read_checkpoint
from utils.distributed import pick_device
from utils.errors import UserError, look_up, run_command

CHUNK = 4  # pairs in work at once on a CPU
DOWNLOADS = "https://download.pytorch.org/models/"


class Trunk(NamedTuple):
    """File of torchvision's ImageNet weights, SHA-256 prefixes of its releases and the smallest side it works on."""

    file: str
    sha256: tuple[str, ...]
    smallest: int


TRUNKS = {
    "alex": Trunk("alexnet-owt-7be5be79.pth", ("7be5be79", "4df8aa71"), 31),
    "vgg": Trunk("vgg16-397923af.pth", ("397923af",), 16),
    "squeeze": Trunk("squeezenet1_1-b8a52dc0.pth", ("b8a52dc0", "f364aa15"), 17),
}


@dataclass(frozen=True)
class LPIPS:
    """The distance as a function of two batches. `name` is what its values may be called: lpips_alex, or with weights
    that are not torchvision's lpips_alex_unverified, which compare with each other only."""

    name: str
    smallest: int
    network: nn.Module

    @torch.inference_mode()
    def __call__(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the perceptual distance, lower is closer. (B, 3 or 1, H, W) in [0, 1] twice -> (B,) float64."""
        reconstruction, target = (images.float() for images in comparable(reconstruction, target))
        if target.shape[1] == 1:  # grey, as an image in three equal colours
            reconstruction, target = (images.expand(-1, 3, -1, -1) for images in (reconstruction, target))
        if target.shape[1] != 3 or min(target.shape[2:]) < self.smallest:
            needed = f"(B, 3, H, W) with sides of at least {self.smallest} pixels"
            raise UserError(f"{self.name} needs images {needed}, got {tuple(target.shape)}")
        pieces = chunks(reconstruction, target, CHUNK)
        return torch.cat([self._distance(a, b) for a, b in pieces]).double()

    def _distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the package's forward pass in one run of the trunk, pixels innermost: on a CPU that is 1.4 times as
        fast."""
        import lpips as package  # brings SciPy's images, which no other score wants

        scaling = self.network.scaling_layer  # (2 x - 1 - shift) / scale
        offset, factor = (1 + scaling.shift) / 2, 2 / scaling.scale
        images = torch.cat([x - offset, y - offset]).mul_(factor).contiguous(memory_format=torch.channels_last)
        total = torch.zeros(len(x), device=x.device)
        for features, head in zip(self.network.net(images), self.network.lins, strict=True):
            features = package.normalize_tensor(features)
            total += head((features[: len(x)] - features[len(x) :]).square_()).mean((1, 2, 3))
        return total


def load_lpips(net: str = "alex", trunk: str | Path | None = None, device: str | torch.device = "cpu") -> LPIPS:
    """Return LPIPS with the trunk `net` (alex, vgg or squeeze), its weights from the file `trunk` or else
    torchvision's.

    torchvision's file is looked for in torch.hub's folder and downloaded to it. Raises UserError when that fails or
    the file is not a state dict of the trunk.
    """
    import lpips as package

    kind = look_up(TRUNKS, net, "LPIPS network")
    path = Path(trunk) if trunk else _download(kind)
    weights = read_checkpoint(path)
    with warnings.catch_warnings(), torch.device("meta"):  # built without values, so that no weight is a random one
        warnings.simplefilter("ignore")  # torchvision's, about the way the package calls it
        network = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = package.ScalingLayer()
    heads = read_checkpoint(Path(package.__file__).parent / f"weights/v0.1/{net}.pth")
    network.load_state_dict(heads, strict=False, assign=True)
    # The package cuts torchvision's layers into slices but keeps their numbers: slice2.3.weight is features.3.weight.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: weights[source] for name, source in names.items()}, assign=True)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"'{path}' does not hold a trunk '{net}': pass a copy of {DOWNLOADS}{kind.file}") from error
    network = network.requires_grad_(False).eval().to(device, torch.float32, memory_format=torch.channels_last)
    if torch.device(device).type == "cpu":
        _rearrange(network.net)
    genuine = hashlib.sha256(path.read_bytes()).hexdigest().startswith(kind.sha256)
    return LPIPS(f"lpips_{net}" if genuine else f"lpips_{net}_unverified", kind.smallest, network)


def _rearrange(trunk: nn.Module) -> None:
    """Let convolutions of 5 x 5, AlexNet's second, work with channels outermost: on a CPU a quarter faster."""
    for layer in trunk.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (5, 5):
            layer.to(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
            layer.register_forward_hook(lambda *call: call[2].contiguous(memory_format=torch.channels_last))


def _download(kind: Trunk) -> Path:
    """Return torchvision's file in torch.hub's folder, fetched if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / kind.file
    if not path.is_file():
        url = DOWNLOADS + kind.file
        print(f"downloading {url} to {path}", file=sys.stderr, flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=kind.sha256[0], progress=sys.stderr.isatty())
        except (OSError, RuntimeError, HTTPException) as error:  # no network, no space, another file, a broken line
            raise UserError(
                f"LPIPS needs {url}, which could not be downloaded ({error}): copy that file here and "
                f"pass it as --trunk FILE, or to attack.py as --lpips_trunk FILE"
            ) from error
    return path


def main(argv: Sequence[str] | None = None) -> None:
    from eval.image_folders import (
        FolderMetric,
        command_line,
        score_folders,
        shared_names,
    )  # here: it imports the metrics

    parser = command_line("lpips", __doc__)
    parser.add_argument("--net", default="alex", metavar="NAME", help=f"trunk: {', '.join(TRUNKS)} (default: alex)")
    parser.add_argument("--trunk", type=Path, metavar="FILE", help="local copy of torchvision's weights of the trunk")
    args = parser.parse_args(argv)
    shared_names(args.source_dir, args.target_dir, args.allow_missing)  # complain before anything is downloaded
    metric = load_lpips(args.net, args.trunk, pick_device(args.device))
    if metric.name.endswith("unverified"):
        print(
            f"note: the SHA-256 of '{args.trunk}' is not that of torchvision's {TRUNKS[args.net].file}: "
            "the values compare with each other, not with published LPIPS",
            file=sys.stderr,
        )
    score_folders(args, {metric.name: FolderMetric(metric, "lower is closer")})


if __name__ == "__main__":
    run_command(main)
