"""The library of ATS: 50 operations on 8-bit RGB pictures, in the order of the paper's code.

Operations and magnitudes are AutoAugment's (Cubuk et al., 2019) except that colour, contrast, sharpness and brightness
stop at 0.5. Each entry is (operation, place on its grid of ten magnitudes, listed probability); the official code lists
the probability and never uses it, so the 50 entries are 29 different functions, two of which change nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

GREY = 128
GRIDS = {
    "shearX": np.linspace(0, 0.3, 10),
    "shearY": np.linspace(0, 0.3, 10),
    "translateX": np.linspace(0, 150 / 331, 10),
    "translateY": np.linspace(0, 150 / 331, 10),
    "rotate": np.linspace(0, 30, 10),
    "color": np.linspace(0, 0.5, 10),
    "contrast": np.linspace(0, 0.5, 10),
    "sharpness": np.linspace(0, 0.5, 10),
    "brightness": np.linspace(0, 0.5, 10),
    "posterize": np.round(np.linspace(8, 4, 10)),
    "solarize": np.linspace(256, 0, 10),
}
SIGNED = {"shearX", "shearY", "translateX", "translateY", "color", "contrast", "sharpness", "brightness"}


class Operation(NamedTuple):
    """One entry of the library. magnitude: share of the side, degrees, change of an enhancement factor, bits or
    threshold, 0 where the operation has none; signed: the magnitude gets a random sign at every call."""

    name: str
    magnitude: float
    signed: bool
    probability: float

    def __call__(self, image: Image.Image, sign: int = 1) -> Image.Image:
        """Return the transformed picture; sign (1 or -1) is the direction, for signed operations."""
        return FUNCTIONS[self.name](image, self.magnitude * (sign if self.signed else 1))


def _affine(image: Image.Image, matrix: tuple, resampling: Image.Resampling) -> Image.Image:
    """Return the image whose pixels at (x, y) come from (a x + b y + c, d x + e y + f); black outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=(0, 0, 0))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate counter-clockwise on the same canvas, corners in grey."""
    turned = image.convert("RGBA").rotate(degrees)
    return Image.composite(turned, Image.new("RGBA", turned.size, (GREY,) * 4), turned).convert(image.mode)


FUNCTIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "shearX": lambda image, v: _affine(image, (1, v, 0, 0, 1, 0), Image.Resampling.BICUBIC),
    "shearY": lambda image, v: _affine(image, (1, 0, 0, v, 1, 0), Image.Resampling.BICUBIC),
    "translateX": lambda image, v: _affine(image, (1, 0, v * image.width, 0, 1, 0), Image.Resampling.NEAREST),
    "translateY": lambda image, v: _affine(image, (1, 0, 0, 0, 1, v * image.height), Image.Resampling.NEAREST),
    "rotate": _rotate,
    "color": lambda image, v: ImageEnhance.Color(image).enhance(1 + v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(1 + v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(1 + v),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(1 + v),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "invert": lambda image, v: ImageOps.invert(image),
}

_LISTED = """
invert 7 .1      contrast 6 .2    rotate 2 .7      translateX 9 .3  sharpness 1 .8   sharpness 3 .9   shearY 2 .5
translateY 2 .7  autocontrast 5 .5  equalize 2 .9  shearY 5 .2      posterize 5 .3   color 3 .4       brightness 5 .6
sharpness 9 .3   brightness 9 .7  equalize 5 .6    equalize 1 .5    contrast 7 .6    sharpness 5 .6   color 5 .7
translateX 5 .5  equalize 7 .3    autocontrast 8 .4  translateY 3 .4  sharpness 6 .2  brightness 6 .9  color 8 .2
solarize 0 .5    invert 0 0       equalize 0 .2    autocontrast 0 .6  equalize 8 .2  equalize 4 .6    color 5 .9
equalize 5 .6    autocontrast 4 .8  solarize 4 .2  brightness 3 .1  color 0 .7       solarize 1 .4    autocontrast 0 .9
translateY 3 .9  translateY 3 .7  autocontrast 1 .9  solarize 1 .8  equalize 5 .8    invert 0 .1      translateY 3 .7
autocontrast 1 .9
"""  # operation, place on the grid, probability
LIBRARY = tuple(
    Operation(name, float(GRIDS[name][int(place)]) if name in GRIDS else 0.0, name in SIGNED, float(probability))
    for name, place, probability in zip(*(_LISTED.split()[part::3] for part in range(3)), strict=True)
)
