"""The rest of the training augmentation, on the device and for a whole batch: RandAugment, normalisation, erasing.

Images (B, 3, H, W) are uint8 in [0, 255]; what is done to each was drawn where it was loaded
(data/augmentation_parameters.py). Images are gathered by operation, changed together, each with its own argument, and
put back: no loop over images, and no question to the device that the host would wait for.

Against timm's operations on PIL images: invert, posterize, solarize, solarize_add, autocontrast and equalize give the
same pixels; colour, contrast, brightness and sharpness too, up to one grey level where float32 rounds otherwise;
rotation, shear and translation interpolate with Pillow's cubic and fill with the mean colour as timm does under
interpolation='bicubic', and differ by at most one grey level in a few pixels of a thousand. The noise of random erasing
comes from another generator than timm's: the same distribution, and the same box.
"""

import torch
from torch import Tensor

from data.augmentation_parameters import NAMES, Plan

GAMMA, MIX_A, MIX_B = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class DeviceAugment:
    """mean and std: of pixels in [0, 1], by channel."""

    def __init__(self, device: torch.device, *, mean: tuple[float, ...], std: tuple[float, ...]):
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))
        fill = [min(255, round(255 * value)) for value in mean]  # timm's colour of what was outside of the image
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor, plan: Plan) -> Tensor:
        """Turn uint8 (B, 3, H, W) on the device into normalised float32; the plan is still on the host."""
        if len(plan.counts):
            images = images.clone(memory_format=torch.contiguous_format)
        rows, arguments = (part.to(images.device, non_blocking=True) for part in (plan.rows, plan.arguments))
        for layer, counts in enumerate(plan.counts.tolist()):
            end = counts[0]
            for name, count in zip(NAMES, counts[1:], strict=True):
                start, end = end, end + count
                if count:
                    chosen, values = rows[layer, start:end], arguments[layer, start:end].view(-1, 1, 1, 1)
                    changed = OPERATIONS[name](images.index_select(0, chosen), values, self.fill)
                    images.index_copy_(0, chosen, changed)
        finished = images.to(torch.float32, memory_format=torch.contiguous_format)
        finished.div_(255).sub_(self.mean).div_(self.std)  # in torchvision's order, for its bits
        erase(finished, plan.boxes)
        return finished


def erase(images: Tensor, boxes: Tensor) -> None:
    """Fill boxes (K, 6) of data.augmentation_parameters.Plan, on the host, with standard normal noise, in place.

    A pixel's noise depends on the seed of its box and on its place in it, and on nothing else.
    """
    total, (channels, height, width) = images.shape[1] * int((boxes[:, 3] * boxes[:, 4]).sum()), images.shape[1:]
    if not total:
        return
    boxes = boxes.to(images.device, non_blocking=True)
    sizes = channels * boxes[:, 3] * boxes[:, 4]
    owner = torch.arange(len(boxes), device=images.device).repeat_interleave(sizes, output_size=total)
    row, top, left, tall, wide, seed = boxes[owner].unbind(dim=1)
    place = torch.arange(total, device=images.device) - (sizes.cumsum(0) - sizes)[owner]
    channel, y, x = place // (tall * wide), place // wide % tall, place % wide
    flat = ((row * channels + channel) * height + top + y) * width + left + x
    images.view(-1).index_copy_(0, flat, normal(seed, place))


def normal(seed: Tensor, place: Tensor) -> Tensor:
    """Return the standard normal float32 number `place` of the stream `seed` (int64 both), by Box and Muller. The same
    on every device up to the rounding of log and cos."""
    bits = splitmix64(seed, place)
    one, two = (_shift(bits, by).bitwise_and_(0xFFFFFF).float() for by in (40, 16))
    return one.add_(1).mul_(2**-24).log_().mul_(-2).sqrt_() * two.mul_(2 * torch.pi * 2**-24).cos_()


def splitmix64(seed: Tensor, place: Tensor) -> Tensor:
    """Return output number `place` of the generator splitmix64 (Steele, Lea and Flood, OOPSLA 2014) started at
    `seed`."""
    bits = seed + (place + 1) * GAMMA
    bits = (bits ^ _shift(bits, 30)) * MIX_A
    bits = (bits ^ _shift(bits, 27)) * MIX_B
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift to the right, zeros from the left: torch repeats the sign."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def autocontrast(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    low, high = (values.double() for values in torch.aminmax(images.flatten(2), dim=2, keepdim=True))
    scale = torch.full_like(high, 255) / (high - low).clamp_(min=1)  # 255 / x would be 255 times 1 / x
    stretched = images.flatten(2) * scale + -low * scale
    return torch.where(high > low, stretched.clamp_(0, 255).to(torch.uint8), images.flatten(2)).view_as(images)


