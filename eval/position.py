"""What the position embeddings (PE) of a model know about positions: linear probes, similarity maps, components.

The position study of MJP (Ren et al., CVPR 2023): regress a patch's position linearly from its PE ("absolute"), or how
far two patches lie apart from the difference of their PEs ("relative"), 1-D in raster order or 2-D in rows and columns;
five-fold cross-validation. Relative probes have three targets. A linear map can give `signed` differences. `distance`
is what the official code means to ask for; it is even in the difference and a linear map odd, so no PE scores well.
`official` is what that code computes: 2-D differences wrap around at 256, and tested pairs share their positions with
training pairs, so that even noise seems to know positions. The others test on positions in no training pair. (The
official code also calls its mean absolute error mse, and draws one split without a seed.)
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data.options import DataOptions
from eval.options import SubjectOptions
from eval.subject import open_model
from models.position import grid_coordinates, pos_embed_similarity
from reports.charts import COLORS, new_figure, open_axes
from utils.distributed import Processes
from utils.errors import UserError
from utils.notes import Notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDS = 5
CUTOFF = 1e-6  # singular values below this share of the largest count as zero, as in scikit-learn's LinearRegression
BACKGROUND = {"color": "white", "pad": 0.5}  # keeps numbers readable where they cross a line
TILES = 14  # similarity maps a side of a figure: every position of a ViT at 224 pixels


def position_suite(
    peers: Processes,
    *,
    model: SubjectOptions,
    data: DataOptions,
    repeats: int = 20,
    ridge: float = 0.0,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
    notes: Notes | None = None,
) -> dict:
    """Return {"position": rows, "figures": figures by name} of `position_study` for a checkpoint; no images are read.

    data.image_size resizes the table. seed fixes the splits and the random table. model, data: as for `open_model`.
    """
    network, _ = open_model(peers, model, data, seed=seed, notes=notes)
    generator = torch.Generator().manual_seed(seed)
    rows, figures = position_study(network, repeats=repeats, ridge=ridge, generator=generator)
    if log:
        log("table        probe     target           error    (std)   chance  in patches")
        for row in rows:
            log(
                "{table:12s} {probe:9s} {target:9s} {dimensions}-D {mae:9.3f} {mae_std:8.3f} {chance:8.3f}".format(
                    **row
                )
            )
    return {"position": rows, "figures": figures}


def position_study(
    model: nn.Module, *, repeats: int = 20, ridge: float = 0.0, generator: torch.Generator
) -> tuple[list[dict], dict[str, "Figure"]]:
    """Return the PE table of `model` and three reference tables of its shape: rows of `probe`, and figures by name.

    Rows are those of `probe` with `table` first: learned, sinusoid_2d, sinusoid_1d or random; all see the same splits.
    Raises UserError for a model without PE table.
    """
    learned = learned_table(model)
    tables = {"learned": learned} | reference_tables(model.grid, learned.shape[1], generator)
    splits = draw_splits(len(learned), repeats, generator)
    rows = [
        {"table": name} | row for name, table in tables.items() for row in probe(table, model.grid, splits, ridge=ridge)
    ]
    figures = {
        "position_probes": probe_figure(rows),
        "position_similarity": similarity_figure(tables, model.grid),
        "position_components": component_figure(tables, model.grid),
    }
    return rows, figures


def learned_table(model: nn.Module) -> Tensor:
    """Return the PE rows of a model's patches, (N, D) float64 on the CPU. Raises UserError when there are none, or
    NaN."""
    name = model.arguments["name"]
    if getattr(model, "pos_embed", None) is None:
        raise UserError(f"model '{name}' has no position embeddings to study: use a ViT, or a Swin trained with them")
    table = model.patch_pos_embed().detach().cpu().double()
    if not table.isfinite().all():
        raise UserError(f"the position embeddings of '{name}' are NaN or infinite: use an earlier checkpoint")
    return table


def reference_tables(grid: tuple[int, int], dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return tables (N, D) to compare with: 1-D sinusoids of the raster index, 2-D ones (half the columns tell the row,
    half the column), and N(0, 1) noise, which knows no positions."""
    rows, columns = grid_coordinates(grid).double().unbind(1)
    return {
        "sinusoid_2d": torch.cat([sinusoids(rows, dim // 2), sinusoids(columns, dim - dim // 2)], dim=1),
        "sinusoid_1d": sinusoids(torch.arange(len(rows)), dim),
        "random": torch.randn(len(rows), dim, dtype=torch.float64, generator=generator),
    }


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Return sines and cosines by turns, of wavelengths from 2 pi to 10000 * 2 pi (Vaswani et al., 2017): (N,) -> (N,
    dim)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angles = positions.double()[:, None] / 10000**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]


def draw_splits(number: int, repeats: int, generator: torch.Generator) -> Tensor:
    """Return two random orders of `number` positions per repeat, (repeats, 2, N); only `official` probes use the
    second."""
    if number < 2 * FOLDS:
        raise UserError(f"{number} positions are too few to probe: {FOLDS} folds need {2 * FOLDS} or more")
    orders = [torch.randperm(number, generator=generator) for _ in range(2 * repeats)]
    return torch.stack(orders).unflatten(0, (repeats, 2))


def probe(table: Tensor, grid: tuple[int, int], splits: Tensor, *, ridge: float = 0.0) -> list[dict]:
    """Fit linear probes of a PE table (N, D), one per row of `splits` (repeats, 2, N); ridge as in `probe_errors`.

    Rows: probe and target as in `probe_problems`, dimensions (1 or 2), mae (mean over the repeats, in patches; lower:
    the PEs tell more), mae_std (its sample standard deviation, 0 for one repeat), chance (mae of a probe that sees
    nothing), ridge, repeats.
    """
    scores: dict[tuple, list[tuple[float, float]]] = {}
    for order, partner in splits:
        for (kind, target), (rows, targets) in probe_problems(table.double(), grid, order, partner).items():
            errors = probe_errors(rows, targets, ridge=ridge).mean(0)
            blind = probe_errors(torch.zeros_like(rows[:, :1]), targets).mean(0)
            for dimensions, columns in ((1, slice(0, 1)), (2, slice(1, 3))):
                pair = errors[columns].mean().item(), blind[columns].mean().item()
                scores.setdefault((kind, target, dimensions), []).append(pair)
    return [
        {
            "probe": kind,
            "target": target,
            "dimensions": dimensions,
            "mae": statistics.fmean(mae for mae, _ in pairs),
            "mae_std": statistics.stdev(mae for mae, _ in pairs) if len(pairs) > 1 else 0.0,
            "chance": statistics.fmean(chance for _, chance in pairs),
            "ridge": ridge,
            "repeats": len(pairs),
        }
        for (kind, target, dimensions), pairs in scores.items()
    ]


def probe_problems(
    table: Tensor, grid: tuple[int, int], order: Tensor, partner: Tensor
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return {(probe, target): (rows (N, D), targets (N, 3): index, row and column)} for orders (N,) of the positions.

    absolute position; relative signed difference and distance, of each position to the next in its fold; and relative
    official, of each position to its `partner`, wherever that is: distances, except that rows and columns are unsigned
    bytes, so that -2 becomes 254.
    """
    places = grid_coordinates(grid).long()
    raster = torch.cat([torch.arange(len(table))[:, None], places], dim=1)
    following = torch.cat([fold.roll(-1) for fold in order.tensor_split(FOLDS)])
    signed, wild = raster[order] - raster[following], raster[order] - raster[partner]
    wrapped = torch.cat([wild[:, :1].abs(), wild[:, 1:] % 256], dim=1)
    apart = table[order] - table[following]
    return {
        ("absolute", "position"): (table[order], raster[order].double()),
        ("relative", "signed"): (apart, signed.double()),
        ("relative", "distance"): (apart, signed.abs().double()),
        ("relative", "official"): (table[order] - table[partner], wrapped.double()),
    }


def probe_errors(rows: Tensor, targets: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Return mean absolute errors of linear regression with intercept: rows (N, D), targets (N, T) float64 -> (5 folds,
    T).

    The folds are contiguous fifths of the rows as they come. ridge 0: least squares, of the least norm where it is
    under-determined. Above, the penalty on the squared weights as in ridge regression on rows scaled to unit variance,
    the average over D, so that tables of any scale are treated alike.
    """
    errors = []
    for test in torch.arange(len(rows)).tensor_split(FOLDS):
        train = torch.ones(len(rows), dtype=torch.bool).index_fill(0, test, False)
        middle, intercept = rows[train].mean(0), targets[train].mean(0)
        centred = rows[train] - middle
        left, values, right = torch.linalg.svd(centred, full_matrices=False)
        used = values > CUTOFF * values[0]
        gains = torch.where(used, values / (values.square() + ridge * centred.square().mean()), 0)
        weights = right.T @ (gains[:, None] * (left.T @ (targets[train] - intercept)))
        predicted = (rows[test] - middle) @ weights + intercept
        errors.append((targets[test] - predicted).abs().mean(0))
    return torch.stack(errors)


def probe_figure(rows: Sequence[dict]) -> "Figure":
    """Return bars of the mean absolute error per table, for absolute and signed relative probes; dashed: chance."""
    shown = [row for row in rows if row["target"] in ("position", "signed")]
    kinds = list(dict.fromkeys((row["probe"], row["dimensions"]) for row in shown))
    names = list(dict.fromkeys(row["table"] for row in shown))
    chart = new_figure(3.1 * len(kinds), 0.9 + 0.36 * len(names))
    with open_axes():
        panels = chart.subplots(1, len(kinds), sharey=True)
        for (kind, dimensions), axes in zip(kinds, panels, strict=True):
            group = [row for row in shown if (row["probe"], row["dimensions"]) == (kind, dimensions)]
            chance = group[0]["chance"]
            axes.axvline(chance, color="#1e293b", linestyle="--", linewidth=1, zorder=0)
            for place, row in enumerate(group):
                bar = min(row["mae"], 1.7 * chance)  # an interpolating probe can be off by any amount
                axes.barh(place, bar, height=0.62, color=COLORS[0] if row["table"] == "learned" else COLORS[1])
                text = f"{row['mae']:.3g} ± {row['mae_std']:.3g}" if row["mae"] > 5e-4 else "< 0.0005"
                axes.text(bar + 0.05 * chance, place, text, va="center", fontsize=8, bbox=BACKGROUND)
            axes.set(xlim=(0, 2.6 * chance), xlabel="error in patches (dashed: chance)")
            axes.set_title(f"{kind}, {dimensions}-D", loc="left", fontweight="bold", fontsize=10)
        panels[0].set_yticks(range(len(names)), [label(name) for name in names])
        panels[0].invert_yaxis()
    return chart


def similarity_figure(tables: Mapping[str, Tensor], grid: tuple[int, int]) -> "Figure":
    """Return maps of cosine similarity for every table: tile (r, c) shows how alike the PE there is to that of each
    position.

    Grids larger than 14 x 14 show every second, third ... position.
    """
    rows, columns = grid
    step = math.ceil(max(grid) / TILES)
    lines = math.ceil(len(tables) / 2)
    chart = new_figure(9, 4.4 * lines)
    panels = chart.subplots(lines, 2, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for axes, (name, table) in zip(panels.flat, tables.items(), strict=False):
        tiles = pos_embed_similarity(table).reshape(rows, columns, rows, columns)[step // 2 :: step, step // 2 :: step]
        framed = nn.functional.pad(tiles, (0, math.ceil(columns / 14), 0, math.ceil(rows / 14)), value=torch.nan)
        mosaic = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        drawn = axes.imshow(mosaic.numpy(), cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(label(name), fontsize=10, fontweight="bold")
    chart.colorbar(drawn, ax=panels, label="cosine similarity", fraction=0.02, pad=0.01, aspect=40)
    return chart


def component_figure(tables: Mapping[str, Tensor], grid: tuple[int, int]) -> "Figure":
    """Return the first three principal components of every table over the grid: as one RGB picture, then each by
    itself."""
    chart = new_figure(8, 2.1 * len(tables))
    for (name, table), line in zip(tables.items(), chart.subplots(len(tables), 4, squeeze=False), strict=True):
        scores, shares = components(table)
        maps = scores.unflatten(0, grid)
        low, high = scores.amin(0), scores.amax(0)
        line[0].imshow(((maps - low) / (high - low).clamp(min=1e-12)).numpy())
        line[0].set_ylabel(label(name), fontsize=10, fontweight="bold")
        line[0].set_title("components 1–3 as RGB", fontsize=9)
        for number, axes in enumerate(line[1:]):
            limit = scores[:, number].abs().max()
            axes.imshow(maps[..., number].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set_title(f"component {number + 1}: {shares[number]:.1%}", fontsize=9)
        for axes in line:
            axes.set(xticks=[], yticks=[])
    return chart


def components(table: Tensor, number: int = 3) -> tuple[Tensor, Tensor]:
    """Return the principal component analysis of PE rows (N, D): scores (N, number) and the share of the variance each
    explains.

    A component's sign is free; the score of largest magnitude is made positive.
    """
    left, values, _ = torch.linalg.svd(table - table.mean(0), full_matrices=False)
    scores = left[:, :number] * values[:number]
    largest = scores.gather(0, scores.abs().argmax(0, keepdim=True))
    return scores * largest.sign(), values[:number].square() / values.square().sum()


def label(name: str) -> str:
    """Return the name of a table for people: sinusoid_2d -> sinusoid 2-D."""
    return name.replace("_", " ").replace("1d", "1-D").replace("2d", "2-D")
