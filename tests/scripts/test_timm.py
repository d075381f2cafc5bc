"""eval.py and consistency.py on models of timm: the numbers of a plain loop over timm's own transform and model."""

import json

import pytest
import timm
import torch
from PIL import Image
from skimage import data as photographs
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

SYNSETS = ImageNetInfo().label_names()


def plain_loop(name: str, seed: int, files: list) -> torch.Tensor:
    """Logits of a timm model with random weights, one photograph at a time, as timm's documentation does it."""
    torch.manual_seed(seed)
    network = timm.create_model(name).eval()
    transform = create_transform(**resolve_model_data_config(network), is_training=False)
    with torch.no_grad():
        return torch.cat([network(transform(Image.open(file).convert("RGB"))[None]) for file in files])


@pytest.fixture
def imagenet(tmp_path):
    """Photographs in class folders named like ImageNet's; imagenet(labels) puts each under the class of that number."""

    def write(labels: list[int]) -> list:
        files = []
        for number, label in enumerate(labels):
            image = Image.fromarray((photographs.astronaut, photographs.coffee, photographs.cat)[number % 3]())
            folder = tmp_path / "set" / "val" / SYNSETS[label]
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{number}.jpg")
            image.crop((20 * number, 0, image.width, image.height - 10 * number)).save(files[-1])
        return files

    return write


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_mambaout"])
def test_accuracy_equals_a_plain_loop(call, imagenet, tmp_path, name):
    guesses = plain_loop(name, 3, imagenet([0] * 6)).argmax(1).tolist()
    labels = [guess if number % 2 else number for number, guess in enumerate(guesses)]  # half of them right
    for file in (tmp_path / "set").rglob("*.jpg"):
        file.unlink()
    (tmp_path / "set" / "val" / SYNSETS[0]).rmdir()
    logits = plain_loop(name, 3, imagenet(labels))
    options = ["--data.path", tmp_path / "set", "--data.workers", 0, "--seed", 3, "--output", tmp_path / "run"]
    outcome = call("eval.py", "--timm", name, *options)
    assert outcome.status == 0, outcome.err
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())["accuracy"]
    right = logits.argmax(1) == torch.tensor(labels)
    assert row["acc1"] == 100 * right.double().mean().item() and 0 < row["acc1"] < 100
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_consistency_of_a_convolutional_network(call, imagenet, tmp_path):
    imagenet([5, 5, 7, 9])
    options = ["--data.path", tmp_path / "set", "--data.workers", 0, "--output", tmp_path / "run"]
    outcome = call("consistency.py", "--timm", "test_resnet", "--mask_ratios", "0,0.5,0.9", "--seeds", 2, *options)
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["consistency"]
    assert [row["mask_ratio"] for row in rows] == [0, 0.5, 0.9]
    assert rows[0]["consistency"] == 100 and rows[0]["diff_norm"] == 0
    assert 0 < rows[1]["diff_norm"] < rows[2]["diff_norm"]
    for row in rows:
        assert row["patch_size"] == 16 and row["seeds"] == 2
        assert row["consistency_low"] <= row["consistency"] <= row["consistency_high"] <= 100
        assert row["diff_norm_low"] <= row["diff_norm"] <= row["diff_norm_high"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--checkpoint FILE", "--timm NAME"]),
        (["--timm", "mixer_b16_22"], ["unknown timm model", "did you mean 'mixer_b16_224'"]),
        (["--timm", "test_vit", "--ema"], ["--ema must be left out with --timm"]),
        (["--checkpoint", "f", "--pretrained"], ["--pretrained must be used with --timm"]),
        (["--timm", "test_vit", "--checkpoint", "/no/such.pth"], ["'/no/such.pth' does not exist"]),
        (["--timm", "test_vit", "--patch_size", "7", "--mask_ratios", "0.5"], ["160 pixels", "patches of 7"]),
        (["--timm", "test_resnet", "--suite", "position"], ["has no position embeddings to study"]),
        (["--timm", "test_resnet", "--suite", "attention"], ["has no class token"]),
    ],
)
def test_wrong_options_end_in_one_line(call, imagenet, tmp_path, options, words):
    imagenet([0])
    outcome = call("eval.py", *options, "--data.path", tmp_path / "set", "--output", tmp_path / "run")
    assert outcome.status == 2
    line = outcome.err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line


def test_pretrained_weights_need_a_network_or_a_file(call, imagenet, tmp_path, monkeypatch):
    imagenet([0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    options = ["--data.path", tmp_path / "set", "--output", tmp_path / "run"]
    outcome = call("eval.py", "--timm", "test_vit", "--pretrained", *options)
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and "cannot get the pretrained weights of timm model 'test_vit'" in line
    assert "--checkpoint FILE" in line


@pytest.mark.parametrize("suite", ["position", "attention"])
def test_suites_of_vits_take_those_of_timm(call, imagenet, tmp_path, suite):
    imagenet([0, 1])
    options = ["--suite", suite, "--mask_ratios", "0.5", "--limit", 1] if suite == "attention" else []
    options += ["--data.path", tmp_path / "set", "--data.workers", 0, "--output", tmp_path / "run"]
    outcome = call("eval.py", "--timm", "test_vit", "--suite", suite, *options)
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "run" / "results.json").read_text())[suite]
    figures = sorted(path.suffix for path in (tmp_path / "run" / "figures").iterdir())
    assert figures.count(".png") == figures.count(".pdf") > 0
