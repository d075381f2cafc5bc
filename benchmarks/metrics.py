"""Speed of the reconstruction scores on one CPU thread: python -m benchmarks.metrics [--only ssim lpips]

Ours, called with batches of several sizes, against two others that score one pair at a time, the way of the official
MJP code, written anew here, and the package people would use instead; and against ours one at a time. In every round
each candidate scores the same pairs once; milliseconds are of a pair. The pairs are noise and the trunk of LPIPS is
random: good enough for timing. The difference of ssim to the official one is their treatment of the border.
"""

import tempfile
import warnings
from collections.abc import Callable
from functools import partial

import lpips as package
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn.functional import conv2d
from torchvision.models import alexnet

from benchmarks.interleaved_timing import Table, benchmark_parser, interleave
from eval.fft2d import fft2d
from eval.lpips import load_lpips
from eval.psnr_ssim import psnr, ssim, ssim_official

BATCHES = (1, 2, 4, 8, 16)
GOALS = {"psnr / official": 1.3, "ssim / scikit-image": 5, "ssim_official / official": 6}  # of batches of GOAL_BATCH
GOALS |= {"fft2d / official": 3.5, "lpips / official": 1.5}
GOAL_BATCH = 8
Score = Callable[[Tensor, Tensor], Tensor | float]


def official_psnr(x: Tensor, y: Tensor) -> Tensor:
    return -10 * torch.log10((x - y).pow(2).mean())


def official_ssim(window: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Compute SSIM by five two-dimensional depthwise convolutions per pair, zeros beyond the border."""
    blur = partial(conv2d, weight=window, padding=5, groups=3)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx.pow(2), blur(y * y) - my.pow(2), blur(x * y) - mx * my
    values = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx.pow(2) + my.pow(2) + 1e-4) * (vx + vy + 9e-4))
    return values.mean()


def official_fft2d(x: Tensor, y: Tensor) -> float:
    """Compute the score by NumPy's transform and the averages of SciPy's cosine distance as it was up to 1.11."""
    u, v = np.fft.fft2(x.numpy()).ravel(), np.fft.fft2(y.numpy()).ravel()
    return abs(1 - np.average(u * v) / np.sqrt(np.average(np.square(u)) * np.average(np.square(v))))


def official_lpips(network: package.LPIPS, x: Tensor, y: Tensor) -> Tensor:
    """Compute LPIPS by running the trunk once for each image of the pair."""
    total = torch.zeros(())
    features = [network.net(network.scaling_layer(2 * image - 1)) for image in (x, y)]
    for a, b, head in zip(*features, network.lins, strict=True):
        a, b = (image * torch.rsqrt(image.pow(2).sum(1, keepdim=True) + 1e-10) for image in (a, b))
        total += head((a - b) ** 2).mean()
    return total


def scikit_ssim(x: Tensor, y: Tensor) -> float:
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(x[0].numpy(), y[0].numpy(), channel_axis=0, **options)


def scikit_psnr(x: Tensor, y: Tensor) -> float:
    return peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1.0)


def contests() -> dict[str, tuple[Score, dict[str, Score]]]:
    """Return our function and its rivals, the official way first; rivals of one score need not be the same number."""
    offsets = torch.arange(11) - 5.0
    line = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11).contiguous()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(alexnet(weights=None).state_dict(), file.name)
        ours = load_lpips("alex", file.name)
        network = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    network.load_state_dict(ours.network.state_dict())
    official = {"official": partial(official_ssim, window)}
    return {
        "psnr": (psnr, {"official": official_psnr, "scikit-image": scikit_psnr}),
        "ssim": (ssim, {**official, "scikit-image": scikit_ssim}),
        "ssim_official": (ssim_official, official),
        "fft2d": (fft2d, {"official": official_fft2d}),
        "lpips": (
            ours,
            {"official": partial(official_lpips, network), "lpips": partial(network, normalize=True)},
        ),
    }


def one_at_a_time(score: Score, x: Tensor, y: Tensor) -> list[float]:
    return [float(score(a[None], b[None])) for a, b in zip(x, y, strict=True)]


def in_batches(score: Score, size: int, x: Tensor, y: Tensor) -> list[float]:
    return torch.cat([score(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)]).tolist()


@torch.no_grad()
def main() -> None:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--pairs", type=int, default=32, help="pairs scored in a round (default: %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SCORE", help="scores to time (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.pairs, 3, args.side, args.side, generator=generator)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    table = Table(args.rounds)
    for name, (ours, rivals) in contests().items():
        if args.only and name not in args.only:
            continue
        candidates = {rival: partial(one_at_a_time, score) for rival, score in rivals.items()}
        candidates |= {f"batch {size}": partial(in_batches, ours, size) for size in BATCHES}
        values = {key: candidate(x, y) for key, candidate in candidates.items()}
        times = {
            key: [each / args.pairs for each in found]
            for key, found in interleave(
                {key: partial(candidate, x, y) for key, candidate in candidates.items()}, args.rounds
            ).items()
        }
        for rival in rivals:
            difference = max(abs(a - b) for a, b in zip(values[rival], values["batch 1"], strict=True))
            for size in BATCHES:
                least = GOALS.get(f"{name} / {rival}") if size == GOAL_BATCH else None
                goal = f">= {least}" if least else ""
                table.add(f"{name}, batch {size} / {rival}", times, f"batch {size}", rival, goal)
            table.note(f"largest difference of a value: {difference:.1e}")
        for size in BATCHES[1:]:
            table.add(f"{name}, batch {size} / one at a time", times, f"batch {size}", "batch 1")
    table.write(args.json)


if __name__ == "__main__":
    main()
