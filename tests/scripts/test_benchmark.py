"""scripts/benchmark.py: a whole plan over two processes, what it leaves behind, and plans that are wrong."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from attacks.matching.likelihood import Likelihood
from attacks.threat_model.leak import RefusalError
from scripts.benchmark import draw, main, spread_out, tables
from scripts.benchmark_plan import attacks_of, merged, options, read_plan, shares
from utils.errors import UserError
from utils.run_once import run_once

PLAN = {
    "data": "datasets/digits",
    "seeds": 1,
    "train": {
        "data": {"image_size": 32, "batch_size": 6, "workers": 0},
        "augment": {"repeats": 1},
        "optim": {"epochs": 1, "warmup_epochs": 0, "mixup": 0, "cutmix": 0},
        "log": {"images_every": 0},
        "device": "cpu",
    },
    "models": {
        "vit": {"model": {"name": "vit", "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "drop_path": 0}},
    },
    "attack": {"num_images": 2, "device": "cpu"},
    "naive": {
        "closed_form": {"attack": "closed_form"},
        "matching": {"attack": "inverting_gradients", "attack_options": {"iterations": 2}},
    },
    "adaptive": {"defense_aware": {"attack": "defense_aware", "attack_options": {"iterations": 2}}},
    "defenses": {
        "none": {},
        "noise": {
            "strength": "std 1",
            "adaptive": ["defense_aware"],
            "train": {"defense": "noise", "defense_options": {"std": 1.0}},
            "attack": {"defense": "noise", "defense_options": {"std": 1.0}},
        },
    },
}


def run(rank: int, arguments: list[str], monkeypatch) -> None:
    """As one of two processes, which exchange nothing but files, so that they may come one after the other."""
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", *arguments])
    for key, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(key, str(value))
    main()


def test_a_plan_over_two_processes_and_again(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    arguments = ["--plan", str(tmp_path / "plan.yaml"), "--data", str(images), "--output", str(tmp_path / "out")]
    for rank in (1, 0):
        run(rank, arguments, monkeypatch)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["defense"] for row in rows] == ["none", "noise"] and rows[1]["strength"] == "std 1"
    assert all(
        rows[0][who]["attack"] == "closed_form" and rows[0][who]["success"] == 1 for who in ("naive", "adaptive")
    )
    assert rows[1]["psnr_by_attack"].keys() == {"closed_form", "matching", "defense_aware"}
    assert rows[1]["adaptive"]["psnr"] < 25 and all(0 <= row["acc1"] <= 100 for row in rows)
    assert (tmp_path / "out" / "privacy_accuracy.png").stat().st_size > 5000
    stamp = (tmp_path / "out" / "vit" / "none" / "train_0" / "last.pt").stat().st_mtime
    capsys.readouterr()
    for rank in (1, 0):
        run(rank, arguments, monkeypatch)
    assert "closed_form" in capsys.readouterr().out
    assert (tmp_path / "out" / "vit" / "none" / "train_0" / "last.pt").stat().st_mtime == stamp
    refuse(tmp_path / "out", ["matching"], monkeypatch)
    for rank in (1, 0):
        run(rank, arguments, monkeypatch)
    (row, _) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["refused"] == {"matching": "no such leak"} and list(row["psnr_by_attack"]) == ["closed_form"]
    assert "\n- `matching`, none: no such leak\n" in (tmp_path / "out" / "table.md").read_text()
    refuse(tmp_path / "out", ["matching", "closed_form"], monkeypatch)
    run(1, arguments, monkeypatch)
    with pytest.raises(UserError, match="every naive attack refuses the leaks of vit, none: no such leak; no"):
        run(0, arguments, monkeypatch)
    refuse(tmp_path / "out", [], monkeypatch)  # as with another plan, or another version
    for rank in (1, 0):
        run(rank, arguments, monkeypatch)
    (row, _) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "refused" not in row and not list((tmp_path / "out").glob("refused_*"))


def refuse(folder: Path, attacks: list[str], monkeypatch) -> None:
    """Let attacks refuse the leaks of the first cell."""

    def refusing(main, options, output):
        if output.parent == folder / "vit" / "none" and output.name in attacks:
            raise RefusalError("no such leak")
        return run_once(main, options, output)

    monkeypatch.setattr("scripts.benchmark.run_once", refusing)
    for attack in attacks:
        shutil.rmtree(folder / "vit" / "none" / attack, ignore_errors=True)


def test_a_killed_benchmark_continues_to_the_results_of_a_straight_one(start, images, tmp_path):
    """SIGKILL inside a training, then inside an attack; the weights and every score are equal to the last bit."""
    train = merged(PLAN["train"], {"optim": {"epochs": 4}})
    slow = {"attack": "inverting_gradients", "attack_options": {"iterations": 40}, "victims_at_once": 1}
    plan = PLAN | {"train": train, "naive": {"matching": slow}, "defenses": {"none": {}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))

    def begin(folder: str):
        given = ["--plan", tmp_path / "plan.yaml", "--data", images, "--output", tmp_path / folder]
        return start(1, "scripts/benchmark.py", *given)

    cell = tmp_path / "killed" / "vit" / "none"
    for place in (cell / "train_0" / "last.pt", cell / "matching" / "partial" / "0.jsonl"):
        running = begin("killed")
        while not place.exists():
            assert running.poll() is None, running.finish()
            time.sleep(0.01)
        running.kill()
        assert running.finish().status == -signal.SIGKILL and not place.parents[0].joinpath("results.json").exists()
    outcomes = [begin(folder).finish() for folder in ("killed", "straight")]
    assert all(outcome.status == 0 for outcome in outcomes), outcomes
    rows, weights = zip(*(_outcome(tmp_path / folder) for folder in ("killed", "straight")), strict=True)
    assert rows[0] == rows[1]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def _outcome(folder: Path) -> tuple[list, dict]:
    weights = torch.load(folder / "vit" / "none" / "train_0" / "last.pt", weights_only=True)["model"]
    return json.loads((folder / "results.json").read_text()), weights


def test_table_and_figure_show_every_cell(tmp_path):
    score = {"psnr": 20.0, "psnr_patches": 21.0, "ssim": 0.5, "success": 0.25, "std": None, "n": 4, "no_leak": 13.0}
    row = {"model": "vit", "defense": "a", "strength": "–", "acc1": 90.0, "acc1_std": 0.5, "naive": score}
    row["psnr_by_attack"] = {"closed_form": 20.0}
    rows = [
        row | {"adaptive": {"attack": "best", **score}},
        row | {"defense": "b", "adaptive": {"attack": "x", **score}},
    ]
    text = tables(rows)
    assert "| a | – | 90.0 ± 0.5 | 25 | 20.0 ± 0.0 | 25 | 20.0 ± 0.0 |" in text and "| b | 20.0 |" in text
    assert "| a | best | – | 21.0 | 0.50 | 21.0 | 0.50 |" in text
    assert "| vit | a | –" in tables([*rows, row | {"model": "swin", "adaptive": {"attack": "best", **score}}])
    draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_two_processes_share_the_trainings_of_each_model():
    plan = PLAN | {"models": {"one": {"model": {}}, "two": {"model": {}}}, "naive": {}, "adaptive": {}}
    assert shares(plan)[::2] == [[("one", "none")], [("two", "none")]]
    assert shares(plan)[1::2] == [[("one", "noise")], [("two", "noise")]]


@pytest.mark.parametrize("name", ["small", "full"])
def test_plans_tell_the_attacker_of_defences_that_can_be_modelled(name):
    plan = read_plan(f"configs/benchmark/{name}.yaml")
    attacks = [one for defense in plan["defenses"] for one in attacks_of(plan, defense).values()]
    told = [one["attack_options"] for one in attacks if one["attack"] == "defense_aware"]
    assert told
    for known in told:
        Likelihood(known["defense"], known["defense_options"], batch_size=1, softness=0.3)


def test_options_become_a_command_line():
    tree = merged({"optim": {"lr": 1, "fused": True}, "seed": 0}, {"optim": {"lr": 2.5}, "withhold": ["a", "b"]})
    assert options(tree) == ["--optim.lr=2.5", "--optim.fused=true", "--seed=0", "--withhold=['a','b']"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seeds": None, "seed": 1}, "look at seed, seeds"),
        ({"defenses": {"none": {"naive": ["closed"]}}}, "defence 'none' of plan .*: unknown closed"),
        ({"defences": {"none": {"adaptive": [], "trian": {}}}}, "unknown trian"),
    ],
)
def test_wrong_plans_are_named(tmp_path, change, words):
    plan = {key: value for key, value in (PLAN | change).items() if value is not None}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    with pytest.raises(UserError, match=words):
        read_plan(str(tmp_path / "plan.yaml"))
    with pytest.raises(UserError, match="does not exist"):
        read_plan(str(tmp_path / "absent.yaml"))


def test_labels_of_the_figure_are_apart_and_move_no_further_than_they_must():
    assert spread_out([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert spread_out([4.0, 4.0, 4.5, 9.0], 1.0) == pytest.approx([3.1667, 4.1667, 5.1667, 9.0], abs=1e-3)


@pytest.mark.parametrize("content", [b"[1, 2]", b"text", b"", b"\xff\xfe\x00", b"a: [1"])
def test_what_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(UserError, match="must hold options|cannot be read as YAML"):
        read_plan(str(tmp_path / "plan.yaml"))
