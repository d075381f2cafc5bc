"""eval/position.py: the probes against the reference numbers, their known answers, and what the figures show."""

import math

import pytest
import torch
from torch import Tensor

from data.options import DataOptions
from eval.options import SubjectOptions
from eval.position import (
    TILES,
    components,
    draw_splits,
    learned_table,
    position_study,
    position_suite,
    probe,
    probe_errors,
    probe_figure,
    probe_problems,
    reference_tables,
    similarity_figure,
    sinusoids,
)
from models import build_model
from models.checkpoints import save_checkpoint
from models.position import grid_coordinates
from utils.distributed import Processes
from utils.errors import UserError

GRID = (14, 14)
TABLES = ("random64", "sinusoid64", "smooth2d_64")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def small_model(**options):
    return build_model("vit", image_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=1, **options)


def by_target(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["probe"], row["target"], row["dimensions"]): row for row in rows}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TABLES)
def test_the_official_study_is_reproduced(golden, name, seed):
    data, results = golden("pestudy"), golden("pestudy.json")["results"]
    table = torch.from_numpy(data[f"pe/{name}"]).double()
    absolute, relative = (torch.from_numpy(data[f"perm/{kind}_seed{seed}"]) for kind in ("absolute", "relative"))
    for kind, target, pairs in (
        ("absolute", "position", [(absolute[0], absolute[0]), (absolute[1], absolute[1])]),
        ("relative", "official", [(relative[0], relative[1]), (relative[2], relative[3])]),
    ):
        expected, folds = results[f"{name}_{kind}_seed{seed}"], data[f"folds/{name}_{kind}_seed{seed}"]
        for dimensions, (order, partner), columns in zip((1, 2), pairs, (slice(0, 1), slice(1, 3)), strict=True):
            rows, targets = probe_problems(table, GRID, order, partner)[kind, target]
            errors = probe_errors(rows, targets)[:, columns].mean(1)
            change = expected[f"{dimensions}D_rel_change_if_table_perturbed_1e-13"]
            assert change < 1e-4
            tolerance = 1e-6 if change < 1e-8 else 1e-3
            assert errors.mean().item() == pytest.approx(expected[f"{dimensions}D_f64"], rel=tolerance)
            assert errors.tolist() == pytest.approx(folds[dimensions - 1].tolist(), rel=tolerance)
            exact = (name, kind, dimensions) == ("sinusoid64", "absolute", 1)  # 0 but for rounding
            if not exact:
                assert errors.mean().item() == pytest.approx(expected[f"{dimensions}D"], rel=5e-3)  # in float32
    places = grid_coordinates(GRID)
    distance = (places[relative[2]] - places[relative[3]]).abs().double()
    errors = probe_errors(table[relative[2]] - table[relative[3]], distance).mean(1)
    assert errors.mean().item() == pytest.approx(expected["2D_signed_arithmetic_f64"], rel=1e-6)
    assert errors.tolist() == pytest.approx(data[f"folds_signed/{name}_relative_seed{seed}"].tolist(), rel=1e-6)


def test_sinusoids_are_the_reference_ones(golden):
    expected = torch.from_numpy(golden("pestudy")["pe/sinusoid64"])
    torch.testing.assert_close(
        sinusoids(torch.arange(196), 64).float(), expected, rtol=0, atol=2e-5
    )  # there in float32


def test_sinusoids_have_the_stated_wavelengths():
    table = sinusoids(torch.tensor([0, 1, 7]), 5)
    assert table[0].tolist() == [0, 1, 0, 1, 0]
    expected = [math.sin(7), math.cos(7), math.sin(7 / 10000**0.4), math.cos(7 / 10000**0.4), math.sin(7 / 10000**0.8)]
    assert table[2].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dim", [6, 40])
def test_a_table_linear_in_the_place_is_read_exactly(dim):
    """Also under-determined (40 columns, 24 training rows): the least-norm solution lies in the span of the rows."""
    table = grid_coordinates((6, 5)).double() @ noise(2, dim) + noise(dim)
    rows = by_target(probe(table, (6, 5), draw_splits(30, 2, seeded())))
    for kind, target in (("absolute", "position"), ("relative", "signed")):
        assert max(rows[kind, target, dimensions]["mae"] for dimensions in (1, 2)) < 1e-9
    assert rows["relative", "distance", 2]["mae"] > 1  # even in the difference, so out of a linear map's reach
    assert rows["relative", "official", 2]["mae"] > 30


