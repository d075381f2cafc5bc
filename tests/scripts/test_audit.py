"""audit.py: the page of attack.py --audit by a script of its own, and a model that was received."""

import json
import re
import time

import pytest
import torch

from models import build_model
from models.checkpoints import save_checkpoint

MODEL = ["--model_options.embed_dim", 24, "--model_options.depth", 1, "--model_options.num_heads", 3]
MODEL = ["--model", "vit", *MODEL, "--model_options.patch_size", 16, "--image_size", 32]


def test_it_measures_what_attack_audit_does(call, tmp_path, images, monkeypatch):
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)  # no time to match gradients in
    found = []
    for script, output in ((["audit.py"], "own"), (["attack.py", "--audit"], "alias")):
        outcome = call(*script, *MODEL, "--images", images / "val", "--output", tmp_path / output)
        assert outcome.status == 0, outcome.err
        audit = json.loads((tmp_path / output / "results.json").read_text())["audit"]
        found.append([(row["attack"], row["psnr"]) for row in audit["attacks"]])
        mjp = next(line["strength"] for line in audit["defenses"] if line["defense"] == "MJP")
        assert "masks drawn hide no patch" in mjp  # blocks of 8 do not fit into 4 patches
        assert (tmp_path / output / "audit.html").exists()
    assert found[0] == found[1]


def test_what_takes_longer_than_the_time_of_an_audit_is_stopped_and_named(call, tmp_path, images, monkeypatch):
    """Class features too: one may take minutes where the classifier is wide."""

    def forever(leak, generator):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr("campaigns.audit_subject.recover_class_features", forever)
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)
    given = ["--images", images / "val", "--minutes", 0.05, "--output", tmp_path / "run"]
    outcome = call("audit.py", *MODEL, *given)
    assert outcome.status == 0, outcome.err
    audit = json.loads((tmp_path / "run" / "results.json").read_text())["audit"]
    assert audit["features"] == [] and any("class features" in cut for cut in audit["cut"])


def test_a_model_of_attributes_is_audited_by_its_own_loss(call, tmp_path, images, monkeypatch):
    """Rules for one class an image say nothing of it; each attribute stands in the sign of its bias."""
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)
    sizes = {"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": 16, "image_size": 32}
    model = build_model("vit", num_classes=5, **sizes)
    content = {"arguments": model.arguments, "model": model.state_dict(), "loss": "bce"}
    save_checkpoint(tmp_path / "model.pt", content)
    given = ["--checkpoint", tmp_path / "model.pt", "--images", images / "val", "--output", tmp_path / "run"]
    outcome = call("audit.py", *given)
    assert outcome.status == 0, outcome.err
    audit = json.loads((tmp_path / "run" / "results.json").read_text())["audit"]
    assert [(row["images"], row["rule"], row["read"]["mean"]) for row in audit["labels"]][0] == (1, "attributes", 100)
    assert all(row["open"] is None and "attributes" in row["why"] for row in audit["features"])
    why = {row["attack"]: row["why"] for row in audit["attacks"]}
    assert not any("'bce', and the client's loss is 'cross_entropy'" in line for line in why.values())
    assert why["class_features"].startswith("rests on the softmax")


def test_clients_that_share_no_positions_tell_no_mask(call, tmp_path, images, monkeypatch):
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)
    given = ["--share", "head", "--images", images / "val", "--output", tmp_path / "run"]
    outcome = call("attack.py", "--audit", *MODEL, *given)
    assert outcome.status == 0, outcome.err
    audit = json.loads((tmp_path / "run" / "results.json").read_text())["audit"]
    measured = {row["attack"] for row in audit["attacks"] if row["psnr"]["n"]}
    assert audit["mask"] is None and not measured & {"closed_form", "token_span", "april", "rgap"}
    assert "frozen" in (tmp_path / "run" / "audit.html").read_text()


