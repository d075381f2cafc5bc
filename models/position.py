"""Position embeddings (PE): their kinds, the shared unknown row that hides them, and resizing them to another grid."""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn


def new_pos_embed(rows: int, dim: int, std: float = 0.02) -> nn.Parameter:
    """Return a learnable PE table (1, rows, dim) drawn from N(0, std^2)."""
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, dim), std=std))


def given_mask(model: nn.Module, mask: Tensor | None) -> Tensor | None:
    """Return the mask (1 or B, N) that `model` is called with: None for one that hides no positions, and only sees
    shuffled patches."""
    return mask if getattr(model, "hides_positions", False) else None


def patch_rows(model: nn.Module) -> Tensor:
    """Return what a ViT, ours or timm's, adds to each patch token, (N, D): its table without the rows of prefixes."""
    table = model.token_pos_embed() if hasattr(model, "token_pos_embed") else model.pos_embed
    return table[0, -model.grid[0] * model.grid[1] :]


POSITIONS = ("learned", "sinusoidal", "tied", "none", "rotary")


def sinusoid_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Return a fixed PE table (N, dim): sines and cosines of the row in one half, of the column in the other, at rates
    from 1 to 1/10000 (Vaswani et al., 2017, in the two-dimensional form of MoCo v3 and MAE)."""
    if dim % 4:
        raise ValueError(f"sinusoidal positions need an embed_dim divisible by 4, got {dim}")
    rates = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = grid_coordinates(grid)[:, :, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


def tied_places(grid: tuple[int, int], side: int) -> Tensor:
    """Return (N,): which PE row every cell uses when squares of side x side cells share one."""
    rows, columns = (torch.arange(size) // side for size in grid)
    return (rows[:, None] * -(-grid[1] // side) + columns).flatten()


class RotaryAttention(nn.Module):
    """Attention that knows where tokens stand relative to each other, with no parameter and no trace in the tokens.

    Queries and keys are rotated by angles proportional to the row (first half of each head) and the column (second
    half) of their patch; prefix tokens (class, registers) are not rotated (Su et al., RoFormer, 2021; Heo et al.,
    RoPE-ViT, ECCV 2024, axial form, base 100). Takes its layers from `attention`, whose parameter names it keeps.
    """

    def __init__(self, attention: nn.Module, grid: tuple[int, int], prefix: int = 1, base: float = 100.0):
        """Take over the layers of an attention. prefix: tokens before those of the patches."""
        super().__init__()
        self.num_heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj
        width = attention.qkv.in_features // attention.num_heads
        if width % 4:
            raise ValueError(f"rotary positions need heads of a width divisible by 4, got {width}")
        rates = base ** -(torch.arange(width // 4) / (width // 4))
        angles = (grid_coordinates(grid)[:, :, None] * rates).flatten(1)
        angles = nn.functional.pad(angles, (0, 0, prefix, 0))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Map tokens (B, K + N, D) to (B, K + N, D), with K prefix tokens."""
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys = self._rotate(qkv[0]), self._rotate(qkv[1])
        mixed = nn.functional.scaled_dot_product_attention(queries, keys, qkv[2])
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _rotate(self, values: Tensor) -> Tensor:
        even, odd = values[..., 0::2], values[..., 1::2]
        return torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], dim=-1).flatten(-2)


def hide_positions(pos_embed: Tensor, unknown: Tensor, mask: Tensor | None, num_prefix_tokens: int) -> Tensor:
    """Give every masked patch the one shared unknown PE (MJP, CVPR 2023).

    pos_embed (1, K + N, D) with K prefix tokens (class token) that are never masked, unknown (1, 1, D), mask (1 or B,
    N) bool, True = hidden. Returns (1 or B, K + N, D). A selection, not arithmetic: an all-false mask returns the same
    bits as no mask, and masked rows receive a gradient of exactly zero.
    """
    if mask is None:
        return pos_embed
    if mask.dtype != torch.bool or mask.shape[-1] != pos_embed.shape[1] - num_prefix_tokens:
        columns = pos_embed.shape[1] - num_prefix_tokens
        raise ValueError(f"mask must be bool with {columns} columns, got {mask.dtype} {tuple(mask.shape)}")
    hidden = nn.functional.pad(mask, (num_prefix_tokens, 0))[..., None]
    return torch.where(hidden, unknown, pos_embed)


def resize_pos_embed(
    pos_embed: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int] | None, num_prefix_tokens: int
) -> Tensor:
    """Resize a PE table (1, K + N, D) to another grid, bicubic, K prefix rows kept. old_grid None means square."""
    return resample_abs_pos_embed(pos_embed, list(new_grid), list(old_grid) if old_grid else None, num_prefix_tokens)


def grid_coordinates(grid: tuple[int, ...]) -> Tensor:
    """Return (N, 2) float: the (row, column) of every patch, integers from 0, row-major; (N, 1) for the places of a
    line."""
    places = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return torch.stack(places, dim=-1).flatten(0, -2).float()


def pos_embed_similarity(pos_embed: Tensor) -> Tensor:
    """Compare (N, D) PE rows -> (N, N) cosine similarity in [-1, 1]: row i shows which positions look like position
    i."""
    rows = nn.functional.normalize(pos_embed, dim=-1)
    return rows @ rows.T
