"""Options of models and of their masks: every default, its unit and its source, once."""

from dataclasses import asdict, dataclass
from typing import Literal

from models import MODELS, TEXT_MODELS
from utils.checks import check

ModelName = Literal[tuple(MODELS)]
TextModelName = Literal[tuple(TEXT_MODELS)]


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    name: Literal[ModelName, TextModelName] = "deit_small"
    """Architecture; embed_dim, depth and num_heads shape vit and text models."""
    patch_size: int | None = None
    """Patch side in pixels; default 16 (4 for Swin)."""
    embed_dim: int | None = None
    """Token width, for vit and text models."""
    depth: int | None = None
    """Number of blocks, for vit and text models."""
    num_heads: int | None = None
    """Attention heads, for vit and text models."""
    mlp_ratio: float | None = None
    """Width of the feed-forward layers over that of tokens, for vit and text models; default 4."""
    init_values: float | None = None
    """First value of LayerScale, which a ViT multiplies its branches by (DINOv2: 1e-5); default no LayerScale."""
    dropout: float | None = None
    """Dropout rate of a text model; default 0.1."""
    width: int | None = None
    """Channels of the first stage, for convnet (default 64) and the CIFAR ResNets, or of the layers of mlp."""
    unknown: bool | None = None
    """Shared unknown position embedding: masked patches hide their position (MJP). Off: a naive shuffle."""
    index_embed: bool | None = None
    """Second position embedding that masked patches keep (+idx ablation; gives the position away)."""
    absolute_pos_embed: bool | None = None
    """Swin: an absolute position embedding; `unknown` and `localization` bring it too (official: --ape)."""
    relative_position_bias: bool | None = None
    """Swin: the relative-position bias of window attention; default true (official: rpe)."""
    localization: Literal["none", "linear", "nonlinear", "pca", "pca_official", "relative"] | None = None
    """Localization head: dense absolute, or relative (the follow-up on text); default none."""
    positions: Literal["learned", "sinusoidal", "tied", "none", "rotary"] | None = None
    """Where a ViT gets positions from: a learned row per patch (default), a fixed table, rows tied over squares of
    cells, nowhere, or rotations of queries and keys, which leave no trace in the tokens."""
    tie: int | None = None
    """Side, in cells, of the squares whose patches share a row with positions tied; default 2."""
    bottleneck: int | None = None
    """Width of PRECODE's variational bottleneck in front of the classifier (the paper: 256); default none."""
    unit_targets: bool | None = None
    """Localization targets in [0, 1] instead of integers (official: integers)."""
    pos_embed_std: float | None = None
    """Standard deviation of the initial position embeddings; default 0.02 (official MJP: 1.0, by accident)."""
    drop_path: float | None = None
    """Stochastic depth rate of the last block; default 0.1 for networks that have it: transformers and the ResNets for
    ImageNet (official MJP ViT: 0, it never reached the model)."""

    def __post_init__(self):
        for key in ("patch_size", "embed_dim", "depth", "num_heads", "width", "tie"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"model.{key}", "at least 1", value)
        check(not self.bottleneck or self.bottleneck >= 1, "model.bottleneck", "0 or more", self.bottleneck)
        check(0 <= (self.drop_path or 0) < 1, "model.drop_path", "in [0, 1)", self.drop_path)
        check(not self.dropout or 0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)

    def options(self) -> dict:
        """Return the options of `build_model`."""
        deep = self.name.startswith(("vit", "deit", "swin")) or self.name in (
            "resnet50",
            "resnet18",
            "text_small",
            "bert",
        )
        return asdict(self) | ({"drop_path": 0.1} if deep and self.drop_path is None else {})


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How masks are drawn."""

    mask_sampler: Literal["block", "block_exact", "uniform"] = "block"
    """Mask sampler: rectangles (official, can fall short of the ratio), rectangles filled up to it, single patches."""
    min_block: int = 8
    """Smallest block, in patches."""
    max_block: int = 75
    """Largest block, in patches (official: 75 whatever the ratio)."""
    window: int = 16
    """Text: tokens are permuted within consecutive windows of so many."""
    ngram: int = 1
    """Text: length of the pieces of a window that are permuted, in tokens (official: 1)."""

    def __post_init__(self):
        check(1 <= self.min_block <= self.max_block, "min_block", "from 1 to max_block", self.min_block)
        for key in ("window", "ngram"):
            check(getattr(self, key) >= 1, key, "at least 1", getattr(self, key))

    def sampler(self, kind: str) -> dict:
        """Return the options of the sampler of masks: of `Jigsaw` for images, of `TokenJigsaw` for text."""
        keys = ("window", "ngram") if kind == "text" else ("mask_sampler", "min_block", "max_block")
        return {key: getattr(self, key) for key in keys}