def test_chance_is_the_spread_of_the_positions():
    rows = by_target(probe(torch.zeros(196, 3), GRID, draw_splits(196, 3, seeded())))
    for row in rows.values():
        assert row["mae"] == row["chance"]  # a constant table tells nothing
    assert rows["absolute", "position", 2]["chance"] == pytest.approx(3.5, rel=0.02)  # E|x - 6.5| of 0 ... 13
    assert rows["absolute", "position", 1]["chance"] == pytest.approx(49, rel=0.02)
    assert rows["relative", "signed", 2]["chance"] == pytest.approx((14 - 1 / 14) / 3, rel=0.05)  # E|x - y|


def test_held_out_positions_are_in_no_training_pair():
    order, partner = draw_splits(23, 1, seeded())[0]
    problems = probe_problems(torch.eye(23, dtype=torch.float64), (23, 1), order, partner)
    for key in (("absolute", "position"), ("relative", "signed"), ("relative", "distance")):
        rows, _ = problems[key]
        seen = [set(fold.nonzero()[:, 1].tolist()) for fold in rows.tensor_split(5)]
        assert sum(map(len, seen)) == len(set.union(*seen)) == 23
    official = [set(fold.nonzero()[:, 1].tolist()) for fold in problems["relative", "official"][0].tensor_split(5)]
    assert sum(map(len, official)) > 23
    signed, distance = (problems["relative", target][1] for target in ("signed", "distance"))
    assert (signed < 0).any() and distance.equal(signed.abs()) and (distance[:, 0] > 0).all()


def test_noise_tells_nothing_but_in_the_official_way():
    """With more columns than positions, pairs that share positions with training pairs are recognised one by one."""
    rows = by_target(probe(noise(64, 2000), (8, 8), draw_splits(64, 4, seeded())))
    for target in ("signed", "distance"):
        assert rows["relative", target, 2]["mae"] == pytest.approx(rows["relative", target, 2]["chance"], rel=0.1)
    order, partner = draw_splits(64, 1, seeded())[0]
    apart = noise(64, 2000)[order] - noise(64, 2000)[partner]
    signed = (order - partner).double()[:, None]
    assert probe_errors(apart, signed).mean() < 0.7 * probe_errors(torch.zeros(64, 1).double(), signed).mean()


def test_official_differences_wrap_at_256():
    order, partner = torch.arange(12), torch.arange(12).roll(1)
    _, targets = probe_problems(noise(12, 3), (3, 4), order, partner)["relative", "official"]
    assert targets[0].tolist() == [11, 254, 253]  # from (2, 3) to (0, 0)
    assert targets[1].tolist() == [1, 0, 1]
    assert targets[4].tolist() == [1, 1, 253]


@pytest.mark.parametrize("ridge", [0.0, 0.3, 10.0])
def test_ridge_solves_its_normal_equations(ridge):
    rows, targets = noise(25, 8), noise(25, 2, seed=1)
    train, test = slice(5, 25), slice(0, 5)
    centred = rows[train] - rows[train].mean(0)
    penalty = ridge * centred.square().mean() * torch.eye(8, dtype=torch.float64)
    weights = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ targets[train])
    predicted = (rows[test] - rows[train].mean(0)) @ weights + targets[train].mean(0)
    expected = (predicted - targets[test]).abs().mean(0)
    torch.testing.assert_close(probe_errors(rows, targets, ridge=ridge)[0], expected)
    torch.testing.assert_close(probe_errors(50 * rows + 3, targets, ridge=ridge)[0], expected)


def test_a_study_scores_every_table_on_the_same_splits():
    model = small_model()
    rows, figures = position_study(model, repeats=3, generator=seeded())
    assert rows == position_study(model, repeats=3, generator=seeded())[0]
    assert rows != position_study(model, repeats=3, generator=seeded(1))[0]
    assert [row["table"] for row in rows[::8]] == ["learned", "sinusoid_2d", "sinusoid_1d", "random"]
    assert len(rows) == 32 and {row["repeats"] for row in rows} == {3}
    for first, second in zip(rows[:8], rows[8:16], strict=True):
        assert first["chance"] == second["chance"] and first["mae"] != second["mae"]
    assert all(row["mae_std"] > 0 for row in rows[:8])
    assert {row["mae_std"] for row in position_study(model, repeats=1, generator=seeded())[0]} == {0.0}
    assert list(figures) == ["position_probes", "position_similarity", "position_components"]
    chart = figures["position_components"]
    assert [axes.get_ylabel() for axes in chart.axes[::4]] == ["learned", "sinusoid 2-D", "sinusoid 1-D", "random"]
    assert all(axes.get_images()[0].get_array().shape[:2] == (4, 4) for axes in chart.axes)


