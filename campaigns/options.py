"""Options of a campaign: what is private, and how what comes out is scored."""

import re
from dataclasses import dataclass, field
from typing import Literal

from data.options import TextOptions
from utils.checks import check


@dataclass(frozen=True)
class PrivateTextOptions:
    """Sentences, with --data.kind text."""

    kind: Literal["image", "text"] = "image"
    """Attack images (--images), or the sentences of val.csv in data.path."""
    path: str | None = None
    """Text: folder with train.csv, on which the tokenizer of a named victim is trained, and val.csv."""
    min_tokens: int = 3
    """Text: attack only sentences of at least so many tokens, [CLS] and [SEP] included."""
    max_tokens: int = 512
    """Text: and of at most so many."""
    public: str | None = None
    """Text: CSV file of sentences of the same kind that the server has, to order tokens that no gradient orders."""
    text: TextOptions = field(default_factory=TextOptions)

    def __post_init__(self):
        check(3 <= self.min_tokens <= self.max_tokens, "data.min_tokens", "from 3 to max_tokens", self.min_tokens)


@dataclass(frozen=True, kw_only=True)
class PrivateOptions:
    """Private images or sentences, or what a real client sent."""

    images: str | list[str] | None = None
    """Private images: files, or folders that are searched recursively; several with spaces or commas. With --leak:
    the originals, in order, only to score by."""
    attributes: str | None = None
    """For a model of attributes: CSV file with those of the images, as --data.dataset attributes has it; default the
    model's own predictions."""
    index: str | int | list[int | str] | None = None
    """Attack only these images of the listing, counted from 0: 25, or 0,3,5-7."""
    leak: str | None = None
    """Attack this leak file of a real training, or all in this folder (leak_file.py, docs/leak_files.md)."""
    data: PrivateTextOptions = field(default_factory=PrivateTextOptions)
    num_images: int | None = None
    """Attack so many images, or sentences, spread evenly over the folder, or file; default all."""

    def indices(self) -> list[int] | None:
        """Return the places in the listing that `index` names, without repetitions; None for all."""
        if self.index is None:
            return None
        found: list[int] = []
        for item in self.index if isinstance(self.index, list) else str(self.index).split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
            check(ends is not None, "index", "numbers from 0, or ranges like 3-5", f"'{item}'")
            first, last = int(ends[1]), int(ends[2] or ends[1])
            check(first <= last < 10**7, "index", "ranges from the lower to the higher", f"'{item}'")
            found += range(first, last + 1)
        check(bool(found), "index", "one image or more", "none")
        return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Scores, and pictures of running attacks."""

    lpips: Literal["alex", "vgg", "squeeze"] | None = None
    """Also score LPIPS, with this network; its ImageNet weights are downloaded, or read from lpips_trunk."""
    lpips_trunk: str | None = None
    """torchvision's file with the weights of the LPIPS network."""
    success_psnr: float = 25.0
    """PSNR in dB above which a reconstruction counts as a success in the summary."""
    success_tokens: float = 85.0
    """Text: percentage of tokens in place above which a reconstruction counts as a success in the summary."""
    watch_every: int = 0
    """Iterations between TensorBoard pictures of a running optimisation; 0 takes none."""
