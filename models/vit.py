"""ViT / DeiT on timm's VisionTransformer, with the position embeddings of MJP.

timm does the transformer (and loads its checkpoints); this file adds the shared unknown position embedding, the
optional index embedding, the localization head and the first block of APRIL. With `mask=None` and none of these it is
timm's model.
"""

import math

import torch
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from timm.models.vision_transformer import checkpoint_seq
from torch import Tensor, nn

from models.jigsaw import move_tokens
from models.localization import Localization
from models.position import POSITIONS, RotaryAttention, hide_positions, new_pos_embed, sinusoid_table, tied_places

# DeiT (Touvron et al., 2021), table 1; ViT (Dosovitskiy et al., 2021) uses the same three widths.
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


class AprilBlock(nn.Module):
    """The first block of APRIL's design (A): attention on the tokens as they come in, no LayerNorm before it and no
    residual path around anything, x -> mlp(norm2(attn(x))) (Lu et al., CVPR 2022). Takes its layers from `block`."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.attn, self.norm2, self.mlp = block.attn, block.norm2, block.mlp

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.norm2(self.attn(tokens)))


class VisionTransformer(TimmVisionTransformer):
    """ViT. forward(images (B, 3, H, W), mask None or (1 or B, N) bool, source None or (1 or B, N) int64) ->
    logits (B, classes). With `source`, place i is given what stands in patch source[i], as if the image had been
    shuffled so. What moves are the position embeddings, the other way: to the class token that is the same.

    unknown: add `unknown_pos_embed` (1, 1, D), the PE every masked patch shares.
    index_embed: add a second, zero-initialised PE per place that masked patches keep ("+idx" ablation; note that it
    gives the position away again). localization: a kind from models/localization.py, or 'none'.
    pos_embed_std: 0.02 as ViT and DeiT; 1.0 is what the official MJP code uses by accident. april: an `AprilBlock`
    comes first, for APRIL's closed form; the other blocks are as usual.
    positions: 'learned' (a table of N rows), 'sinusoidal' (a fixed table, no gradient), 'tied' (squares of tie x tie
    cells share a learned row), 'none', 'rotary' (nothing is added to tokens; attention turns queries and keys).
    timm_options: as timm has them, with or without a class token, registers and position rows of theirs; the size of
    the images is fixed, as that of the puzzle is.
    norm_eps: added to the variance in every LayerNorm; timm's 1e-6, 1e-12 in HuggingFace's ViT. pool_patches: the
    classifier reads the class token and the mean of the patches, 2 D numbers, as on top of HuggingFace's DINOv2.
    """

    def __init__(
        self,
        *,
        unknown: bool = False,
        index_embed: bool = False,
        localization: str = "none",
        unit_targets: bool = False,
        pos_embed_std: float = 0.02,
        april: bool = False,
        positions: str = "learned",
        tie: int = 2,
        norm_eps: float = 1e-6,
        pool_patches: bool = False,
        **timm_options,
    ):
        if positions not in POSITIONS:
            raise ValueError(f"unknown positions '{positions}': known are {', '.join(POSITIONS)}")
        without = positions in ("none", "rotary")
        if (without or positions == "tied") and (unknown or index_embed or localization != "none"):
            raise ValueError(
                f"positions '{positions}' have no row per patch: turn off unknown, index_embed, localization"
            )
        _check_fixed(timm_options, positions)
        super().__init__(**timm_options, pos_embed="none" if without else "learn")
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm):
                layer.eps = norm_eps
        self.pool_patches = pool_patches
        if pool_patches:
            self.head = nn.Linear(2 * self.embed_dim, self.num_classes)
        if positions == "rotary":
            for block in self.blocks:
                block.attn = RotaryAttention(block.attn, self.patch_embed.grid_size, self.num_prefix_tokens)
        if april:
            self.blocks[0] = AprilBlock(self.blocks[0])
        # Our parameters come after timm's, so every ablation starts from the same shared weights.
        dim, grid = self.embed_dim, self.patch_embed.grid_size
        self.grid, self.patch_size = grid, self.patch_embed.patch_size[0]
        self.prefix_rows = 0 if self.no_embed_class else self.num_prefix_tokens  # of the table, before the patches'
        self.unknown_pos_embed = new_pos_embed(1, dim, pos_embed_std) if unknown else None
        self.index_embed = nn.Parameter(torch.zeros_like(self.pos_embed)) if index_embed else None
        self.localization = Localization(localization, dim, grid, unit_targets) if localization != "none" else None
        self.pos_embed_rows: Tensor | None = None  # which row of the table each token uses, where rows are tied
        if positions == "sinusoidal":
            table = nn.functional.pad(sinusoid_table(grid, dim), (0, 0, self.prefix_rows, 0))[None]
            del self.pos_embed
            self.register_buffer("pos_embed", table)
        elif positions == "tied":
            places = tied_places(grid, tie)
            prefix = torch.arange(self.num_prefix_tokens)
            squares = math.prod(-(-size // tie) for size in grid)
            self.pos_embed = new_pos_embed(self.num_prefix_tokens + squares, dim, pos_embed_std)
            del self.pos_embed_rows
            self.register_buffer("pos_embed_rows", torch.cat([prefix, places + len(prefix)]), persistent=False)
        elif pos_embed_std != 0.02 and not without:
            nn.init.normal_(self.pos_embed, std=pos_embed_std)

    @property
    def hides_positions(self) -> bool:
        """Return whether `forward` takes a mask: the model has an unknown position embedding."""
        return self.unknown_pos_embed is not None

    @property
    def order_matters(self) -> bool:
        """Return whether the output depends on how the contents of masked patches are ordered among themselves.

        Where they all share the unknown row and nothing else tells them apart it does not: the class token attends to
        a set.
        """
        return not self.hides_positions or self.index_embed is not None

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"unknown_pos_embed", "index_embed"}

    def _pos_embed(self, x: Tensor, mask: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """Patch embeddings (B, N, D) -> tokens (B, K + N, D) entering the first block, behind K prefix tokens (class,
        registers) in the order of the patches."""
        if mask is not None and not self.hides_positions:
            raise ValueError("this model has no unknown position embedding: build it with unknown=True or pass no mask")
        batch = x.shape[0]  # not len, which an export would fix
        prefix = [token.expand(batch, -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            x = x if source is None else move_tokens(x, source)
            return self.pos_drop(torch.cat([*prefix, x], dim=1))
        rows = hide_positions(self.token_pos_embed(), self.unknown_pos_embed, mask, self.prefix_rows)
        if self.index_embed is not None:
            rows = rows + self.index_embed
        if source is not None:
            patches = move_tokens(rows[:, self.prefix_rows :], source.argsort(dim=1))
            rows = torch.cat([rows[:, : self.prefix_rows].expand(len(patches), -1, -1), patches], dim=1)
        if not self.prefix_rows:
            return self.pos_drop(torch.cat([*prefix, x + rows], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + rows)

    def token_pos_embed(self) -> Tensor:
        """Return what is added to each token (1, K + N, D), or to those of patches (1, N, D): the table, or its rows by
        token where they are tied."""
        return self.pos_embed if self.pos_embed_rows is None else self.pos_embed[:, self.pos_embed_rows]

    def forward_features(self, images: Tensor, mask: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        """Map images to tokens (B, K + N, D) after the final LayerNorm."""
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images), mask, source)))
        if self.grad_checkpointing and self.training:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return self.norm(tokens)

    def pool(self, tokens: Tensor, pool_type: str | None = None) -> Tensor:
        """Map tokens (B, K + N, D) to what the classifier reads, (B, D), or (B, 2 D) with `pool_patches`."""
        if not self.pool_patches:
            return super().pool(tokens, pool_type)
        return torch.cat([tokens[:, 0], tokens[:, self.num_prefix_tokens :].mean(dim=1)], dim=1)

    def features(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images to what the classifier reads (B, D): the class token, or a pool of all."""
        return self.forward_head(self.forward_features(images, mask), pre_logits=True)

    def forward(self, images: Tensor, mask: Tensor | None = None, source: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(images, mask, source))

    def patch_pos_embed(self) -> Tensor:
        """Return the PE rows of the patches, (N, D): no class token, no unknown row."""
        return self.token_pos_embed()[0, self.prefix_rows :]


