"""What natural images look like: penalties a matching attack adds to its objective, lower is more natural.

A prior takes images (B, C, H, W) in the model's normalised space, or what was recorded from a forward pass on them, and
returns a scalar; the attack weights it. One problem at a time, and nothing but tensor arithmetic: priors can be
vectorised by torch.func.vmap and differentiated twice, also for images of a single colour (lengths are
sqrt(sum of squares + EPS)).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils.errors import UserError, look_up

EPS = 1e-12  # a length of 1e-6: below what matters, above what float32 can square and differentiate twice


def total_variation(
    images: Tensor,
    *,
    inner_exp: float = 1.0,
    outer_exp: float = 1.0,
    eps: float = 1e-8,
    double_opponents: bool = False,
    border: str = "zero",
    seams: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the mean of ((|dx| + eps)^p + (|dy| + eps)^p)^q over pixels and channels; dx, dy: to the right and lower
    neighbour.

    inner_exp p and outer_exp q: 1, 1 is anisotropic, 2, 1/2 isotropic; q < 1 needs eps > 0 for finite derivatives.
    double_opponents: with the differences of the three colours as further channels (breaching).
    border 'zero': neighbours beyond the edge are 0, which pulls edges to mean grey (breaching). 'none': there are no
    such neighbours; with q = 1 each direction is averaged over the differences it has, which for p = 1 and eps = 0 is
    the prior of Inverting Gradients, else over the pixels that have both neighbours.
    seams: of `shuffled_seams`; differences across them count as zero.
    """
    look_up(dict.fromkeys(("zero", "none")), border, "border")
    if double_opponents:
        if images.shape[1] != 3:
            raise UserError(f"double_opponents compares three colour channels, the images have {images.shape[1]}")
        red, green, blue = images.split(1, dim=1)
        images = torch.cat([images, red - green, red - blue, green - blue], dim=1)
    if border == "zero":
        images = nn.functional.pad(images, (0, 1, 0, 1))
    right, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    if border == "zero":
        right, down = right[..., :-1, :], down[..., :-1]
    if seams is not None:
        pairs = zip(seams, (right, down), strict=True)
        right, down = (torch.where(seam[: x.shape[-2], : x.shape[-1]], 0, x) for seam, x in pairs)
    right, down = right.abs() + eps, down.abs() + eps
    if inner_exp != 1:
        right, down = right**inner_exp, down**inner_exp
    if border == "none" and outer_exp == 1:
        return right.mean() + down.mean()
    both = right + down if border == "zero" else right[..., :-1, :] + down[..., :-1]
    return (both if outer_exp == 1 else both**outer_exp).mean()


def shuffled_seams(holes: Tensor, grid: tuple[int, int], patch_size: int) -> tuple[Tensor, Tensor]:
    """Return where neighbours do not belong together: the borders of patches whose contents were shuffled, holes (N,)
    bool.

    (right, down), each (H, W) bool: whether a border of a hole lies between the pixel and its right or lower neighbour.
    False at the edge of the picture.
    """
    cells = torch.arange(len(holes), device=holes.device).view(grid)
    cells = cells.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    inside = holes[cells]
    right = (cells[:, 1:] != cells[:, :-1]) & (inside[:, 1:] | inside[:, :-1])
    down = (cells[1:] != cells[:-1]) & (inside[1:] | inside[:-1])
    return nn.functional.pad(right, (0, 1)), nn.functional.pad(down, (0, 0, 0, 1))


def mean_power(images: Tensor, *, exponent: float = 2.0) -> Tensor:
    """Return the mean of x^p / p over all values, p = `exponent`: the norm prior of breaching. 0 is mean grey."""
    return images.pow(exponent).mean() / exponent


def l2_norm(images: Tensor) -> Tensor:
    """Return the Euclidean length of all values together (GradInversion, Yin et al., 2021)."""
    return _length(images)


def orthogonality(images: Tensor) -> Tensor:
    """Return sum over ordered pairs i != j of mean((x_i * x_j)^2): images of a batch differ (Qian et al., 2020). 0 for
    one."""
    squares = images.square()
    return (squares.sum(dim=0).square() - squares.square().sum(dim=0)).mean()


