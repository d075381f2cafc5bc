"""The 19 corruptions of ImageNet-C at five severities, for images of any size, without OpenCV or ImageMagick.

Definitions and parameters are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019), and of the code that made the published images. Blur radii, noise levels and
zooms are in pixels or grey values and do not grow with the image; the warp of elastic_transform, the pixelate grid, the
fog and the frost follow its size. `glass_blur` copies pixels where the paper speaks of swapping them, as the published
images do. One corruption deviates: `frost` draws its ice instead of pasting one of the authors' photographs, unless it
is given photographs of frost (`frost_of`).

CORRUPTIONS[name](image, severity, rng) takes a uint8 image (H, W, 3), (H, W, 1) or (H, W), a severity from 1 to 5 and a
NumPy generator and returns an image of the same shape; the same generator state gives the same bits. `.exact` gives the
float64 values from 0 to 255 that are truncated, as in the published images, to those bytes.
"""

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import scipy
import skimage
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy.ndimage import (
    affine_transform,
    correlate,
    distance_transform_edt,
    gaussian_filter,
    map_coordinates,
    uniform_filter,
)

from data.corruption_filters import (
    blur,
    enlarge,
    from_pillow,
    in_hsv,
    plasma,
    streak,
    tinted,
    to_pillow,
)
from utils.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)
SIDE = 224  # of the published images; what follows the image's size is stated for it
LUMA = np.array([0.299, 0.587, 0.114])
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255
ICE_SHADOW, ICE = np.array([0.30, 0.38, 0.44]), np.array([0.88, 0.95, 1.0])  # colours between which frost lies


class Corruption:
    """A corruption with its parameters of the five severities: `function(image in [0, 1], rng, *parameters)`."""

    def __init__(self, function: Callable[..., np.ndarray], parameters: tuple):
        self.name, self.function, self.parameters = function.__name__, function, parameters
        self.__doc__ = function.__doc__

    def __call__(self, image: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
        return self.exact(image, severity, rng).astype(np.uint8)

    def exact(self, image: np.ndarray, severity: int, rng: Generator) -> np.ndarray:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)):
            found = f"{image.dtype} of shape {image.shape}"
            raise UserError(f"{self.name} takes a uint8 image (H, W, 3), (H, W, 1) or (H, W), not {found}")
        if image.size == 0:
            raise UserError(f"{self.name} takes an image with pixels, not one of shape {image.shape}")
        if severity not in SEVERITIES:
            raise UserError(f"{self.name}: severity must be from 1 to 5, got {severity}")
        given = self.parameters[severity - 1]
        pixels = image.reshape(*image.shape[:2], -1) / 255
        changed = self.function(pixels, rng, *(given if isinstance(given, tuple) else (given,)))
        return (np.clip(changed, 0, 1) * 255).reshape(image.shape)


def severities(*parameters) -> Callable[[Callable], Corruption]:
    """Set, as a decorator, what a corruption's parameters are at severities 1 to 5."""
    return partial(Corruption, parameters=parameters)


# Noise


@severities(0.08, 0.12, 0.18, 0.26, 0.38)
def gaussian_noise(x, rng, scale):
    """Add normal noise of standard deviation `scale`, on every colour value."""
    return x + rng.normal(scale=scale, size=x.shape)


@severities(60, 25, 12, 5, 3)
def shot_noise(x, rng, photons):
    """Draw Poisson counts, `photons` of them for white."""
    return rng.poisson(x * photons) / photons


@severities(0.03, 0.06, 0.09, 0.17, 0.27)
def impulse_noise(x, rng, amount):
    """Set a share of the colour values to 0 or 1."""
    draw = rng.random(x.shape)
    return np.where(draw < amount, draw < amount / 2, x)


@severities(0.15, 0.2, 0.35, 0.45, 0.6)
def speckle_noise(x, rng, scale):
    """Add normal noise in proportion to the value."""
    return x + x * rng.normal(scale=scale, size=x.shape)


# Blur


@severities(1, 2, 3, 4, 6)
def gaussian_blur(x, rng, sigma):
    return blur(x, sigma)


