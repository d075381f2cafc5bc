"""Image operations that several corruptions of ImageNet-C share (data/corruptions.py), on (H, W, C) in [0, 1]."""

from collections.abc import Callable

import numpy as np
import skimage
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom


def blur(x: np.ndarray, sigma: float, mode: str = "nearest", truncate: float = 4) -> np.ndarray:
    return gaussian_filter(x, (sigma, sigma, 0), mode=mode, truncate=truncate)


def streak(x: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Return ImageMagick's motion blur: 2 radius + 1 copies, weighted by half a Gaussian, each a pixel further at that
    angle.

    Steps are rounded to whole pixels and the border is extended.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    direction = np.array([np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))])  # down, right
    offsets = np.ceil(steps[:, None] * direction - 0.5).astype(int)
    height, width = x.shape[:2]
    edge = len(steps)
    padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0)), mode="edge")
    total = np.zeros(x.shape)
    for weight, (down, right) in zip(weights / weights.sum(), offsets + edge, strict=True):
        total += weight * padded[down : down + height, right : right + width]
    return total


def enlarge(x: np.ndarray, factor: float) -> np.ndarray:
    """Return the centre of the image, linearly enlarged to its size."""
    window = [int(np.ceil(side / factor)) for side in x.shape[:2]]
    top, left = ((side - part) // 2 for side, part in zip(x.shape, window, strict=False))
    centre = np.moveaxis(x[top : top + window[0], left : left + window[1]], 2, 0)
    large = np.stack([zoom(plane, factor, order=1) for plane in centre], axis=2)  # faster than all three at once
    top, left = ((large_side - side) // 2 for large_side, side in zip(large.shape[:2], x.shape, strict=False))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


def plasma(height: int, width: int, decay: float, rng: Generator) -> np.ndarray:
    """Return a diamond-square fractal, (height, width): a corner of a periodic square whose values span [0, 1].

    Midpoints are the mean of four neighbours plus uniform noise, whose size falls by decay^2 from level to level.
    """
    side = 1 << max(1, (max(height, width) - 1).bit_length())
    field, step, size = np.zeros((side, side)), side, 1.0
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        noise = rng.uniform(-size, size, size=(3, *corners.shape))
        rows, columns = corners + np.roll(corners, -1, axis=0), corners + np.roll(corners, -1, axis=1)
        centres = field[half::step, half::step]
        centres[:] = (rows + np.roll(rows, -1, axis=1)) / 4 + noise[0]
        field[::step, half::step] = (centres + np.roll(centres, 1, axis=0) + columns) / 4 + noise[1]
        field[half::step, ::step] = (centres + np.roll(centres, 1, axis=1) + rows) / 4 + noise[2]
        step, size = half, size / decay**2
    field -= field.min()
    return field[:height, :width] / field.max()


def in_hsv(x: np.ndarray, **changes: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Change hue, saturation or value of the image, each clipped to [0, 1]."""
    hsv = skimage.color.rgb2hsv(np.broadcast_to(x, (*x.shape[:2], 3)))
    for name, change in changes.items():
        channel = ("hue", "saturation", "value").index(name)
        hsv[..., channel] = np.clip(change(hsv[..., channel]), 0, 1)
    return tinted(skimage.color.hsv2rgb(hsv), x)


def tinted(colours: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) colours, or their mean where the image `x` is grey."""
    return colours if x.shape[2] == 3 else colours.mean(axis=2, keepdims=True)


def to_pillow(x: np.ndarray) -> Image.Image:
    pixels = np.rint(x * 255).astype(np.uint8)
    return Image.fromarray(pixels if x.shape[2] == 3 else pixels[..., 0])


def from_pillow(image: Image.Image, x: np.ndarray) -> np.ndarray:
    return np.asarray(image).reshape(x.shape) / 255
