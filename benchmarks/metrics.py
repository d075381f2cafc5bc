"""Speed of the reconstruction scores on one CPU thread: python benchmarks/metrics.py

Ours, called with batches of several sizes, against two others that score one pair at a time: the way of the official
MJP code, written anew here, and the package people would use instead. In every round each candidate scores the same
pairs once, and time is that of the processor: what else the machine does then hits all alike. A ratio is the median
over rounds of theirs / ours. The pairs are noise and the trunk of LPIPS is random: good enough for timing. The last
column is the largest difference of a value; that of ssim to the official one is their treatment of the border.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lpips as package
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.nn.functional import conv2d
from torchvision.models import alexnet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval.fft2d import fft2d
from eval.lpips import load_lpips
from eval.psnr_ssim import psnr, ssim, ssim_official

BATCHES = (1, 2, 4, 8, 16)
Score = Callable[[Tensor, Tensor], Tensor | float]


def official_psnr(x: Tensor, y: Tensor) -> Tensor:
    return -10 * torch.log10((x - y).pow(2).mean())


def official_ssim(window: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Five two-dimensional depthwise convolutions per pair, zeros beyond the border."""
    blur = partial(conv2d, weight=window, padding=5, groups=3)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx.pow(2), blur(y * y) - my.pow(2), blur(x * y) - mx * my
    values = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx.pow(2) + my.pow(2) + 1e-4) * (vx + vy + 9e-4))
    return values.mean()


def official_fft2d(x: Tensor, y: Tensor) -> float:
    """NumPy's transform and the averages of SciPy's cosine distance as it was up to 1.11."""
    u, v = np.fft.fft2(x.numpy()).ravel(), np.fft.fft2(y.numpy()).ravel()
    return abs(1 - np.average(u * v) / np.sqrt(np.average(np.square(u)) * np.average(np.square(v))))


def official_lpips(network: package.LPIPS, x: Tensor, y: Tensor) -> Tensor:
    """The trunk once for each image of the pair."""
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
    """Our function and its rivals, the official way first; rivals of one score need not be the same number."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="pairs scored in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SCORE", help="scores to time (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.pairs, 3, args.side, args.side, generator=generator)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    setting = f"{args.pairs} pairs of {args.side} x {args.side}, {args.rounds} rounds"
    print(f"torch {torch.__version__}, 1 thread, processor time, {setting}\n")
    header = [f"{'score':<16}{'against':<14}{'ms a pair':>10}", *(f"{f'batch {size}':>10}" for size in BATCHES)]
    print("".join(header) + f"{'difference':>13}")
    for name, (ours, rivals) in contests().items():
        if args.only and name not in args.only:
            continue
        candidates = {rival: partial(one_at_a_time, score) for rival, score in rivals.items()}
        candidates |= {size: partial(in_batches, ours, size) for size in BATCHES}
        values = {key: candidate(x, y) for key, candidate in candidates.items()}  # also warms up
        seconds: dict = {key: [] for key in candidates}
        for _ in range(args.rounds):
            for key, candidate in candidates.items():
                started = time.process_time()
                candidate(x, y)
                seconds[key].append(time.process_time() - started)
        own = [f"{1000 * statistics.median(seconds[size]) / args.pairs:>10.3f}" for size in BATCHES]
        print(f"{name:<16}{'':<14}{'':>10}" + "".join(own))
        for rival in rivals:
            theirs = 1000 * statistics.median(seconds[rival]) / args.pairs
            ratios = [
                statistics.median(a / b for a, b in zip(seconds[rival], seconds[size], strict=True)) for size in BATCHES
            ]
            difference = max(abs(a - b) for a, b in zip(values[rival], values[BATCHES[0]], strict=True))
            cells = "".join(f"{ratio:>9.2f}x" for ratio in ratios)
            print(f"{'':<16}{rival:<14}{theirs:>10.3f}{cells}{difference:>13.1e}", flush=True)


if __name__ == "__main__":
    main()
