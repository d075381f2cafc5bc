"""The scripts behind the tables of docs/results.md, on runs of the entry scripts."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from utils.errors import run_command


def table(script: str, runs, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [script, "--runs", str(runs)])
    run_command(runpy.run_path(script, run_name="script_under_test")["main"])
    return capsys.readouterr().out


def test_ratio_curves_makes_what_is_missing(call, shell, trained, images, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path / "resnet.pth")
    (tmp_path / "quick.yaml").write_text("{mask_ratios: [0, 0.5], seeds: 2, min_block: 2, max_block: 8}")
    options = ["--config", tmp_path / "quick.yaml", "--data.path", images, "--data.workers", 0]
    resnet = ["--timm", "test_resnet", "--checkpoint", tmp_path / "resnet.pth"]
    for name, script, model in (
        ("MJP", "eval", ["--checkpoint", trained / "last.pt"]),
        ("MJP", "consistency", ["--checkpoint", trained / "last.pt"]),
        ("ResNet", "eval", resnet),
    ):
        assert call(f"{script}.py", *options, *model, "--output", tmp_path / "out" / name / script).status == 0
    settings = {"MODELS": f"MJP=anything ResNet=timm:test_resnet@{tmp_path / 'resnet.pth'}", "DATA": str(images)}
    settings |= {"OUT": str(tmp_path / "out"), "CONFIG": str(tmp_path / "quick.yaml")}
    outcome = shell("scripts/reproduce/ratio_curves.sh", "--data.workers", 0, **settings)
    assert outcome.status == 0, outcome.err
    assert "| consistency (%) | 0 | 0.5 |" in outcome.out and "| ResNet | 100.0 ± 0.0 | " in outcome.out
    made = {path.name for path in (tmp_path / "out" / "tables").iterdir()}
    assert {"accuracy.tex", "consistency.csv", "ratio_curves.png", "ratio_curves.pdf"} < made


def test_demo_curves(call, trained, images, tmp_path):
    options = ["--checkpoint", trained / "last.pt", "--data.path", images, "--mask_ratios", "0,0.5", "--seeds", 2]
    options += ["--data.workers", 0, "--min_block", 2, "--max_block", 8]
    for model in ("deit", "shuffle", "mjp"):
        for part in ("eval", "consistency"):
            assert call(f"{part}.py", *options, "--output", tmp_path / model / part).status == 0
    first, second = runpy.run_path("scripts/demo_report.py", run_name="script_under_test")["curves"](tmp_path)
    assert list(first["lines"]) == list(second["lines"]) == ["plain DeiT", "naive shuffle", "MJP"]
    assert second["lines"]["MJP"][1][0] == 100 and first["ylim"] == (0, 102)


def test_attack_table(call, images, tmp_path, monkeypatch, capsys):
    vit = [
        "--model",
        "vit",
        "--model_options.embed_dim",
        48,
        "--model_options.depth",
        1,
        "--model_options.num_heads",
        2,
    ]
    options = [*vit, "--model_options.patch_size", 8, "--image_size", 32, "--images", images / "val", "--num_images", 3]
    for seed in (0, 1):
        assert call("attack.py", *options, "--seed", seed, "--output", tmp_path / "block" / "0" / str(seed)).status == 0
    lines = table("scripts/attack_table.py", tmp_path, monkeypatch, capsys).splitlines()
    assert lines[2].startswith("| block | 0 | 6 | ") and any(" 100 ± 0 " in line for line in lines)
    monkeypatch.setattr(sys, "argv", ["", "--runs", str(tmp_path / "block" / "0" / "0"), "--number", "3", "--across",
                                      "--output", str(tmp_path / "across.jpg")])  # fmt: skip
    run_command(runpy.run_path("scripts/attack_figure.py", run_name="script_under_test")["main"])
    with Image.open(tmp_path / "across.jpg") as figure:
        assert figure.width > figure.height
    runs = [str(tmp_path / "block" / "0" / seed) for seed in "01"]
    monkeypatch.setattr(sys, "argv", ["", "--runs", *runs, "--batches", "--output", str(tmp_path / "batches.jpg")])
    run_command(runpy.run_path("scripts/attack_figure.py", run_name="script_under_test")["main"])
    with Image.open(tmp_path / "batches.jpg") as figure:
        assert figure.width < figure.height  # three columns, and two rows for each of two batches


def test_the_study_of_joint_continues_where_it_stopped(images, tmp_path, monkeypatch, capsys):
    def study(only: str, number: int = 1, folder: Path = images / "val") -> str:
        options = {
            "study": "clients",
            "images": folder,
            "number": number,
            "only": only,
            "output": tmp_path / "c.json",
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["", *words])
        run_command(runpy.run_path("scripts/joint_study.py", run_name="script_under_test")["main"])
        return capsys.readouterr().out

    assert study("clients 2 | steps 1").startswith("clients 2 | steps 1: ")
    first = json.loads((tmp_path / "c.json").read_text())["cells"]
    assert first["clients 2 | steps 1"]["leaks"] == 1 and first["clients 2 | steps 1"]["images"] == 2
    again = study("clients 2 | steps 1")
    assert again.startswith("| clients | ") and "clients 1 | steps 1: " in study("clients 1 | steps 1")
    assert json.loads((tmp_path / "c.json").read_text())["cells"].keys() == {
        "clients 1 | steps 1",
        "clients 2 | steps 1",
    }
    shutil.copytree(images / "val", tmp_path / "others")
    (tmp_path / "others" / "class_0" / "00.jpg").rename(tmp_path / "others" / "class_0" / "0.jpg")
    for other in ({"number": 2}, {"folder": tmp_path / "others"}):
        with pytest.raises(SystemExit):
            study("", **other)
        assert "is of another study, number or set of photographs" in capsys.readouterr().err
    held = json.loads((tmp_path / "c.json").read_text())
    held["cells"]["clients 1 | steps 1"]["options"]["ratio"] = 0.5  # as another version measured it
    (tmp_path / "c.json").write_text(json.dumps(held))
    with pytest.raises(SystemExit):
        study("clients 2 | steps 1")
    assert "has 'clients 1 | steps 1' with other options" in capsys.readouterr().err


def test_attackers_of_the_demo_are_drawn_side_by_side(tmp_path):
    summary = {key: {"mean": 50.0, "std": 1.0, "n": 2} for key in ("psnr", "psnr_visible", "psnr_masked")}
    for kind in ("originals", "reconstructions"):
        for folder in ("attack_0", "attack_0.27", "attack_0.5", "joint_0.27", "joint_0.5"):
            (tmp_path / "photographs" / folder / kind).mkdir(parents=True)
            (tmp_path / "photographs" / folder / kind / "0000_cat.png").write_bytes(b"")
    demo = runpy.run_path("scripts/demo_report.py", run_name="script_under_test")
    for attacker, ratios in (("attack", demo["RATIOS"]), ("joint", demo["AWARE"])):
        for ratio in ratios:
            folder = tmp_path / "photographs" / f"{attacker}_{ratio}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "results.json").write_text(json.dumps({"summary": summary}))
    panel, naive, aware = demo["privacy"](tmp_path)
    assert len(panel["lines"]) == 3 and (len(naive), len(aware)) == (len(demo["RATIOS"]), len(demo["AWARE"]))
    titles, rows = demo["photographs"](tmp_path)
    assert titles[2:4] == ["MJP 0.27, naive", "MJP 0.27, knows MJP"] and len(rows) == 1
    assert [path.parent.parent.name for path in rows[0]][2:] == ["attack_0.27", "joint_0.27", "attack_0.5", "joint_0.5"]


def test_other_files_among_runs_are_no_runs(tmp_path, monkeypatch, capsys):
    run = tmp_path / "name" / "0.5" / "0"
    run.mkdir(parents=True)
    for path, content in ((tmp_path / "name" / "notes.txt", "notes"), (run / "results.json", "{}")):
        path.write_text(content)
        with pytest.raises(SystemExit) as stop:
            table("scripts/attack_table.py", tmp_path, monkeypatch, capsys)
        says = "has no 'per_image'" if content == "{}" else "holds no results"
        assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("script", ["scripts/attack_table.py", "scripts/demo_report.py"])
def test_missing_runs_are_explained(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        table(script, tmp_path / "nothing", monkeypatch, capsys)
    assert stop.value.code == 2 and "does not exist" in capsys.readouterr().err


def test_hybrid_figures(call, images, tmp_path, monkeypatch, capsys):
    options = ["--model_options.num_classes", 10, "--image_size", 32, "--images", images / "val", "--num_images", 2]
    for folder, attack in (("index/rgap", "rgap"), ("index/hybrid", "hybrid"), ("compare/rgap", "rgap")):
        own = ["--attack", attack, *(["--attack_options.iterations", 2] if attack == "hybrid" else [])]
        run = tmp_path / "runs" / folder / "cnn2_c2"
        assert call("attack.py", "--model", "cnn2_c2", *own, *options, "--output", run).status == 0
    monkeypatch.setattr(sys, "argv", ["", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "figures")])
    run_command(runpy.run_path("scripts/hybrid_figures.py", run_name="script_under_test")["main"])
    assert "| `cnn2_c2` | -1470 | " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "hybrid_index.json",
        "hybrid_index.png",
        "hybrid_comparison.jpg",
    }
    kept = [
        {"name": name, "index": -1.0, "rgap": {"psnr": {"mean": 7.0, "std": 1.0, "n": 3}}}
        for name in ("cnn2_c2", "own")
    ]
    (tmp_path / "kept.json").write_text(json.dumps({"rows": kept}))
    (tmp_path / "runs" / "compare").rename(tmp_path / "compare")  # not needed beside rows of an earlier run
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "second"), "--kept", str(tmp_path / "kept.json")])
    run_command(runpy.run_path("scripts/hybrid_figures.py", run_name="script_under_test")["main"])
    assert "| `own` | -1 | 7.0 ± 1.0 | 55.1 | 3 | – |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "second" / "hybrid_index.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["own", "cnn2_c2"] and rows[1]["index"] == -1470
    assert not (tmp_path / "second" / "hybrid_comparison.jpg").exists()


def test_ablation_table_and_verdicts(tmp_path, monkeypatch, capsys):
    """Two variants, two seeds: means over seeds, and what counts as a difference."""
    attacks = {"plain": ("closed_form", "mjp_aware"), "no_positions": ("token_span",)}
    for name, accuracies in {"plain": (80, 82), "no_positions": (70, 71)}.items():
        for seed, accuracy in enumerate(accuracies):
            run, ratios = tmp_path / name / str(seed), (0, 0.3, 0.5, 0.9)
            attack = {key: {"mean": 20.0 + seed, "std": 1.0, "n": 3} for key in ("psnr", "psnr_visible")}
            attack |= {"patches_recovered": {"mean": 50.0}, "psnr_baseline": {"mean": 12.0}}
            contents = {
                ".": {},
                "eval": {"accuracy": [{"mask_ratio": ratio, "acc1": accuracy} for ratio in ratios]},
                "consistency": {"consistency": [{"mask_ratio": ratio, "consistency": 90.0} for ratio in ratios]},
                **dict.fromkeys(attacks[name], {"summary": attack}),
            }
            for folder, content in contents.items():
                (run / folder).mkdir(parents=True, exist_ok=True)
                (run / folder / "results.json").write_text(json.dumps(content))
    script = runpy.run_path("scripts/ablation_table.py", run_name="script_under_test")
    monkeypatch.setattr(
        sys, "argv", ["ablation_table.py", "--runs", str(tmp_path), "--output", str(tmp_path / "table")]
    )
    run_command(script["main"])
    assert "| plain | 2 | 81.0 ± 1.4 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "table.json").read_text())["variants"]
    assert found["no_positions"]["adaptive"]["values"] == [20.0, 21.0] and found["plain"]["acc1_0"]["mean"] == 81.0
    better = runpy.run_path("scripts/claims.py", run_name="script_under_test")["better"]
    plain, none = (found[name]["acc1_0"] for name in ("plain", "no_positions"))
    assert (
        better(plain, none) == "holds" and better(none, plain) == "does not hold"
    )  # 10.5 points, 95 % interval +- 6.9
    assert better(plain, plain) == "not decided at this scale" and better(none, plain, margin=20.0) == "holds"


def test_the_claims_are_those_of_the_committed_results():
    page = runpy.run_path("scripts/results_page.py", run_name="script_under_test")
    for name, (file, _) in page["PARTS"].items():
        assert page["rewritten"](name) == file.read_text(), f"{file} is out of date: python scripts/results_page.py"


def test_claims_of_other_files_are_printed_with_their_gaps(tmp_path, capsys, monkeypatch):
    """As scripts/reproduce/claims.sh ends: what was not run is said, and the pages stay as they are."""
    shutil.copy("docs/results/mechanism.json", tmp_path)
    page = runpy.run_path("scripts/results_page.py", run_name="script_under_test")
    before = [file.read_text() for file, _ in page["PARTS"].values()]
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--files", str(tmp_path)])
    monkeypatch.setattr(page["evidence"], "FILES", page["evidence"].FILES)  # which the script changes
    run_command(page["main"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert len(lines) == sum(len(group) for group in page["evidence"].CLAIMS.values())
    ready = [line for line in lines if ": not run.**" not in line]
    assert len(ready) == 2 and all("scripts/mechanism.py" in line for line in ready)
    assert [file.read_text() for file, _ in page["PARTS"].values()] == before
