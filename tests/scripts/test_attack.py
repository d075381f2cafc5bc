"""attack.py: what it writes, for named and for trained victims."""

import csv
import json
import re

import pytest
import torch
from PIL import Image
from torchvision.models import squeezenet1_1

NAMES = {
    "run.json",
    "config.yaml",
    "environment.json",
    "log.txt",
    "results.json",
    "per_image.csv",
    "report.html",
    "originals",
    "reconstructions",
}
VIT = ["--model", "vit", "--model_options.embed_dim", 48, "--model_options.depth", 2, "--model_options.num_heads", 3]
SMALL = [*VIT, "--model_options.patch_size", 8, "--image_size", 32, "--min_block", 2, "--max_block", 8]


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_plain_victim_is_reconstructed_and_reported(call, images, tmp_path):
    outcome = call("attack.py", *SMALL, "--images", images / "val", "--num_images", 5, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert {path.name for path in (tmp_path / "run").iterdir()} == NAMES
    found = results(tmp_path / "run")
    assert found["summary"]["psnr"]["n"] == 5 and found["summary"]["psnr"]["mean"] > 80
    assert found["summary"]["exact_pixels"]["mean"] == 100
    assert all(row["exact"] and row["hidden"] == 0 for row in found["per_image"])
    with open(tmp_path / "run" / "per_image.csv") as file:
        assert [float(row["psnr"]) for row in csv.DictReader(file)] == [row["psnr"] for row in found["per_image"]]
    originals, copies = (sorted((tmp_path / "run" / kind).iterdir()) for kind in ("originals", "reconstructions"))
    assert [path.name for path in originals] == [path.name for path in copies]
    for one, other in zip(originals, copies, strict=True):
        assert Image.open(one).tobytes() == Image.open(other).tobytes()


def test_report_is_self_contained(call, images, tmp_path):
    call("attack.py", *SMALL, "--images", images / "val", "--num_images", 3, "--output", tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<img") == 1 + 2 * 3 * 3  # the histogram; original, reconstruction and error, above and below
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_mask_breaks_the_equations(call, images, tmp_path):
    options = [*SMALL, "--images", images / "val", "--num_images", 5]
    for ratio in (0, 0.5):
        assert call("attack.py", *options, "--mask_ratio", ratio, "--output", tmp_path / str(ratio)).status == 0
    plain, masked = (results(tmp_path / ratio) for ratio in ("0", "0.5"))
    assert masked["summary"]["psnr_visible"]["mean"] < plain["summary"]["psnr_visible"]["mean"] - 30
    assert all(row["hidden"] > 0 and not row["exact"] for row in masked["per_image"])


def test_naive_shuffle_hides_only_the_order(call, images, tmp_path):
    options = [*SMALL, "--images", images / "val", "--num_images", 5, "--mask_ratio", 0.5]
    outcome = call("attack.py", *options, "--model_options.unknown", "false", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    summary = results(tmp_path / "run")["summary"]
    assert summary["psnr_shown"]["mean"] > 80 and summary["psnr"]["mean"] < 30


@pytest.mark.parametrize(
    "options", [[], ["--dtype", "float64"], ["--defense", "noise", "--defense_options.std", "1e-2"]]
)
def test_trained_checkpoint(call, trained, images, tmp_path, options):
    command = ["--checkpoint", trained / "last.pt", "--images", images / "val", "--num_images", 4, *options]
    assert call("attack.py", *command, "--output", tmp_path / "run").status == 0
    found = results(tmp_path / "run")
    assert [row["label"] for row in found["per_image"]] == [0, 1, 2, 3]
    expected = {0: (60, 500), 2: (150, 500), 4: (-20, 30)}[len(options)]
    assert expected[0] < found["summary"]["psnr"]["mean"] < expected[1]


def test_batches_are_mixed_and_say_so(call, images, tmp_path):
    options = [*SMALL, "--images", images / "val", "--num_images", 5, "--batch_size", 2]
    refused = call("attack.py", *options, "--output", tmp_path / "run")
    assert refused.status == 2 and "sum over 2 images" in refused.out and not (tmp_path / "run").exists()
    options += ["--attack_options.underdetermined", "true"]
    assert call("attack.py", *options, "--output", tmp_path / "run").status == 0
    assert [row["exact"] for row in results(tmp_path / "run")["per_image"]] == [False] * 4 + [True]


LENET = ["--model", "lenet", "--model_options.num_classes", 10, "--image_size", 32]


def test_optimisation_attacks_follow_the_threat_model(call, images, tmp_path):
    """FedAvg on a batch, hidden labels, a withheld gradient, the knowledge of MJP and the watch, in one script."""
    options = [*LENET, "--attack", "inverting_gradients", "--attack_options.iterations", 3, "--attack_options.tv", 0.01]
    terms = ["--batch_size", 2, "--local_steps", 2, "--local_batch_size", 1, "--local_lr", 0.01, "--labels", "hidden"]
    more = ["--withhold", "body.0.bias", "--watch_every", 2, "--images", images / "val", "--num_images", 4]
    more += ["--partition", "class"]
    outcome = call("attack.py", *options, *terms, *more, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    found = results(tmp_path / "run")
    assert all(row["iterations"] == 3 for row in found["per_image"])
    assert found["summary"]["label_found"]["n"] == 4 and found["summary"]["success"]["threshold"] == 25
    assert found["threat_model"]["withheld"] == "body.0.bias" and "2 SGD steps" in found["threat_model"]["shared"]
    labels = [row["label"] for row in found["per_image"]]
    assert labels[0::2] == labels[1::2] and found["threat_model"]["images"] == "of one class for each client"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(steps) == [0, 0, 2, 2]


def test_results_do_not_depend_on_who_is_attacked_together(call, images, tmp_path):
    """Four victims at once, one by one, and as many as fit: the same reconstructions up to rounding."""
    options = [*LENET, "--attack", "inverting_gradients", "--attack_options.iterations", 4, "--attack_options.signed"]
    options += ["none", "--dtype", "float64", "--images", images / "val", "--num_images", 4, "--device", "cpu"]
    for together in (4, 1, "auto"):
        command = [*options, "--victims_at_once", together, "--output", tmp_path / str(together)]
        outcome = call("attack.py", *command)
        assert outcome.status == 0, outcome.err
    assert re.search(r"4 victims at once, [\d.]+ MB each, [\d.]+ GB free", outcome.out)
    four, *others = ([row["mse"] for row in results(tmp_path / name)["per_image"]] for name in ("4", "1", "auto"))
    for other in others:
        assert other == pytest.approx(four, rel=1e-9)


@pytest.mark.parametrize("attack", ["modern", "dlg"])
def test_victims_that_fit_are_found_for_attacks_with_hooks_and_histories(call, images, tmp_path, attack):
    options = [*LENET, "--attack", attack, "--attack_options.iterations", 1, "--images", images / "val"]
    more = ["--num_images", 2, "--victims_at_once", "auto", "--device", "cpu", "--output", tmp_path / "run"]
    outcome = call("attack.py", *options, *more)
    assert outcome.status == 0 and "2 victims at once, " in outcome.out, outcome.err


def test_nothing_is_measured_where_more_victims_at_once_gain_nothing(call, images, tmp_path):
    options = [*SMALL, "--images", images / "val", "--num_images", 2, "--victims_at_once", "auto"]
    outcome = call("attack.py", *options, "--output", tmp_path / "run")
    assert outcome.status == 0 and "1 victim at a time: this attack, or a network of this size" in outcome.out


def test_lpips_is_scored_with_a_trunk_from_a_file(call, images, tmp_path):
    trunk = tmp_path / "squeezenet.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), trunk)
    options = ["--images", images / "val", "--num_images", 1, "--lpips", "squeeze", "--lpips_trunk", trunk]
    outcome = call("attack.py", *SMALL, *options, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert results(tmp_path / "run")["per_image"][0]["lpips_squeeze_unverified"] == pytest.approx(0, abs=1e-6)


CHAIN = ["--model_options.num_classes", 10, "--image_size", 16, "--mean", "0.5,0.5,0.5", "--std", "1,1,1", "--seed", 10]


def test_the_hybrid_says_what_every_layer_gave(call, images, tmp_path):
    options = [
        "--attack",
        "hybrid",
        "--model",
        "cnn3_c2",
        *CHAIN,
        "--labels",
        "hidden",
        "--attack_options.iterations",
        5,
    ]
    more = ["--attack_options.deeper_iterations", 4, "--images", images / "val", "--num_images", 2]
    outcome = call("attack.py", *options, *more, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    found = results(tmp_path / "run")
    for row in found["per_image"]:
        assert not row["exact"] and row["label_found"] == 100
        for layer in ("body.0", "body.2"):
            assert 0 < row[f"{layer}.rank"] < row[f"{layer}.unknowns"] and row[f"{layer}.condition"] >= 1
            assert row[f"{layer}.residual"] >= 0 and row[f"{layer}.seconds"] > 0 and row[f"{layer}.saturated"] >= 0


def test_the_security_metric_needs_no_images(call, tmp_path):
    chain = ["--attack", "hybrid", "--metric_only", "--model", "cnn2_c2", "--model_options.num_classes", 10]
    outcome = call("attack.py", *chain, "--image_size", 32, "--output", tmp_path / "chain")
    assert outcome.status == 0 and "index -1470" in outcome.out
    assert results(tmp_path / "chain")["security"]["layers"][0]["rank"] == 1602
    outcome = call("attack.py", *SMALL, "--metric_only", "--mask_ratio", 0.5, "--output", tmp_path / "vit")
    assert outcome.status == 0 and "7 of 192 numbers open per visible patch" in outcome.out
    exact = {row["attack"] for row in results(tmp_path / "vit")["security"]["attacks"] if row["exact"]}
    assert exact == {"mjp_aware", "joint"}