def _check_fixed(options: dict, positions: str) -> None:
    """Raise ValueError for options of timm that this ViT has another word for, or no place."""
    if "pos_embed" in options:
        raise ValueError(f"pos_embed is not an option of its own here: set positions to {', '.join(POSITIONS)}")
    if moving := [name for name in ("dynamic_img_size", "dynamic_img_pad") if options.get(name)]:
        raise ValueError(f"{moving[0]} does not go with a puzzle of fixed size: leave it out and set image_size")
    if options.get("global_pool") == "":
        raise ValueError("global_pool '' leaves logits for every token: choose token, avg, avgmax, max or map")
    if not options.get("class_token", True) and options.get("global_pool", "token") == "token":
        raise ValueError("class_token false leaves nothing to read the class from: set global_pool avg, max or map")
    if positions == "tied" and options.get("no_embed_class"):
        raise ValueError("positions 'tied' keep a row for the class token: leave out no_embed_class")


def build_vit(
    size: str | None = None, *, image_size: int = 224, patch_size: int = 16, drop_path: float = 0.0, **options
):
    """Return a ViT of a named size, or of any shape through embed_dim, depth and num_heads."""
    shape = {key: value for key, value in options.items() if value is not None}
    return VisionTransformer(
        img_size=image_size, patch_size=patch_size, drop_path_rate=drop_path, **{**SIZES.get(size, {}), **shape}
    )
