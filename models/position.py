"""Position embeddings (PE): the shared unknown row that hides them, and resizing them to another grid."""

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn


def new_pos_embed(rows: int, dim: int, std: float = 0.02) -> nn.Parameter:
    """A learnable PE table (1, rows, dim) drawn from N(0, std^2)."""
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, dim), std=std))


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
    """Bicubic resize of a PE table (1, K + N, D) to another grid, K prefix rows kept. old_grid None means square."""
    return resample_abs_pos_embed(pos_embed, list(new_grid), list(old_grid) if old_grid else None, num_prefix_tokens)


def grid_coordinates(grid: tuple[int, int]) -> Tensor:
    """(N, 2) float: the (row, column) of every patch, integers from 0, row-major."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.stack([rows, columns], dim=-1).flatten(0, 1).float()


def pos_embed_similarity(pos_embed: Tensor) -> Tensor:
    """(N, D) PE rows -> (N, N) cosine similarity in [-1, 1]: row i shows which positions look like position i."""
    rows = nn.functional.normalize(pos_embed, dim=-1)
    return rows @ rows.T
