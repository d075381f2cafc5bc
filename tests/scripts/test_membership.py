"""membership.py from the command line: simulated clients, a leak file, and wrong inputs in one line."""

import json

import pytest
import torch

from data.demo import write_photographs
from data.images import list_images, read_images
from leak_file import save
from membership import main
from models import build_model
from options import MembershipConfig

VIT = ["--model", "vit", "--image_size", 16, "--model_options.patch_size", 8, "--model_options.embed_dim", 32,
       "--model_options.depth", 1, "--model_options.num_heads", 2, "--model_options.num_classes", 3]  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    write_photographs(tmp_path / "own", side=32)
    return tmp_path / "own"


def test_simulated_clients_and_leak_files_are_asked(call, tmp_path, pictures):
    known = ["--others", pictures, "--false_positives", 0.5]
    outcome = call("membership.py", *VIT, "--share", "head", "--batch_size", 2, "--images", pictures, "--num_images", 2,
                   *known, "--output", tmp_path / "run")  # fmt: skip
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["membership"]["called_members"] == found["membership"]["asked"] == 2
    assert found["leaks"][0]["layer"] == "head" and found["per_image"][0]["distance"] < 1e-3
    model = build_model("vit", image_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    torch.nn.functional.cross_entropy(model(torch.rand(1, 3, 16, 16)), torch.tensor([1])).backward()
    save(tmp_path / "step.safetensors", model, before=model, batch_size=1, image_shape=(3, 16, 16), mean=0.5, std=0.5)
    outcome = call("membership.py", *VIT, "--leak", tmp_path / "step.safetensors", "--candidates", pictures, *known,
                   "--output", tmp_path / "leak")  # fmt: skip
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "leak" / "results.json").read_text())["per_image"]
    assert all(row["distance"] > 1e-3 for row in rows)  # random pixels were in the step, and no photograph


def test_pictures_are_normalised_as_the_leak_says(call, tmp_path, pictures):
    """The model has no mean and std of its own, and those of ImageNet would put the member outside the span."""
    model = build_model("vit", image_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3).eval()
    member = read_images(list_images(str(pictures))[:1], 16, (0.2,) * 3, (0.6,) * 3)
    torch.nn.functional.cross_entropy(model(member), torch.tensor([1])).backward()
    save(tmp_path / "step.safetensors", model, before=model, batch_size=1, image_shape=(3, 16, 16), mean=0.2, std=0.6)
    outcome = call("membership.py", *VIT, "--leak", tmp_path / "step.safetensors", "--candidates", pictures, "--others",
                   pictures, "--false_positives", 0.5, "--output", tmp_path / "leak")  # fmt: skip
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "leak" / "results.json").read_text())["per_image"]
    assert rows[0]["distance"] < 1e-3 < min(row["distance"] for row in rows[1:])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--false_positives", 0.001], "cannot show a false positive rate of 0.001"),
        (["--false_positives", 2], "--false_positives must be between 0 and 1"),
        (["--layer", "haed"], "did you mean 'head'"),
        (["--audit", "true"], "--audit must be left out"),
        (["--attack", "joint"], "--attack must be left out: it is of attack.py, got joint"),
        (["--lpips", "alex"], "--lpips must be left out: it is of attack.py"),
        (["--data.kind", "text"], "--data.kind must be image"),
        (["--others", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(call, tmp_path, pictures, options, words):
    given = ["--others", pictures] if "--others" not in options else []
    outcome = call("membership.py", *VIT, "--share", "head", "--images", pictures, "--num_images", 1, *given, *options,
                   "--output", tmp_path / "run")  # fmt: skip
    assert outcome.status == 2 and words in outcome.err and outcome.err.strip().count("\n") == 0
    assert not (tmp_path / "run" / "results.json").exists()


def test_help_lists_no_option_that_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--help-all"])
    text = capsys.readouterr().out
    assert "--false_positives" in text and "--batch_size" in text
    assert not any(f"--{name} " in text for name in MembershipConfig.idle)
