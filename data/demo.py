"""The embedded data: handwritten digits and photographs that ship inside scikit-learn and scikit-image, and reviews by
a grammar (data/reviews.py). No download.

    python -m data.demo --output datasets

writes `datasets/digits/{train,val}/<digit>/*.png` (1,797 scans of 8 x 8 pixels, enlarged to 32 x 32; which digit it is
depends on where the strokes are), `datasets/photographs/*.png` (six colour photographs, 256 x 256) and
`datasets/reviews/{train,val}.csv` (6,000 and 1,000 sentences).
"""

import random
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.reviews import write_reviews
from utils.errors import CONTINUES, UserError, run_command
from utils.files import write_atomic
from utils.tool_parser import ToolParser

SIDE = 32
VALIDATION_SHARE = 0.3
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "retina")


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as an image folder; the split is fixed and balanced over classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = random.Random(0)
    for label in range(10):
        chosen = [index for index, target in enumerate(digits.target) if target == label]
        rng.shuffle(chosen)
        cut = round(VALIDATION_SHARE * len(chosen))
        for split, members in (("val", chosen[:cut]), ("train", chosen[cut:])):
            target = folder / split / str(label)
            for index in members:
                scan = np.round(digits.images[index] * 255 / 16).astype(np.uint8)
                image = Image.fromarray(scan).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
                write_picture(target / f"{index:04d}.png", image)


def write_photographs(folder: Path, side: int = 256) -> None:
    """Write scikit-image's colour photographs, centre-cropped to squares of `side` pixels."""
    from skimage import data

    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)())
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        square = image.crop((left, top, left + edge, top + edge)).resize((side, side), Image.Resampling.BICUBIC)
        write_picture(folder / f"{name}.png", square)


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a PNG unless it is there. Raises UserError where another file has its name: that one stays."""
    if path.exists():
        try:
            with Image.open(path) as there:
                same = there.size == image.size and there.convert("RGB").tobytes() == image.convert("RGB").tobytes()
        except (OSError, ValueError):
            same = False
        if not same:
            raise UserError(
                f"'{path}' is another picture than the one to be written: move it, or choose another --output"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, partial(image.save, format="PNG"), sync=False)


def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("datasets"), help="folder to write into (default: datasets)"
    )
    output = parser.parse_args(argv).output
    write_digits(output / "digits")
    write_photographs(output / "photographs")
    write_reviews(output / "reviews")
    print(f"wrote {output / 'digits'}, {output / 'photographs'} and {output / 'reviews'}")


if __name__ == "__main__":
    run_command(main, CONTINUES)