@severities((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
def defocus_blur(x, rng, radius, softness):
    """Convolve with a disk whose edge is smoothed."""
    kernel = disk(radius, softness)
    edge = len(kernel) // 2
    padded = np.pad(x, ((edge, edge), (edge, edge), (0, 0)), mode="reflect")
    return scipy.signal.fftconvolve(padded, kernel[:, :, None], mode="valid", axes=(0, 1))


def disk(radius: int, softness: float) -> np.ndarray:
    """Return a disk kernel, 2 max(radius, 8) + 1 pixels wide, smoothed by a Gaussian of 3 or, beyond radius 8, 5
    pixels.

    As in the published images its sum is 1 only where the disk stays clear of the kernel's border (1.013 at radius 8).
    """
    row = np.arange(-max(8, radius), max(8, radius) + 1)
    inside = (row**2 + row[:, None] ** 2 <= radius**2).astype(float)
    return gaussian_filter(inside / inside.sum(), softness, radius=1 if radius <= 8 else 2, mode="mirror")


@severities((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
def glass_blur(x, rng, sigma, reach, rounds):
    """Blur, let pixels take the value of a random neighbour less than `reach` away, blur again.

    Pixels change one after another from the bottom right, so a value can travel further.
    """
    height, width, channels = x.shape
    pixels = (blur(x, sigma) * 255).astype(np.uint8)
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    places = (rows[:, None] * width + columns).ravel()
    source = list(range(height * width))
    for _ in range(rounds):
        down, right = rng.integers(-reach, reach, size=(2, len(places)))
        for place, taken in zip(places.tolist(), (places + down * width + right).tolist(), strict=True):
            source[place] = source[taken]
    return blur(pixels.reshape(-1, channels)[source].reshape(x.shape) / 255, sigma)


@severities((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
def motion_blur(x, rng, radius, sigma):
    """Blur along a line of up to 45 degrees to the horizontal."""
    return np.rint(255 * streak(x, radius, sigma, rng.uniform(-45, 45))) / 255


@severities((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
def zoom_blur(x, rng, end, step):
    """Return the mean of the image and of itself enlarged by 1, 1 + step, ... up to `end`."""
    factors = np.arange(1, end, step)
    return (x + sum(enlarge(x, factor) for factor in factors)) / (len(factors) + 1)


# Weather


@severities(
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
def snow(x, rng, mean, spread, factor, threshold, radius, sigma, kept):
    """Return a whitened image under flakes: enlarged noise above a threshold, blurred along the fall, and its half
    turn."""
    flakes = enlarge(rng.normal(mean, spread, size=(*x.shape[:2], 1)), factor)
    flakes = np.floor(255 * np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)) / 255
    flakes = np.rint(255 * streak(flakes, radius, sigma, rng.uniform(-135, -45))) / 255
    grey = x @ LUMA[:, None] if x.shape[2] == 3 else x
    return kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5) + flakes + flakes[::-1, ::-1]


@severities((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
def frost(x, rng, kept, added):
    """Return the weighted sum of the image and a pane of ice. The ice is drawn (`ice_pane`), not one of the five
    photographs."""
    return kept * x + added * tinted(ice_pane(*x.shape[:2], rng), x)


def frost_of(photographs: Sequence[np.ndarray]) -> Corruption:
    """Return `frost` with a random crop of one of these photographs, uint8 (H, W, 3), for its ice, as published.

    A photograph smaller than the image is enlarged until it covers it.
    """
    if not photographs:
        raise UserError("frost needs one photograph of frost or more")

    def pasted(x, rng, kept, added):
        """Return the weighted sum of the image and a crop of a photograph of frost."""
        height, width = x.shape[:2]
        ice = Image.fromarray(photographs[rng.integers(len(photographs))])
        grow = max(height / ice.height, width / ice.width)
        if grow > 1:
            size = [max(side, round(grow * old)) for side, old in ((width, ice.width), (height, ice.height))]
            ice = ice.resize(size, Image.Resampling.BICUBIC)
        left, top = rng.integers(ice.width - width + 1), rng.integers(ice.height - height + 1)
        pane = np.asarray(ice.crop((left, top, left + width, top + height))) / 255
        return kept * x + added * tinted(pane, x)

    pasted.__name__ = "frost"
    return Corruption(pasted, frost.parameters)


def ice_pane(height: int, width: int, rng: Generator) -> np.ndarray:
    """Return ferns of ice on a hazy pane, (height, width, 3) in [0, 1]. Their size follows the pane; light and tint
    vary."""
    side, ferns, scale = max(height, width), 44, 2  # drawn twice as large, so that lines have soft edges
    root = rng.uniform(-0.1, 1.1, size=(ferns, 2)) * (width, height)
    angle, length = rng.uniform(0, 2 * np.pi, ferns), side * rng.uniform(0.15, 0.5, ferns)
    shade = rng.uniform(0.2, 0.8, ferns)
    canvas = Image.new("L", (scale * width, scale * height))
    draw = ImageDraw.Draw(canvas)
    for children in (22, 9, 0):  # stems, branches, twigs
        tip = root + length[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        lines = (scale * np.hstack([root, tip])).tolist()
        for line, tone in zip(lines, np.rint(255 * shade).astype(int).tolist(), strict=True):
            draw.line(line, fill=tone)
        along = (np.arange(children) + rng.uniform(size=(len(root), children))) / max(1, children)
        joint = root[:, None] + along[..., None] * (tip - root)[:, None]
        turn = np.where(np.arange(children) % 2, 1, -1) * (np.pi / 3.4 + rng.normal(scale=0.12, size=along.shape))
        reach = length[:, None] * (0.05 + 0.4 * (1 - along)) * rng.uniform(0.4, 1, along.shape)
        root, angle, length = joint.reshape(-1, 2), (angle[:, None] + turn).ravel(), reach.ravel()
        shade = np.repeat(shade, children) * rng.uniform(0.75, 1.15, len(root))
    ice = np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255
    haze = plasma(height, width, 1.5, rng) + 0.2 * rng.random((height, width))
    light = rng.uniform(0.6, 1.4) * (0.5 * haze + 0.8 * ice + 1.1 * gaussian_filter(ice, side / 60))
    tint = np.clip(ICE + rng.normal(scale=0.03, size=3), 0, 1)
    return ICE_SHADOW + np.clip(light, 0, 1)[..., None] * (tint - ICE_SHADOW)


@severities((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
def fog(x, rng, strength, decay):
    """Add a plasma fractal and scale back to the image's own brightest value."""
    brightest = x.max()
    return (x + strength * plasma(*x.shape[:2], decay, rng)[..., None]) * brightest / (brightest + strength)


@severities(
    (0.65, 0.3, 4, 0.69, 0.6, 0),
    (0.65, 0.3, 3, 0.68, 0.6, 0),
    (0.65, 0.3, 2, 0.68, 0.5, 0),
    (0.65, 0.3, 1, 0.65, 1.5, 1),
    (0.67, 0.4, 1, 0.65, 1.5, 1),
)
def spatter(x, rng, mean, spread, sigma, threshold, strength, mud):
    """Add drops where blurred noise is above a threshold: water, lit at its edges (1 to 3), or mud (4 and 5)."""
    liquid = blur(rng.normal(mean, spread, size=(*x.shape[:2], 1)), sigma)[..., 0]
    if mud:
        cover = blur((liquid > threshold).astype(float)[..., None], strength)
        cover[cover < 0.8] = 0
        return x * (1 - cover) + tinted(cover * MUD, x)
    liquid = np.floor(255 * np.clip(np.where(liquid < threshold, 0, liquid), 0, 1))
    light = liquid * relief(liquid)
    return x + tinted(strength * light[..., None] / max(1, light.max()) * WATER, x)


def relief(liquid: np.ndarray) -> np.ndarray:
    """Return the embossed distance of each pixel to the edges of the drops, 0 to 255. liquid: (H, W), 0 to 255."""
    edges = skimage.feature.canny(liquid, sigma=0, low_threshold=50, high_threshold=150)
    distance = np.minimum(distance_transform_edt(~edges), 20) if edges.any() else np.full(liquid.shape, 20.0)
    distance = np.floor(uniform_filter(distance, 3, mode="mirror"))
    _, place, counts = np.unique(distance, return_inverse=True, return_counts=True)
    ranks = counts.cumsum() - counts[0]
    equal = np.rint(255 * ranks / max(1, ranks[-1]))[place].reshape(liquid.shape)  # equalised histogram
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    return np.rint(uniform_filter(np.clip(correlate(equal, emboss, mode="mirror"), 0, 255), 3, mode="mirror"))


# Light and colour


@severities(0.1, 0.2, 0.3, 0.4, 0.5)
def brightness(x, rng, added):
    """Add to the value of HSV."""
    return in_hsv(x, value=lambda v: v + added)


@severities(0.4, 0.3, 0.2, 0.1, 0.05)
def contrast(x, rng, kept):
    """Shrink every channel towards its mean."""
    mean = x.mean(axis=(0, 1))
    return (x - mean) * kept + mean


@severities((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
def saturate(x, rng, factor, added):
    """Scale and shift the saturation of HSV."""
    return in_hsv(x, saturation=lambda s: s * factor + added)


# Digital


@severities((488, 170.8, 24.4), (488, 19.52, 48.8), (12.2, 2.44, 4.88), (17.08, 2.44, 4.88), (29.28, 2.44, 4.88))
def elastic_transform(x, rng, reach, sigma, jitter):
    """Apply a random affine map of three points, then a smooth random displacement of every pixel."""
    shape = np.array(x.shape[:2])
    reach, sigma, jitter = (value * min(shape) / SIDE for value in (reach, sigma, jitter))
    arm = max(1, min(shape) // 3)
    corners = shape // 2 + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = corners + rng.uniform(-jitter, jitter, size=(3, 2))
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # from places after the map to those before
    shift = [blur(rng.uniform(-1, 1, size=(*shape, 1)), sigma, "reflect", 3)[..., 0] * reach for _ in shape]
    places = np.indices(shape) + shift
    warped = [affine_transform(plane, back[:2].T, back[2], order=1, mode="mirror") for plane in np.moveaxis(x, 2, 0)]
    return np.stack([map_coordinates(plane, places, order=1, mode="reflect") for plane in warped], axis=2)


@severities(0.6, 0.5, 0.4, 0.3, 0.25)
def pixelate(x, rng, share):
    """Shrink to a share of the width and height and enlarge again, both by box filters."""
    image = to_pillow(x)
    small = image.resize([max(1, int(side * share)) for side in image.size], Image.Resampling.BOX)
    return from_pillow(small.resize(image.size, Image.Resampling.BOX), x)


@severities(25, 18, 15, 10, 7)
def jpeg_compression(x, rng, quality):
    file = io.BytesIO()
    to_pillow(x).save(file, "JPEG", quality=quality)
    return from_pillow(Image.open(file), x)


STANDARD = {
    corruption.name: corruption
    for corruption in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip
EXTRA = {corruption.name: corruption for corruption in (speckle_noise, gaussian_blur, spatter, saturate)}
CORRUPTIONS = STANDARD | EXTRA