def equalize(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    pixels = images.flatten(2).long()
    counts = torch.zeros(*pixels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = counts.gather(2, pixels.amax(dim=2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    table = ((step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(2, pixels).to(torch.uint8).view_as(images)


def invert(images: Tensor, _: Tensor, __: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Tensor, _: Tensor) -> Tensor:
    dropped = 8 - bits.long().clamp_(1, 8)  # the newest Pillow cannot keep 0 bits
    return images & torch.bitwise_left_shift(torch.full_like(dropped, 255), dropped).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor, _: Tensor) -> Tensor:
    return torch.where(images < threshold.short(), images, 255 - images)


def solarize_add(images: Tensor, add: Tensor, _: Tensor) -> Tensor:
    brighter = (images.short() + add.short()).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def color(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    return blend(grey(images), images, factor)


def contrast(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    mean = grey(images).sum(dim=(1, 2, 3), keepdim=True).double() / images[0, 0].numel()
    return blend((mean + 0.5).floor_(), images, factor)


def brightness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    return blend(torch.zeros_like(factor), images, factor)


def sharpness(images: Tensor, factor: Tensor, _: Tensor) -> Tensor:
    """Move away from Pillow's SMOOTH filter, which leaves the border as it is."""
    smooth, wide = images.float(), images.float()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = (around / 13 + 0.5).floor_()
    return blend(smooth, images, factor)


def grey(images: Tensor) -> Tensor:
    """Return (B, 1, H, W) int32 luma as Pillow converts to mode L."""
    red, green, blue = images.int().unbind(dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).unsqueeze(1)


def blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return `start` at factor 0, the images at 1; other factors go beyond. Cut off, not rounded, as Pillow does."""
    start = start.float()
    return ((images - start).mul_(factor.float()).add_(start)).clamp_(0, 255).to(torch.uint8)


def rotate(images: Tensor, degrees: Tensor, fill: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    angle = -torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    y, x = torch.meshgrid(*(_centres(size, images) - size / 2 for size in (height, width)), indexing="ij")
    x, y = cos * x + sin * y + width / 2, -sin * x + cos * y + height / 2
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    (left, right), (above, below) = _cell(x), _cell(y)
    packed, rows = _packed(images).flatten(2), []
    for step in range(-1, 3):
        first = (above + step).clamp_(0, height - 1) * width
        taps = [(first + (left + more).clamp_(0, width - 1)).flatten(2) for more in range(-1, 3)]
        rows.append(_cubic([_channels(packed.gather(2, tap).view_as(left)) for tap in taps], right))
    return torch.where(inside, _bytes(_cubic(rows, below)), fill)


def shear_x(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    return slide(images, factor * _centres(images.shape[-2], images).view(-1, 1), fill)


def shear_y(images: Tensor, factor: Tensor, fill: Tensor) -> Tensor:
    return shear_x(images.mT, factor, fill).mT


def translate_x(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    return slide(images, share * images.shape[-1], fill)


def translate_y(images: Tensor, share: Tensor, fill: Tensor) -> Tensor:
    return translate_x(images.mT, share, fill).mT


def slide(images: Tensor, by: Tensor, fill: Tensor) -> Tensor:
    """Move each row to the left by so many pixels; `by` broadcasts to (B, 1, H, 1)."""
    width = images.shape[-1]
    x = (_centres(width, images) + by).expand(-1, 1, images.shape[-2], -1)
    left, share = _cell(x)
    packed, taps = _packed(images), [(left + more).clamp_(0, width - 1) for more in range(-1, 3)]
    moved = _bytes(_cubic([_channels(packed.gather(3, tap)) for tap in taps], share))
    return torch.where((x >= 0) & (x < width), moved, fill)


def _centres(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, dtype=torch.double, device=like.device) + 0.5


def _cell(position: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixel whose centre lies before a position, and how far behind it that is, as a share of a pixel."""
    position = position - 0.5
    before = position.floor()
    return before.long(), (position - before).float()


def _packed(images: Tensor) -> Tensor:
    """Return (B, 1, H, W) int32: three channels are gathered as one."""
    red, green, blue = images.int().split(1, dim=1)
    return red | green << 8 | blue << 16


def _channels(packed: Tensor) -> Tensor:
    return torch.cat([packed & 255, packed >> 8 & 255, packed >> 16], dim=1).float()


def _cubic(values: list[Tensor], share: Tensor) -> Tensor:
    """Return Pillow's cubic through four neighbours (Keys' with a = -1), `share` of the way from the second to the
    third."""
    a, b, c, d = values
    return b + share * (c - a + share * (2 * (a - b) + c - d + share * (b - a + d - c)))


def _bytes(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.uint8)


OPERATIONS = {
    function.__name__: function
    for function in (
        autocontrast, equalize, invert, posterize, solarize, solarize_add, color, contrast, brightness, sharpness,
        rotate, shear_x, shear_y, translate_x, translate_y,
    )
}  # fmt: skip