def test_the_suite_reads_a_checkpoint(tmp_path):
    model, lines = small_model(unknown=True), []
    save_checkpoint(tmp_path / "last.pt", {"arguments": model.arguments, "model": model.state_dict()})
    options = {"model": SubjectOptions(checkpoint=str(tmp_path / "last.pt")), "repeats": 2, "seed": 3}
    peers = Processes(0, 1, torch.device("cpu"))
    results = position_suite(peers, data=DataOptions(), log=lines.append, **options)
    rows, figures = position_study(model, repeats=2, generator=seeded(3))
    assert results["position"] == rows and results["figures"].keys() == figures.keys()
    assert len(lines) == 33 and f"{rows[0]['mae']:9.3f}" in lines[1]
    larger = position_suite(peers, data=DataOptions(image_size=64), **options)
    assert larger["position"][0]["chance"] > 2 * rows[0]["chance"]  # 64 positions instead of 16


def test_swin_tables_are_studied_too():
    shape = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    model = build_model("swin_tiny", absolute_pos_embed=True, **shape)
    assert learned_table(model).shape == (64, 12)
    with pytest.raises(UserError, match="'swin_tiny' has no position embeddings"):
        learned_table(build_model("swin_tiny", **shape))


def test_what_cannot_be_studied_is_refused():
    with pytest.raises(UserError, match="'lenet' has no position embeddings"):
        position_study(build_model("lenet", image_size=32), generator=seeded())
    broken = small_model()
    with torch.no_grad():
        broken.pos_embed[0, 3, 0] = math.nan
    with pytest.raises(UserError, match="are NaN or infinite"):
        position_study(broken, generator=seeded())
    with pytest.raises(UserError, match="4 positions are too few"):
        draw_splits(4, 1, seeded())


def test_reference_tables_fit_any_width():
    for dim in (1, 7, 12):
        tables = reference_tables((3, 5), dim, seeded())
        assert {table.shape for table in tables.values()} == {(15, dim)}
    same_row, same_column = (tables["sinusoid_2d"].unflatten(0, (3, 5))[place] for place in (1, (slice(None), 1)))
    assert same_row[:, :6].equal(same_row[:1, :6].expand(5, -1)) and not same_row[0, 6:].equal(same_row[1, 6:])
    assert same_column[:, 6:].equal(same_column[:1, 6:].expand(3, -1))


def test_components_explain_the_table():
    axes, _ = torch.linalg.qr(noise(9, 3))
    coordinates = noise(20, 3) * torch.tensor([5.0, 2.0, 0.5])
    table = coordinates @ axes.T + noise(9, seed=2)
    scores, shares = components(table)
    centred = table - table.mean(0)
    assert shares.sum().item() == pytest.approx(1)
    assert (shares.diff() < 0).all()
    torch.testing.assert_close(scores @ scores.T, centred @ centred.T)
    assert (scores.amax(0) == scores.abs().amax(0)).all()


def test_similarity_maps_show_each_position_against_all():
    table = noise(12, 5)
    drawn = similarity_figure({"a_1d": table}, (3, 4)).axes[0].get_images()[0].get_array()
    assert drawn.shape == (3 * 4, 4 * 5)  # a tile of 3 x 4 and a line per position
    similarity = torch.nn.functional.cosine_similarity(table[6, None], table).reshape(3, 4)
    torch.testing.assert_close(torch.tensor(drawn.data)[4:7, 10:14], similarity)
    assert drawn.mask[3].all() and drawn.mask[:, 4].all()


def test_large_grids_show_some_positions():
    drawn = similarity_figure({"noise": noise(30 * 30, 4)}, (30, 30)).axes[0].get_images()[0].get_array()
    assert drawn.shape[0] == 10 * 33 and drawn.shape[0] <= TILES * 33


def test_bars_say_the_errors():
    rows, _ = position_study(small_model(), repeats=2, generator=seeded())
    chart = probe_figure(rows)
    assert [axes.get_title(loc="left") for axes in chart.axes] == [
        "absolute, 1-D", "absolute, 2-D", "relative, 1-D", "relative, 2-D",
    ]  # fmt: skip
    learned = by_target(rows[:8])["relative", "signed", 2]
    axes = chart.axes[3]
    assert axes.texts[0].get_text().startswith(f"{learned['mae']:.3g} ±")
    assert axes.patches[0].get_width() == pytest.approx(min(learned["mae"], 1.7 * learned["chance"]))
    assert axes.lines[0].get_xdata()[0] == learned["chance"]