def test_without_positions_the_joint_attack_is_measured(call, tmp_path, images, monkeypatch):
    """It is the closed form again only where that applies."""
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)
    monkeypatch.setattr("campaigns.audit.DEFENSES", ())
    for positions in ("none", "learned"):
        given = ["--model_options.positions", positions, "--images", images / "val", "--dtype", "float64"]
        given += ["--model_options.depth", 2]  # joint needs two blocks
        outcome = call("audit.py", *MODEL, *given, "--output", tmp_path / positions)
        assert outcome.status == 0, outcome.err
        audit = json.loads((tmp_path / positions / "results.json").read_text())["audit"]
        row = next(row for row in audit["attacks"] if row["attack"] == "joint")
        assert (row["psnr"]["n"] > 0) == (positions == "none"), row
        assert audit["shapes"]["places"] == ("open" if positions == "none" else "told")
    assert row["why"] == "without a mask it is the closed form"


def test_the_page_repeats_the_options_of_its_victim(call, tmp_path, images, monkeypatch):
    """Copied from the page, a command attacks this victim and no other."""
    monkeypatch.setattr("campaigns.audit.BUDGET", 1e6)
    monkeypatch.setattr("campaigns.audit.DEFENSES", ())
    given = ["--mask_ratio", 0.5, "--min_block", 1, "--share", "without_positions", "--images", images / "val"]
    outcome = call("attack.py", "--audit", *MODEL, *given, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "run" / "audit.html").read_text()
    *attacked, leaks = re.findall(r"<code>python attack.py ([^<]*)</code>", page)[-4:-1]
    for command in attacked:
        assert "--model vit --image_size 32 --model_options.embed_dim 24" in command
        assert "--mask_ratio 0.5 --min_block 1 --share without_positions" in command
    assert "--model_options.unknown true --share" in leaks and "mask_ratio" not in leaks


@pytest.fixture
def checkpoints(tmp_path) -> list:
    """A small ViT with biases, the same after an honest step, and one whose rows all point where one does."""
    model = build_model("vit", seed=0, image_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3, num_classes=4)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.copy_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
    files = [tmp_path / name for name in ("before.pt", "honest.pt", "tampered.pt")]
    for file in files:
        if file.name == "honest.pt":
            with torch.no_grad():
                for value in model.parameters():
                    value.add_(1e-4 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        elif file.name == "tampered.pt":
            with torch.no_grad():
                weight = dict(model.named_parameters())["blocks.0.mlp.fc1.weight"]
                weight.copy_(weight[:1].expand_as(weight))
        save_checkpoint(file, {"model": model.state_dict(), "arguments": model.arguments})
    return files


@pytest.mark.parametrize("received, verdict", [(1, "looks honest"), (2, "tampered with")])
def test_a_received_model_is_checked(call, checkpoints, tmp_path, received, verdict):
    given = ["--check", checkpoints[received], "--reference", checkpoints[0], "--output", tmp_path / "run"]
    outcome = call("audit.py", *given)
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["check"]["verdict"] == verdict
    assert f"verdict: {verdict}" in outcome.out


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "give the victim as --model NAME or as --checkpoint FILE"),
        (["--check", "a.pt"], "--check, --reference must be given together"),
        (["--check", "a.pt", "--reference", "b.pt", "--model", "vit"], "left out with --check"),
        (["--check", "a.pt", "--reference", "b.pt"], "a.pt"),
        (["--model", "text_small"], "by attack.py, with --data.kind text, got text_small"),
        (["--model", "vit", "--mask_ratio", 2], "--mask_ratio must be between 0 and 1"),
        (["--model", "vit", "--attack", "dlg"], "--attack"),
    ],
)
def test_what_does_not_go_is_one_line(call, tmp_path, options, words):
    outcome = call("audit.py", *options, "--output", tmp_path / "run")
    assert outcome.status == 2 and words in outcome.err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("withhold", "pos_embed"),
        ("local_steps", 3),
        ("defense", "noise"),
        ("train_mode", "true"),
        ("label_flip", "true"),
        ("attack", "joint"),
        ("lpips", "alex"),
    ],
)
def test_an_audit_is_not_asked_about_another_step_than_it_measures(call, tmp_path, option):
    outcome = call("attack.py", "--audit", *MODEL, f"--{option[0]}", option[1], "--output", tmp_path / "run")
    words = f"--{option[0]} must be left out with --audit"
    assert outcome.status == 2 and words in outcome.err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
