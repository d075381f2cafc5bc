"""The second-order polish against the solution of a linear problem, and a study that goes on where it was."""

import json
import sys
from functools import partial

import pytest
import torch

import scripts.levenberg_marquardt as script
from attacks import ATTACKS
from models import build_model
from models.checkpoints import save_checkpoint
from scripts.levenberg_marquardt import SMOOTH, polish, roughness
from tests.attacks.small_victims import generator
from utils.errors import UserError
from utils.ownership import earlier_rows


def test_the_polish_of_a_linear_problem_is_its_solution():
    draw = {"generator": generator(), "dtype": torch.float64}
    matrix, shared = torch.randn(30, 12, **draw), torch.randn(30, **draw)
    weights, start = torch.rand(30, **draw) + 0.1, torch.randn(3, 2, 2, **draw)
    prior = roughness(start.shape, torch.ones(3, 1, 1))
    found, costs = polish(lambda image: matrix @ image.flatten(), shared, weights, start, prior)
    expected = torch.linalg.solve(matrix.T @ (weights[:, None] * matrix) + prior, matrix.T @ (weights * shared))
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-3, atol=1e-3)
    assert all(after < before for before, after in zip(costs, costs[1:], strict=False))


def test_roughness_is_the_squared_difference_of_neighbours():
    image, std = torch.rand(3, 4, 5, generator=generator(), dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4])
    pixels = image * std.view(3, 1, 1)
    expected = pixels.diff(dim=1).square().sum() + pixels.diff(dim=2).square().sum()
    prior = roughness(image.shape, std.view(3, 1, 1))
    torch.testing.assert_close(image.flatten() @ prior @ image.flatten(), expected / SMOOTH**2)


def test_a_study_measures_what_is_missing_and_keeps_other_files(images, tmp_path, monkeypatch):
    shape = {
        "image_size": 8,
        "patch_size": 4,
        "mlp_ratio": 1,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 4,
    }
    model, scale = build_model("vit", **shape), {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    content = {"arguments": model.arguments, "model": model.state_dict(), "normalize": scale}
    save_checkpoint(tmp_path / "vit.pt", content)

    short = partial(ATTACKS["defense_aware"], iterations=2)
    monkeypatch.setattr(script, "STEPS", 2)
    monkeypatch.setattr(script, "ATTACKS", {"closed_form": ATTACKS["closed_form"], "defense_aware": short})

    def study(*options) -> None:
        given = ["--checkpoint", tmp_path / "vit.pt", "--images", images / "val", "--image_size", 8, *options]
        monkeypatch.setattr(sys, "argv", ["", *map(str, given)])
        script.main()

    for number in (1, 2):
        study("--case", "noise", '{"std": 1e-6}', "--num_images", number, "--output", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "levenberg_marquardt.json").read_text())["images"]
    assert len(rows) == 2 and all(row["cost_polished_closed_form"] < row["cost_closed_form"] for row in rows)
    assert all(row["closed_form"] > 25 for row in rows)
    with pytest.raises(UserError, match="options are JSON"):
        study("--case", "noise", "std", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "rows.json").write_text('{"images": [{"a": 1}]}')
    with pytest.raises(UserError, match="was not written by this script.*another --output"):
        earlier_rows(tmp_path / "rows.json", "spectrum")
