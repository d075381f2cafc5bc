"""Swin Transformer on timm's, with an absolute position embedding that MJP can hide.

Window attention keeps its relative-position bias, so masked patches still carry relative position information: MJP on
Swin hides less than on a ViT. `relative_position_bias` False takes it away (the official code's `rpe` off). The mask
has one cell per 4 x 4 patch (56 x 56 at 224 pixels).
"""

import torch
from timm.models.swin_transformer import SwinTransformer as TimmSwinTransformer
from torch import Tensor, nn

from models.localization import Localization
from models.position import hide_positions, new_pos_embed

# Swin (Liu et al., 2021), section 3.3.
SIZES = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


class UnbiasedWindowAttention(nn.Module):
    """Attention within windows without the relative-position bias. Takes its layers from timm's `attention`, whose
    parameter names it keeps."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (windows * B, n, D), and a mask (windows, n, n) of 0 and minus 100 or None, to (windows * B, n,
        D)."""
        queries, keys, values = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = queries * queries.shape[-1] ** -0.5 @ keys.mT  # (windows * B, heads, n, n)
        if mask is not None:
            weights = (weights.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((weights.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))


class SwinTransformer(TimmSwinTransformer):
    """forward(images (B, 3, H, W), mask None or (1 or B, N) bool) -> logits (B, classes); see models/vit.py."""

    def __init__(
        self,
        *,
        absolute_pos_embed: bool = False,
        unknown: bool = False,
        index_embed: bool = False,
        relative_position_bias: bool = True,
        localization: str = "none",
        unit_targets: bool = False,
        pos_embed_std: float = 0.02,
        **timm_options,
    ):
        super().__init__(**timm_options)
        self.grid, self.patch_size = self.patch_embed.grid_size, self.patch_embed.patch_size[0]
        dim, number = self.embed_dim, self.grid[0] * self.grid[1]
        if not relative_position_bias:
            for block in (block for layer in self.layers for block in layer.blocks):
                block.attn = UnbiasedWindowAttention(block.attn)
        wanted = absolute_pos_embed or unknown or localization != "none"
        self.pos_embed = new_pos_embed(number, dim, pos_embed_std) if wanted else None
        self.unknown_pos_embed = new_pos_embed(1, dim, pos_embed_std) if unknown else None
        self.index_embed = nn.Parameter(torch.zeros(1, number, dim)) if index_embed else None
        self.localization = Localization(localization, dim, self.grid, unit_targets) if localization != "none" else None

    @property
    def hides_positions(self) -> bool:
        """Return whether `forward` takes a mask: the model has an unknown position embedding."""
        return self.unknown_pos_embed is not None

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"pos_embed", "unknown_pos_embed", "index_embed"}

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images to a feature map (B, H/32, W/32, D) after the final LayerNorm."""
        if mask is not None and not self.hides_positions:
            raise ValueError("this model has no unknown position embedding: build it with unknown=True or pass no mask")
        tokens = self.patch_embed(images)  # (B, rows, columns, D)
        if self.index_embed is not None:
            tokens = tokens + self.index_embed.unflatten(1, self.grid)
        if self.pos_embed is not None:
            tokens = tokens + hide_positions(self.pos_embed, self.unknown_pos_embed, mask, 0).unflatten(1, self.grid)
        return self.norm(self.layers(tokens))

    def features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images to average-pooled features (B, D) the classifier reads."""
        return self.forward_head(self.forward_features(images, mask), pre_logits=True)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(images, mask))

    def patch_pos_embed(self) -> Tensor:
        """Return the PE rows of the patches, (N, D)."""
        return self.pos_embed[0]


def build_swin(size: str, *, image_size: int = 224, patch_size: int = 4, drop_path: float = 0.0, **options):
    """Return a Swin Transformer of a named size."""
    return SwinTransformer(
        img_size=image_size, patch_size=patch_size, drop_path_rate=drop_path, **{**SIZES[size], **options}
    )
