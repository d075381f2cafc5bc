"""The study of the second-order polish goes on where it was."""

import json
import sys
from functools import partial

import pytest

import scripts.levenberg_marquardt as script
from attacks.linear.closed_form import closed_form
from attacks.presets.defense_aware import defense_aware
from attacks.presets.levenberg_marquardt import BASES, levenberg_marquardt
from models import build_model
from models.checkpoints import save_checkpoint
from utils.errors import UserError
from utils.ownership import earlier_rows


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

    short = partial(defense_aware, iterations=2)
    short.check = defense_aware.check
    monkeypatch.setitem(BASES, "defense_aware", short)
    monkeypatch.setattr(
        script,
        "ATTACKS",
        {"closed_form": closed_form, "defense_aware": short, "levenberg_marquardt": levenberg_marquardt},
    )

    def study(*options) -> None:
        given = [
            "--steps",
            1,
            "--checkpoint",
            tmp_path / "vit.pt",
            "--images",
            images / "val",
            "--image_size",
            8,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", ["", *map(str, given)])
        script.main()

    for number in (1, 2):
        study("--case", "noise", '{"std": 1e-6}', "--num_images", number, "--output", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "levenberg_marquardt.json").read_text())["images"]
    assert len(rows) == 2 and all(row["objective_closed_form"] < row["start_closed_form"] for row in rows)
    assert all(row["closed_form"] > 25 for row in rows)
    study("--steps", 2, "--case", "noise", '{"std": 1e-6}', "--num_images", 1, "--output", tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "levenberg_marquardt.json").read_text())["images"]
    assert [row["most_steps"] for row in rows] == [1, 1, 2]  # other steps are other rows
    with pytest.raises(UserError, match="options are JSON"):
        study("--case", "noise", "std", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "rows.json").write_text('{"images": [{"a": 1}]}')
    with pytest.raises(UserError, match="was not written by this script.*another --output"):
        earlier_rows(tmp_path / "rows.json", "spectrum")
