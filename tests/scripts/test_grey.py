"""Grey images end to end: a data set of one channel is trained on, attacked and reported."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data.folders import open_dataset
from models import build_model
from models.checkpoints import load_model, save_checkpoint
from tests.attacks.small_victims import generator

SHORT = ["--optim.epochs", 1, "--optim.warmup_epochs", 0, "--optim.mixup", 0, "--optim.cutmix", 0]
SHORT += ["--augment.repeats", 1, "--data.workers", 0, "--data.batch_size", 6, "--data.image_size", 32]


@pytest.fixture
def fashion(tmp_path) -> str:
    """Fashion-MNIST in its published form, cut down to 20 and 10 pictures."""
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for split, number in (("train", 20), ("t10k", 10)):
        pixels = np.random.default_rng(number).integers(0, 256, (number, 28, 28), dtype=np.uint8)
        images = struct.pack(">IIII", 2051, number, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 2049, number) + bytes(place % 10 for place in range(number))
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{split}-{kind}-ubyte").write_bytes(content)
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return str(tmp_path / "data")


def attack_report(call, checkpoint, images, output, *options) -> dict:
    outcome = call("attack.py", "--checkpoint", checkpoint, "--images", images, "--output", output, *options)
    assert outcome.status == 0, outcome.err
    assert (output / "report.html").read_text().count("<img") >= 3
    for kind in ("originals", "reconstructions"):
        for file in sorted((output / kind).glob("*.png")):
            with Image.open(file) as image:
                assert image.mode == "L"
    return json.loads((output / "results.json").read_text())


def test_fashion_mnist_is_trained_on_evaluated_and_attacked(call, fashion, tmp_path):
    data = ["--data.dataset", "fashion_mnist", "--data.path", fashion]
    outcome = call("train.py", *data, *SHORT, "--model.name", "lenet", "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    model = load_model(tmp_path / "run" / "last.pt")
    assert model.arguments["in_chans"] == 1 and model.body[0].in_channels == 1
    assert model.normalize == {"mean": (0.1307,), "std": (0.3081,)}
    options = ["--checkpoint", tmp_path / "run" / "last.pt", *data, "--data.workers", 0, "--data.image_size", 32]
    assert call("eval.py", *options, "--output", tmp_path / "eval").status == 0
    picture, label = open_dataset("fashion_mnist", fashion, "val")[3]
    assert (picture.mode, label) == ("RGB", 3)
    (tmp_path / "private" / "3").mkdir(parents=True)
    picture.convert("L").resize((32, 32)).save(tmp_path / "private" / "3" / "a.png")
    found = attack_report(
        call, tmp_path / "run" / "last.pt", tmp_path / "private", tmp_path / "attack",
        "--attack", "idlg", "--attack_options.iterations", 30, "--labels", "hidden",
    )  # fmt: skip
    assert found["per_image"][0]["psnr"] > 0 and "ssim" in found["summary"]


@pytest.fixture
def grey_vit(tmp_path) -> str:
    model = build_model("vit", image_size=12, patch_size=4, embed_dim=48, depth=1, num_heads=3, num_classes=5,
                        in_chans=1)  # fmt: skip
    about = {"normalize": {"mean": (0.4,), "std": (0.2,)}, "classes": None}
    save_checkpoint(tmp_path / "vit.pt", {"arguments": model.arguments, "model": model.state_dict(), **about})
    return str(tmp_path / "vit.pt")


@pytest.fixture
def pictures(tmp_path):
    for label in range(2):
        (tmp_path / "grey" / str(label)).mkdir(parents=True)
        pixels = torch.rand(12, 12, generator=generator(label)) * 255
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / "grey" / str(label) / "a.png")
    return tmp_path / "grey"


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["--attack", "closed_form"], 60),
        (["--attack", "inverting_gradients", "--attack_options.iterations", 20], 5),
        (["--attack", "ats_aware", "--defense", "ats", "--attack_options.base", "closed_form"], 5),
        (["--attack", "gradvit", "--attack_options.iterations", 5, "--attack_options.image_prior", 0], 0),
    ],
)
def test_attacks_and_reports_on_grey_images(call, grey_vit, pictures, tmp_path, options, least):
    found = attack_report(call, grey_vit, pictures, tmp_path / "attack", *options)
    assert found["summary"]["psnr"]["mean"] > least


def test_an_audit_of_a_grey_model(call, grey_vit, tmp_path):
    short = ["--minutes", 0.2]
    outcome = call("attack.py", "--audit", *short, "--checkpoint", grey_vit, "--output", tmp_path / "audit")
    assert outcome.status == 0, outcome.err
    assert "12 x 12 pixels, 144 values" in (tmp_path / "audit" / "audit.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.channels", 1, "--data.mean", "0.5,0.5,0.5"], "give one number"),
        (["--data.channels", 1, "--augment.where", "device"], "--augment.where loader for grey images"),
        (["--data.mean", "0.5,0.5"], "one number, or one for each of 3 channels"),
    ],
)
def test_what_does_not_go_with_grey_is_refused(call, images, tmp_path, options, words):
    outcome = call("train.py", "--data.path", images, *SHORT, *options, "--output", tmp_path / "run")
    assert outcome.status == 2 and words in outcome.err, outcome.err


def test_a_folder_can_be_trained_on_in_grey(call, tiny, images, tmp_path):
    grey = ["--data.channels", 1, "--data.mean", 0.5, "--data.std", 0.25, "--optim.epochs", 2]
    outcome = call("train.py", *tiny, *grey, "--output", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    model = load_model(tmp_path / "run" / "last.pt")
    assert model.patch_embed.proj.in_channels == 1 and model.normalize == {"mean": (0.5,), "std": (0.25,)}
    options = ["--checkpoint", tmp_path / "run" / "last.pt", "--data.path", images, "--data.workers", 0]
    for number, more in enumerate((["--suite", "attention", "--limit", 2], ["--mask_ratios", "0.5"])):
        outcome = call("eval.py", *options, *more, "--output", tmp_path / str(number))
        assert outcome.status == 0, outcome.err
    outcome = call("eval.py", *options, "--data.mean", "0.1,0.2,0.3", "--output", tmp_path / "wrong")
    assert outcome.status == 2 and "mean has 3 numbers and the model's images 1 channels" in outcome.err


def test_weights_of_others_that_read_one_channel_are_built_so(tmp_path):
    model = build_model("deit_tiny", image_size=32, num_classes=3, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert load_model(tmp_path / "a.pth").arguments["in_chans"] == 1
