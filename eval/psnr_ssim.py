"""Peak signal-to-noise ratio and structural similarity of a reconstruction, in the variants people mean by them.

    python -m eval.psnr_ssim --source_dir DIR --target_dir DIR [--json FILE]

SSIM (Wang et al., 2004) compares local means, variances and the covariance under a Gaussian window. Where the window
hangs over the border, `ssim` leaves the pixel out, as the paper and scikit-image do; the official MJP code takes
zeros for what is missing and averages over the full frame: `ssim_official`. The two are not interchangeable.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from eval.assignment import assign
from eval.mse import comparable, mse
from models.jigsaw import patchify
from utils.errors import UserError, run_command

SSIM_WINDOW = 11  # pixels: the Gaussian of sigma 1.5 cut off at 3.5 sigma
SSIM_SIGMA = 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
LANES = 16  # columns side by side in one vector of the processor


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, peak 1, higher is closer. (B, C, H, W) in [0, 1] twice -> (B,).
    Equal: inf."""
    return -10 * torch.log10(mse(reconstruction, target))


def psnr_any_order(reconstruction: Tensor, target: Tensor, patch_size: int) -> Tensor:
    """Return PSNR in dB, higher is closer, when each patch may stand anywhere: a shuffle costs nothing. -> (B,).

    Patches of the reconstruction are assigned one to one to those of the target with the least squared error over all.
    """
    reconstruction, target = comparable(reconstruction, target)
    if any(side % patch_size for side in target.shape[-2:]):
        height, width = target.shape[-2:]
        raise UserError(
            f"images of {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}"
        )
    errors = []
    for ours, theirs in zip(patchify(reconstruction, patch_size), patchify(target, patch_size), strict=True):
        order = assign(ours, theirs).to(ours.device)
        errors.append((ours[order] - theirs).double().square().mean())
    return -10 * torch.log10(torch.stack(errors))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity, 1 is equal, higher is closer. (B, C, H, W) in [0, 1] twice -> (B,).

    Gaussian window of sigma 1.5, K = (0.01, 0.03), borders cropped, mean over channels; within 1e-5 of scikit-image
    with gaussian_weights and without use_sample_covariance. Raises UserError for sides of less than 11 pixels.
    """
    return _mean_ssim(*comparable(reconstruction, target), padding=0)


def ssim_official(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity as the official MJP code has it, 1 is equal, higher is closer. -> (B,), any
    image size.

    The images stand in zeros and the border counts; the values differ from `ssim`, by 0.1 at 64 pixels.
    """
    return _mean_ssim(*comparable(reconstruction, target), padding=SSIM_WINDOW // 2)


@torch.no_grad()
def _mean_ssim(x: Tensor, y: Tensor, padding: int) -> Tensor:
    """Return SSIM averaged over the pixels whose window lies within the images, after `padding` zeros on every side ->
    (B,).

    It is computed from sum and difference, p = x + y and q = x - y. With their windowed means and variances the
    definition, by 4 x y = p^2 - q^2 and 2 (x^2 + y^2) = p^2 + q^2, becomes

        (mp^2 - mq^2 + 2 C1) (vp - vq + 2 C2) / ((mp^2 + mq^2 + 2 C1) (vp + vq + 2 C2)):

    four filtered images instead of five, and hardly any rounding error in float32, where that of vp cancels.
    """
    if min(x.shape[-2:]) + 2 * padding < SSIM_WINDOW:
        size = f"{x.shape[-2]} x {x.shape[-1]}"
        raise UserError(f"SSIM needs images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, got {size}")
    if x.device.type != "cpu":
        x, y = x.double(), y.double()  # no rounding of convolutions to TF32
    batch, channels, height, width = x.shape
    height, width = height + 2 * padding, width + 2 * padding
    rows, columns = height - SSIM_WINDOW + 1, width - SSIM_WINDOW + 1
    # One image at a time on a CPU, always in the same memory: fresh pages from the system would cost a quarter more.
    planes = channels if x.device.type == "cpu" else batch * channels
    lanes = LANES * (1 + math.ceil(columns / LANES))
    maps = x.new_zeros(4, planes, height, lanes)  # p, q, p^2, q^2; on the right zeros fill the last lanes
    p, q, pp, qq = maps[..., :width]
    values, under = x.new_empty(2, planes, rows, columns)
    vertical, horizontal = _kernels(x)
    means = []
    for a, b in zip(x.flatten(0, 1).split(planes), y.flatten(0, 1).split(planes), strict=True):
        a, b = (pad(image, [padding] * 4) if padding else image for image in (a, b))
        torch.add(a, b, out=p)
        torch.sub(a, b, out=q)
        # Variances know no shift, but their rounding errors do. Any value near the mean serves: that of every 8th row.
        shift_p, shift_q = (image[:, ::8].mean((1, 2), keepdim=True) for image in (p, q))
        torch.square(p.sub_(shift_p), out=pp)
        torch.square(q.sub_(shift_q), out=qq)
        local = maps.flatten(0, 1).unflatten(2, (-1, LANES)).permute(0, 3, 1, 2)
        local = conv2d(conv2d(local, vertical, groups=LANES), horizontal)
        mp, mq, vp, vq = local.permute(0, 2, 3, 1).flatten(2).unflatten(0, (4, planes))[..., :columns]
        vp.addcmul_(mp, mp, value=-1).add_(2 * SSIM_C2)
        vq.addcmul_(mq, mq, value=-1)
        mp.add_(shift_p).square_().add_(2 * SSIM_C1)
        mq.add_(shift_q).square_()
        torch.sub(mp, mq, out=values).mul_(torch.sub(vp, vq, out=under))
        values.div_(torch.add(mp, mq, out=under).mul_(vp.add_(vq)))
        means.append(values.sum(2).double().mean(1) / columns)
    return torch.cat(means).view(batch, channels).mean(1)


def _kernels(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the window as two convolutions over images whose 16-column lanes stand one behind the other, as 16
    channels.

    Down the rows each channel is filtered alone (16, 1, 11, 1); across, two lanes give 16 columns (16, 16, 1, 2).
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    band = torch.zeros(LANES, 2 * LANES, dtype=torch.float64)
    for column in range(LANES):
        band[column, column : column + SSIM_WINDOW] = window
    vertical = window.view(1, 1, -1, 1).repeat(LANES, 1, 1, 1)
    horizontal = band.view(LANES, 2, 1, LANES).permute(0, 3, 2, 1)
    return vertical.to(like), horizontal.contiguous().to(like)


def main(argv: Sequence[str] | None = None) -> None:
    from eval.image_folders import FolderMetric, command_line, score_folders  # here: it imports this file

    parser = command_line("psnr_ssim", __doc__)
    parser.add_argument(
        "--patch_size", type=int, metavar="P", help="also PSNR when patches of P x P pixels may stand in any order"
    )
    args = parser.parse_args(argv)
    metrics = {
        "psnr": FolderMetric(psnr, "dB, higher is closer"),
        "ssim": FolderMetric(ssim, "higher is closer"),
        "ssim_official": FolderMetric(ssim_official, "as the official MJP code, higher is closer"),
    }
    if args.patch_size is not None:
        if args.patch_size < 1:
            parser.error(f"--patch_size must be at least 1, got {args.patch_size}")
        metrics["psnr_any_order"] = FolderMetric(
            lambda x, y: psnr_any_order(x, y, args.patch_size), "dB, patches in any order, higher is closer"
        )
    score_folders(args, metrics)


if __name__ == "__main__":
    run_command(main)
