"""Where the class token of a ViT looks, in an image and in its shuffled versions: maps per head, their mean, rollout.

Fused attention kernels return no weights, so hooks take what enters each attention layer and compute the softmax again
from that layer's own projections and norms; the model runs as it is. Rollout: Abnar and Zuidema, "Quantifying Attention
Flow in Transformers", ACL 2020.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from data.loaders import Batch, collate, name_unreadable
from data.options import DataOptions
from data.transforms import denormalize
from eval.accuracy import shuffled_view
from eval.options import SubjectOptions
from eval.subject import open_model
from models.jigsaw import Jigsaw
from reports.charts import new_figure
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4  # images, unless told


@torch.no_grad()
def attention_weights(model: nn.Module, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Return softmax attention of every block, first to last, (B, heads, 1 + N, 1 + N) each; row: who looks, column: at
    whom.

    The arguments are those of the model's forward pass. Raises UserError for a model without class token.
    """
    blocks = getattr(model, "blocks", None)
    usual = blocks is not None and all(isinstance(getattr(block, "attn", None), Attention) for block in blocks)
    if not usual or getattr(model, "num_prefix_tokens", 0) != 1:
        raise UserError(f"model '{model.arguments['name']}' has no class token to follow the attention of: use a ViT")
    weights: list[Tensor] = []

    def record(attention: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        weights.append(softmax_attention(attention, inputs[0]))

    hooks = [block.attn.register_forward_hook(record) for block in blocks]
    try:
        model(images, mask)
    finally:
        for hook in hooks:
            hook.remove()
    rows, columns = model.grid
    if weights[0].shape[-1] != 1 + rows * columns:
        raise UserError(f"patches of {model.patch_size} pixels are not the model's own: leave out --patch_size")
    return weights


def softmax_attention(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Return the attention weights of a timm layer: tokens (B, T, D) -> (B, heads, T, T), rows sum to 1."""
    query, key, _ = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    return (query * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Return attention followed through the blocks: weights as from `attention_weights` -> (B, T, T), rows sum to 1.

    Per block the mean over the heads and, for the residual path, the identity count one half each.
    """
    identity = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    flow = identity
    for layer in weights:
        flow = (layer.mean(dim=1) + identity) / 2 @ flow
    return flow


def class_maps(weights: Sequence[Tensor], block: int = -1) -> dict[str, Tensor]:
    """Return how much the class token draws from each patch, (B, N) each: "head 1" ..., their "mean", and "rollout".

    Heads are those of one block, counted from 0, or from the last with -1; rollout runs up to that block. What the
    class token draws from itself is left out, so maps sum to less than 1. Raises UserError when there is no such block.
    """
    if not -len(weights) <= block < len(weights):
        raise UserError(f"there is no block {block}: the model has blocks 0 to {len(weights) - 1}, -1 is the last")
    heads = weights[block][:, :, 0, 1:]
    maps = {f"head {number + 1}": heads[:, number] for number in range(heads.shape[1])}
    return maps | {"mean": heads.mean(dim=1), "rollout": rollout(weights[: block % len(weights) + 1])[:, 0, 1:]}


def attention_suite(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    mask_ratios: Sequence[float],
    puzzle: dict,
    seed: int = 0,
    block: int = -1,
    limit: int | None = None,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"attention": rows, "figures": figures by name} of `attention_study`, the same on any number of processes.

    limit: images, spread evenly over the validation split, 4 by default; their classes need not be the checkpoint's.
    puzzle: options of `Jigsaw` beside ratio and seed. model, data, seed: as for `open_model`.
    """
    network, inputs = open_model(peers, model, data, seed=seed, notes=notes)
    dataset = inputs.open(peers).dataset
    used = min(len(dataset), limit or SHOWN)
    batch = collate([dataset[place * len(dataset) // used] for place in range(used)])
    alone = Processes(0, 1, peers.device)  # every process has read the same images
    name_unreadable(dataset, batch.index[batch.labels < 0].tolist(), alone, log)
    jigsaws = [Jigsaw(network.grid, ratio, seed=seed, **puzzle) for ratio in mask_ratios]
    rows, figures = attention_study(network, batch, jigsaws, mean=inputs.data.mean, std=inputs.data.std, block=block)
    if log:
        log("   image  mask ratio  follows content  stays in place")
        for row in rows:
            log("{image:8d} {mask_ratio:11.2f} {follows_content:16.3f} {stays_in_place:15.3f}".format(**row))
    return {"attention": rows, "figures": figures}


def attention_study(
    model: nn.Module,
    batch: Batch,
    jigsaws: Sequence[Jigsaw],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    block: int = -1,
) -> tuple[list[dict], dict[str, "Figure"]]:
    """Return the class maps of a few images, as they are and as each jigsaw shuffles them: rows, and a figure per image
    by name.

    Masks are those of `accuracy`, fixed by the jigsaw's seed and the image's index, and models that hide positions get
    them. A jigsaw that moves nothing adds nothing.

    Row: image (its index in the data set), mask_ratio, and how the mean map of the shuffled image correlates over the
    patches with that of the clean one, 1 is equal: follows_content with every patch's attention moved back to where
    the patch came from, stays_in_place without. mean and std: the normalisation of the images. Unreadable images are
    left out; raises UserError when none is left.
    """
    model.eval()
    readable = batch.labels >= 0
    if not readable.any():
        raise UserError(f"none of the {len(readable)} images could be read: check the data")
    images = batch.images[readable].to(next(model.parameters()).device)
    index = batch.index[readable]
    clean = class_maps(attention_weights(model, images), block)
    original = denormalize(images, mean, std)
    views, rows = [("original", original, clean)], []
    for jigsaw in filter(lambda each: each.count, jigsaws):
        view, mask = shuffled_view(model, images, index, jigsaw)
        maps = class_maps(attention_weights(model, view, mask), block)
        source = jigsaw.draw_for(index.tolist())[1].to(images.device)
        back = {name: torch.zeros_like(x).scatter(1, source, x) for name, x in maps.items()}
        ratio = f"mask ratio {jigsaw.mask_ratio:g}"
        views += [(ratio, denormalize(view, mean, std), maps), (f"{ratio}\nmoved back", original, back)]
        follows, stays = (correlation(x["mean"], clean["mean"]).tolist() for x in (back, maps))
        rows += [
            {"image": image, "mask_ratio": jigsaw.mask_ratio, "follows_content": content, "stays_in_place": place}
            for image, content, place in zip(index.tolist(), follows, stays, strict=True)
        ]
    figures = {
        f"attention_{image:05d}": attention_figure(
            [(title, pictures[place], {name: x[place] for name, x in maps.items()}) for title, pictures, maps in views],
            model.grid,
        )
        for place, image in enumerate(index.tolist())
    }
    return rows, figures


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Map Pearson correlation of the rows of two (B, N) tensors to (B,) in [-1, 1]; 0 for a constant row."""
    one, other = (x - x.mean(dim=1, keepdim=True) for x in (one.double(), other.double()))
    return nn.functional.cosine_similarity(one, other, dim=1)


def attention_figure(views: Sequence[tuple[str, Tensor, Mapping[str, Tensor]]], grid: tuple[int, int]) -> "Figure":
    """Return a line per view (title, picture (3, H, W) in [0, 1], maps (N,) by name): the picture, then its maps over
    it.

    The colours of a column run from its smallest to its largest value over all lines, so that views compare.
    """
    names = list(views[0][2])
    chart = new_figure(1.45 * (1 + len(names)), 1.5 * len(views) + 0.2)
    values = {name: torch.cat([maps[name] for _, _, maps in views]) for name in names}
    for line, ((title, picture, maps), panels) in enumerate(
        zip(views, chart.subplots(len(views), 1 + len(names), squeeze=False), strict=True)
    ):
        pixels = picture.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        panels[0].imshow(pixels)
        panels[0].set_ylabel(title, fontsize=9)
        for name, axes in zip(names, panels[1:], strict=True):
            low, high = values[name].min(), values[name].max()
            heat = ((maps[name] - low) / (high - low).clamp(min=1e-12)).unflatten(0, grid).cpu().numpy()
            axes.imshow(heat_over(pixels, heat))
            if line == 0:
                axes.set_title(name, fontsize=9)
        for axes in panels:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return chart


def heat_over(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Return a dimmed grey version of the picture (H, W, 3) under a heat map (rows, columns) in [0, 1], thicker where
    hot."""
    from matplotlib import colormaps

    height, width = pixels.shape[0] // heat.shape[0], pixels.shape[1] // heat.shape[1]
    heat = heat.repeat(height, axis=0).repeat(width, axis=1)
    thickness = 0.45 + 0.5 * heat[..., None]
    grey = 0.8 * pixels.mean(axis=2, keepdims=True)
    return (1 - thickness) * grey + thickness * colormaps["inferno"](heat)[..., :3]