def patch_border(
    images: Tensor, *, patch_size: int, form: str = "norm", seams: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return jumps between the pixels on either side of the borders of patch_size x patch_size patches, and nowhere
    else.

    form 'norm': the sum over border lines of the length of the jump along the line (GradViT, Hatamizadeh et al., 2022);
    'mean_square': the mean squared jump over horizontal plus that over vertical borders. seams: of `shuffled_seams`;
    jumps across them count as zero. UserError for a single patch.
    """
    look_up(dict.fromkeys(("norm", "mean_square")), form, "form")
    if patch_size >= min(images.shape[-2:]):
        raise UserError(f"the patch prior needs borders between patches: {patch_size} px patches leave none")
    before = slice(patch_size - 1, -1, patch_size)
    vertical = images[..., patch_size::patch_size] - images[..., before]
    horizontal = images[..., patch_size::patch_size, :] - images[..., before, :]
    if seams is not None:
        vertical, horizontal = (
            torch.where(seams[0][:, before], 0, vertical),
            torch.where(seams[1][before], 0, horizontal),
        )
    if form == "mean_square":
        return vertical.square().mean() + horizontal.square().mean()
    return _length(vertical, dim=(0, 1, 2)).sum() + _length(horizontal, dim=(0, 1, 3)).sum()


def epoch_order(images: Tensor, epochs: int) -> Tensor:
    """Return the mean squared distance between the mean images of a client's epochs, over all pairs: they hold the same
    images in another order (Dimitrov et al., TMLR 2022, section 4.2). images (epochs * B, C, H, W), one epoch after the
    other."""
    means = images.unflatten(0, (epochs, -1)).mean(dim=1)  # (epochs, C, H, W)
    return 2 * means.var(dim=0, correction=1).mean()  # of two draws the mean squared distance is twice the variance


def group(images: Tensor, consensus: Tensor) -> Tensor:
    """Return the distance |x - c| to what several restarts agree on, `consensus` (B, C, H, W) (GradInversion)."""
    return _length(images - consensus)


def batch_norm_distance(
    statistics: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[tuple[Tensor, Tensor]],
    *,
    first_scale: float = 10.0,
    form: str = "norm",
) -> Tensor:
    """Return how far BatchNorm inputs are from the statistics they should have (DeepInversion, Yin et al., CVPR 2020).

    statistics, targets: (mean (C,), biased variance (C,)) per layer, in the same order. form 'norm': the sum of
    |mean - target| + |variance - target|; 'mse': of mean squared differences. The first layer counts first_scale times.
    """
    look_up(dict.fromkeys(("norm", "mse")), form, "form")
    distance = _length if form == "norm" else lambda difference: difference.square().mean()
    layers = [
        distance(mean - target_mean) + distance(variance - target_variance)
        for (mean, variance), (target_mean, target_variance) in zip(statistics, targets, strict=True)
    ]
    return first_scale * layers[0] + sum(layers[1:])


def feature_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference between what enters the classifier and `targets`, both (B, F) (breaching)."""
    return (features - targets).square().mean()


def feature_targets(weight_gradient: Tensor | None, bias_gradient: Tensor | None, labels: Tensor) -> Tensor:
    """Return what entered the classifier for each label, (B, F): row c of dL/dW (C, F) over entry c of dL/db (C,).

    Exact for one image; in a batch a mean of all features in which those of class c weigh most, positively, and the
    others by what they give to c, negatively. Raises UserError for a gradient that is not shared (None), and for a
    label whose bias gradient is zero (pruned).
    """
    if weight_gradient is None or bias_gradient is None:
        raise UserError("the feature prior needs the gradients of the classifier's weight and bias: leave it out")
    scales = bias_gradient[labels]
    if not scales.all():
        absent = labels[scales == 0][0]
        raise UserError(
            f"the feature prior divides by the bias gradient of class {absent}, which is zero: leave it out"
        )
    return weight_gradient[labels] / scales[:, None]


@torch.no_grad()
def consensus(images: Tensor) -> Tensor:
    """Return what the restarts of each victim agree on: images (V, R, B, C, H, W) -> their mean (V, B, C, H, W).

    Gradients say little about where things are, so each restart is first moved by the circular shift that correlates
    best with the first (GradInversion registers by optical flow). Restarts that left the finite numbers take no part.
    """
    finite = images.isfinite().flatten(2).all(dim=2)
    images = torch.where(finite[:, :, None, None, None, None], images, 0)
    first = images[torch.arange(len(images), device=images.device), finite.int().argmax(dim=1)]
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images).conj() * torch.fft.rfft2(first)[:, None]
    shift = torch.fft.irfft2(spectrum.sum(dim=3), s=(height, width)).flatten(-2).argmax(dim=-1)  # (V, R, B)
    rows = (torch.arange(height, device=images.device) - (shift // width)[..., None]) % height
    columns = (torch.arange(width, device=images.device) - (shift % width)[..., None]) % width
    moved = images.gather(-2, rows[..., None, :, None].expand_as(images))
    moved = moved.gather(-1, columns[..., None, None, :].expand_as(images))
    return moved.sum(dim=1) / finite.sum(dim=1).clamp_min(1)[:, None, None, None, None]


@torch.no_grad()
def in_blocks(images: Tensor, side: int) -> Tensor:
    """Return images (B, C, H, W) with each block of side x side pixels at its mean; those at the lower and right border
    may be smaller."""
    height, width = images.shape[2:]
    coarse = nn.functional.avg_pool2d(
        images, side, ceil_mode=True
    )  # blocks that are cut off: the mean of what is there
    return coarse.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :height, :width]


def median_filter(images: Tensor) -> Tensor:
    """Return 3 x 3 median of images (B, C, H, W), edges reflected: Inverting Gradients' cleaning of ImageNet
    candidates."""
    windows = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect").unfold(-2, 3, 1).unfold(-2, 3, 1)
    return windows.flatten(-2).median(dim=-1).values


class LayerInputs:
    """Records what enters the named layers of a model during forward passes, summarised by `summary`.

        with LayerInputs(model, ["head"]) as seen:
            model(images)
        seen.names, seen.values

    values grows by one entry per layer and forward pass, in the order the layers are called, and names (each layer
    once) is in the same order. Clear `values` before every pass. Inside torch.func transforms run the pass, copy the
    list, clear it and return the copy (has_aux, or as part of the result): what is left behind would belong to a
    transform that has ended. The hooks are gone when the block ends.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], summary: Callable[[Tensor], object] = lambda x: x):
        self.model, self.layers, self.summary = model, layers, summary
        self.names: list[str] = []
        self.values: list = []

    def __enter__(self) -> "LayerInputs":
        self.hooks = [self.model.get_submodule(name).register_forward_pre_hook(self._of(name)) for name in self.layers]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def _of(self, name: str) -> Callable:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in self.names:
                self.names.append(name)
            self.values.append(self.summary(inputs[0]))

        return record


class BatchNormStatistics(LayerInputs):
    """LayerInputs of every BatchNorm2d layer: values holds the (mean, biased variance), each (C,), of its input."""

    def __init__(self, model: nn.Module):
        layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        super().__init__(model, layers, channel_statistics)


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean, biased variance) per channel of feature maps (B, C, H, W), each (C,)."""
    mean = features.mean(dim=(0, 2, 3))
    # Not features.var, which goes entry by entry on a CPU: a tenth of an iteration with a ResNet-50 as image prior.
    return mean, (features - mean.view(-1, 1, 1)).square().mean(dim=(0, 2, 3))


def running_statistics(model: nn.Module, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Return (running mean, running variance) of the named BatchNorm layers, the targets of `batch_norm_distance`.

    Raises UserError for a layer that keeps none.
    """
    layers = [model.get_submodule(name) for name in names]
    for name, layer in zip(names, layers, strict=True):
        if layer.running_mean is None:
            raise UserError(f"layer '{name}' keeps no running statistics: leave out the prior that compares with them")
    return [(layer.running_mean, layer.running_var) for layer in layers]


def _length(values: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return the Euclidean length with finite derivatives at zero."""
    return (values.square().sum(dim=dim) + EPS).sqrt()
