"""FFT2D, a distance between the Fourier spectra of two images, in three variants that measure different things.

    python -m eval.fft2d --source_dir DIR --target_dir DIR [--json FILE]

All are 1 - cosine of the C * H * W Fourier coefficients of the images, taken as vectors u and v.

legacy: the official MJP code with the SciPy of its time, |1 - u.v / sqrt(u.u v.v)| without complex conjugation, at
most 2. By Parseval u.v is then the product of one image with the point reflection of the other instead of the other
itself: a number to compare with published ones, not a distance of spectra.

conjugated: with the conjugation of an inner product. By Parseval it is the cosine distance of the pixels.

magnitude: of the moduli |u| and |v|, the only variant about spectra; blind to translation with wrap-around.

The first two are computed without any Fourier transform.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from eval.mse import chunks, comparable
from utils.errors import look_up, run_command

CHUNK = 2  # images in work at once on a CPU


def fft2d(reconstruction: Tensor, target: Tensor, *, variant: str = "legacy") -> Tensor:
    """Return the distance of the spectra in [0, 2], lower is closer. (B, C, H, W) in [0, 1] twice -> (B,).

    variant: legacy, conjugated or magnitude. NaN when an image is black.
    """
    distance = look_up(VARIANTS, variant, "FFT2D variant")
    pieces = chunks(*comparable(reconstruction, target), CHUNK)
    return torch.cat([distance(a, b) for a, b in pieces]).abs().clamp(max=2)


def _legacy(x: Tensor, y: Tensor) -> Tensor:
    return _one_minus_cosine(x + y, x - y, _rolled_and_flipped)


def _conjugated(x: Tensor, y: Tensor) -> Tensor:
    return _one_minus_cosine(x + y, x - y, lambda image: (image, image))


def _magnitude(x: Tensor, y: Tensor) -> Tensor:
    return _conjugated(torch.fft.fft2(x).abs(), torch.fft.fft2(y).abs())


VARIANTS = {"legacy": _legacy, "conjugated": _conjugated, "magnitude": _magnitude}


def _rolled_and_flipped(image: Tensor) -> tuple[Tensor, Tensor]:
    """Return two images whose product is that of `image` with its point reflection, n -> -n modulo the size."""
    return image.roll((-1, -1), (-2, -1)), image.flip((-2, -1))


def _one_minus_cosine(p: Tensor, q: Tensor, two_sides: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Return 1 - <x, y> / s with s^2 = <x, x> <y, y>, from p = x + y and q = x - y; two_sides(p) are the factors
    of <p, p>.

    It equals (<p, p> <q, q> - <p, q>^2) / (4 s (s + <x, y>)), where close images lose no digits to a difference from 1.
    """
    (p, p_other), (q, q_other) = two_sides(p), two_sides(q)
    pp, qq, pq = ((a * b).sum(3).double().flatten(1).sum(1) for a, b in ((p, p_other), (q, q_other), (p, q_other)))
    length = ((pp + qq).square() - 4 * pq.square()).clamp(min=0).sqrt() / 4
    return (pp * qq - pq.square()) / (4 * length * (length + (pp - qq) / 4))


def main(argv: Sequence[str] | None = None) -> None:
    from eval.image_folders import FolderMetric, command_line, score_folders  # here: it imports the metrics

    args = command_line("fft2d", __doc__).parse_args(argv)
    score_folders(
        args, {f"fft2d_{name}": FolderMetric(partial(fft2d, variant=name), "lower is closer") for name in VARIANTS}
    )


if __name__ == "__main__":
    run_command(main)
