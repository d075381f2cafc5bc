"""scripts/benchmark_conditions.py: nothing is chosen by the truth, and what its table and figure count."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image

import campaigns.scoring
from attacks.threat_model.client import Client, Round
from attacks.threat_model.leak import RefusalError
from scripts.benchmark import main
from scripts.benchmark_conditions import draw, row_of, table
from scripts.benchmark_plan import attack_settings, read_plan
from utils.errors import UserError

VIT = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "drop_path": 0, "num_classes": 4}
SHORT = {"iterations": 2}
PLAN = {
    "choose": "claim",
    "data": "datasets/digits",
    "seeds": 1,
    "train": {},
    "models": {"small": {"victim": {"model": "vit", "image_size": 32, "model_options": VIT}}},
    "attack": {"num_images": 2, "device": "cpu", "min_block": 1, "max_block": 2},
    "naive": {
        "matching": {"attack": "inverting_gradients", "attack_options": SHORT},
        "closed_form": {"attack": "closed_form", "attack_options": {"underdetermined": True}},
    },
    "adaptive": {
        "joint": {"attack": "joint"},
        "mjp_aware": {"attack": "mjp_aware"},
        "token_span": {"attack": "token_span", "attack_options": {"match_steps": 2, "underdetermined": True}},
        "defense_aware": {"attack": "defense_aware", "attack_options": SHORT},
    },
    "defenses": {
        "none": {"factor": "base", "adaptive": ["joint"]},
        "batch 2": {"factor": "batch", "adaptive": ["joint"], "attack": {"batch_size": 2, "dtype": "float64"}},
        "MJP": {"naive": ["closed_form"], "adaptive": ["mjp_aware"], "attack": {"mask_ratio": 0.3, "num_images": 1}},
        "withheld": {
            "naive": ["matching"],
            "adaptive": ["token_span"],
            "attack": {"defense": "withhold", "defense_options": {"names": "pos_embed"}, "num_images": 1},
        },
        "noise": {
            "naive": ["closed_form"],
            "adaptive": ["defense_aware"],
            "attack": {"defense": "noise", "defense_options": {"std": 1e-3}, "num_images": 1},
        },
    },
}


@pytest.fixture
def images(tmp_path):
    """A data folder whose val/ has two pictures of noise, no two patches of which are alike."""
    folder = tmp_path / "data" / "val" / "0"
    folder.mkdir(parents=True)
    for place in range(2):
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(place), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{place}.png")
    return tmp_path / "data"


def write(path, change: dict) -> str:
    path.write_text(yaml.safe_dump(PLAN | change, sort_keys=False))
    return str(path)


def run(plan: str, images, output, monkeypatch, *more: str) -> list[dict]:
    monkeypatch.setattr(
        sys, "argv", ["scripts/benchmark.py", "--plan", plan, "--data", str(images), "--output", str(output), *more]
    )
    main()
    return json.loads((output / "results.json").read_text())


def test_no_reconstruction_and_no_choice_depends_on_the_originals(images, tmp_path, monkeypatch):
    """Two runs of a plan, the second scored by other pictures than those the clients trained on."""
    plan, seen, score, round_ = write(tmp_path / "plan.yaml", {}), {}, campaigns.scoring.score_round, Client.round

    def record(one: Round, result, metrics):
        seen.setdefault(name, []).append((result.images.clone(), {**result.diagnostics}))
        return score(one, result, metrics)

    def other_truth(self, *given):
        private, leak, generator = round_(self, *given)
        wrong = torch.rand(private.images.shape, generator=torch.Generator().manual_seed(5)).to(private.images)
        return Round(replace(private, images=wrong, model_input=wrong), leak, generator)

    monkeypatch.setattr(campaigns.scoring, "score_round", record)
    name = "truth"
    truth = run(plan, images, tmp_path / "one", monkeypatch)
    monkeypatch.setattr(Client, "round", other_truth)
    name = "others"
    others = run(plan, images, tmp_path / "two", monkeypatch)
    assert len(seen["truth"]) == len(seen["others"]) > 9
    for (one, claims), (two, same) in zip(seen["truth"], seen["others"], strict=True):
        assert one.equal(two)
        assert repr(claims) == repr(same)  # NaN equals itself there
    for row, other in zip(truth, others, strict=True):
        for who in ("naive", "adaptive"):
            assert row[who]["attack"] == other[who]["attack"] and row[who]["certified"] == other[who]["certified"]
    base, batch, _, _, noise = truth
    assert base["naive"]["attack"] == "closed_form", "not the first: it claims"
    assert base["adaptive"]["attack"] == "joint"
    assert base["adaptive"]["certified"] == batch["adaptive"]["certified"] == 2 and batch["naive"]["certified"] == 0
    assert base["adaptive"]["psnr"]["mean"] > 60 > others[0]["adaptive"]["psnr"]["mean"]
    assert others[0]["adaptive"]["wrong_claims"] == 2 and base["adaptive"]["wrong_claims"] == 0
    assert (
        noise["adaptive"]["attack"] == "defense_aware" and noise["adaptive"]["certified"] == 0
    )  # none claims: the first
    shown = (tmp_path / "one" / "table.md").read_text()
    assert shown.count("| none |") == 1 and "0 of 2 [0, 84] %" in shown
    assert all(line.count("|") == 9 for line in shown.splitlines() if line.startswith("|"))


def test_an_attack_that_refuses_a_leak_is_named_and_the_others_count(tmp_path, monkeypatch):
    """joint tells equal patches apart by the gradient of their positions; the run goes on, and again says the same."""
    folder = tmp_path / "data" / "val" / "0"
    folder.mkdir(parents=True)
    for place in range(2):
        Image.new("RGB", (32, 32), (60, 90, 10 * place)).save(folder / f"{place}.png")
    cell = PLAN["defenses"]["withheld"] | {"adaptive": ["joint"]}
    plan = write(tmp_path / "plan.yaml", {"defenses": {"withheld": cell}})
    (row,) = run(plan, tmp_path / "data", tmp_path / "out", monkeypatch)
    assert "patches are equal" in row["refused"]["joint"] and row["adaptive"]["attack"] == "matching"
    assert table([row]).splitlines()[4].endswith("| `matching`, `joint` refuses |")
    assert run(plan, tmp_path / "data", tmp_path / "out", monkeypatch) == [row]


def test_a_wrong_option_of_an_attack_is_no_refusal(images, tmp_path, monkeypatch):
    """Also one whose message names the attack: the run ends with it, and no cell says "could not be read"."""
    wrong = {"attack": "levenberg_marquardt", "attack_options": {"steps": -1, "defense": "noise"}}
    cell = PLAN["defenses"]["noise"] | {"adaptive": ["wrong"], "naive": ["closed_form"]}
    plan = write(tmp_path / "plan.yaml", {"adaptive": PLAN["adaptive"] | {"wrong": wrong}, "defenses": {"noise": cell}})
    with pytest.raises(UserError, match="attack 'levenberg_marquardt': steps must be 0 or more") as raised:
        run(plan, images, tmp_path / "out", monkeypatch)
    assert not isinstance(raised.value, RefusalError) and not list((tmp_path / "out").glob("refused_*"))


def score(certified: int, psnr: float, n: int = 4) -> dict:
    spread = {"mean": psnr, "std": 1.0, "n": n}
    return {
        "n": n,
        "certified": certified,
        "certified_interval": [0.0, 0.6],
        "wrong_claims": 0,
        "mean_colour": 9.0,
        "identified": None,
        "psnr": spread,
        "psnr_any_order": spread,
        "ssim": spread,
    }


def test_the_attack_that_certifies_most_counts_not_the_nearest_one(tmp_path):
    where = {"model": "vit", "factor": "defence", "defense": "noise", "strength": "–"}
    runs = [{"acc1": 90.0, "epsilon": 2.0}, {"acc1": 92.0, "epsilon": 2.0}]
    row = row_of(
        where, runs, {"told": score(0, 9.0), "naive": score(1, 8.0), "near": score(0, 80.0)}, ["naive", "near"]
    )
    assert row["adaptive"]["attack"] == row["naive"]["attack"] == "naive" and row["acc1"] == 91.0
    tied = row_of(where | {"defense": "prune"}, [], {"told": score(0, 9.0), "near": score(0, 80.0)}, ["near"])
    assert tied["adaptive"]["attack"] == "told" and tied["naive"]["attack"] == "near" and tied["acc1"] is None
    lines = table([row, tied]).splitlines()
    assert "| noise | 91.0 ± 1.4, ε 2.0 | 1 of 4 [0, 60] % | 8.0 ± 1.0 |" in lines[4]
    assert "| prune | – | 0 of 4 [0, 60] % | 80.0 ± 1.0 | 0 of 4 [0, 60] % | 9.0 ± 1.0 |" in lines[5]
    draw([row, tied], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "change, words",
    [
        ({"choose": "best"}, "choose of plan .* must be psnr or claim, got 'best'"),
        ({"defenses": {"a": {"weights": "b"}}}, "unknown b"),
        ({"defenses": {"a": {"models": ["large"]}}}, "unknown large"),
    ],
)
def test_wrong_conditions_are_named(change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_plan(write(tmp_path / "plan.yaml", change))


def test_a_plan_extends_another_and_missing_files_are_named(images, tmp_path, monkeypatch):
    write(tmp_path / "base.yaml", {})
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"extends": "base.yaml", "attack": {"num_images": 9}}))
    plan = read_plan(str(tmp_path / "more.yaml"))
    assert plan["attack"] == PLAN["attack"] | {"num_images": 9} and plan["defenses"] == PLAN["defenses"]
    plan["defenses"]["wide"] = {"train": {"model": {"depth": 3}}, "victim": {"model_options": {"depth": 3}}}
    settings = attack_settings(plan, "small", "wide")
    assert settings["model_options"] == VIT | {"depth": 3} and "train" not in settings
    plan["models"]["trained"] = {"model": {"name": "vit"}}
    assert "model_options" not in attack_settings(plan, "trained", "wide")
    (tmp_path / "lost.yaml").write_text("extends: absent.yaml\n")
    with pytest.raises(UserError, match="absent.yaml' does not exist"):
        read_plan(str(tmp_path / "lost.yaml"))
    plan = write(tmp_path / "plan.yaml", {"models": {"small": PLAN["models"]["small"] | {"images": "nowhere"}}})
    for more, words in (
        ((), "model 'small' needs 'nowhere'"),
        (("--models", "large"), "--models: plan .* has small, and no 'large'"),
    ):
        with pytest.raises(UserError, match=words):
            run(plan, images, tmp_path / "out", monkeypatch, *more)
    with pytest.raises(UserError, match="no cell of the plan is finished"):
        run(write(tmp_path / "plan.yaml", {}), images, tmp_path / "out", monkeypatch, "--finished")
    assert not (tmp_path / "out").exists()


def test_what_is_not_run_again_keeps_its_scores_and_says_so(images, tmp_path, monkeypatch):
    chosen = {name: PLAN["defenses"][name] for name in ("MJP", "noise")}
    plan = write(tmp_path / "plan.yaml", {"defenses": chosen})
    before = run(plan, images, tmp_path / "one", monkeypatch)
    for row in before:  # as another version of the code had left them
        row["acc1"], row["attacks"]["closed_form"]["certified"] = 75.0, 1
    (tmp_path / "before.json").write_text(json.dumps(before))
    again = ["--kept", str(tmp_path / "before.json"), "--only", "small/noise/closed_form"]
    mjp, noise = run(plan, images, tmp_path / "two", monkeypatch, *again)
    assert mjp["kept"] == ["mjp_aware", "closed_form"] and mjp["attacks"] == before[0]["attacks"]
    assert noise["kept"] == ["defense_aware"] and noise["acc1"] == 75.0
    assert noise["naive"]["certified"] == noise["attacks"]["closed_form"]["certified"] == 0, "measured anew"
    assert noise["attacks"]["defense_aware"] == before[1]["attacks"]["defense_aware"]
    assert not (tmp_path / "two" / "small" / "MJP").exists()
    with pytest.raises(UserError, match="--only 'small/nois' matches no attack of the plan"):
        run(plan, images, tmp_path / "three", monkeypatch, "--only", "small/nois")
    with pytest.raises(UserError, match="--only needs a plan of 'choose: claim'"):
        run(write(tmp_path / "psnr.yaml", {"choose": "psnr"}), images, tmp_path / "three", monkeypatch, "--only", "*")
    assert not (tmp_path / "three").exists()
