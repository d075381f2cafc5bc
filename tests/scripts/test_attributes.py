"""Attributes (several labels an image) end to end: trained on, evaluated, attacked, reported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attacks.label_recovery import attributes_of
from attacks.matching import MatchingOptions, gradient_matching
from attacks.threat_model.leak import Leak
from attacks.threat_model.local_step import training_loss
from data.attributes import read_attributes
from models import build_model
from models.checkpoints import load_model
from tests.attacks.small_victims import generator, start_at
from utils.errors import UserError

NAMES = ["Smiling", "Male", "Young"]
SHORT = ["--optim.epochs", 1, "--optim.warmup_epochs", 0, "--optim.mixup", 0, "--optim.cutmix", 0]
SHORT += ["--optim.label_smoothing", 0, "--augment.repeats", 1, "--data.workers", 0, "--data.batch_size", 4]
SHORT += ["--data.dataset", "attributes", "--data.image_size", 32]


@pytest.fixture
def faces(tmp_path):
    """Twelve pictures to train on and five to validate, with three attributes each, in CelebA's notation."""
    folder, draw = tmp_path / "faces", np.random.default_rng(0)
    (folder / "img").mkdir(parents=True)
    for split, number in (("train", 12), ("val", 5)):
        lines = [",".join(["image_id", *NAMES])]
        for place in range(number):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                folder / "img" / f"{split}{place}.png"
            )
            lines.append(",".join([f"img/{split}{place}.png", *(str(2 * (place >> bit & 1) - 1) for bit in range(3))]))
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_attributes_are_trained_on_evaluated_attacked_and_reported(call, faces, tmp_path):
    outcome = call(
        "train.py",
        "--data.path",
        faces,
        *SHORT,
        "--model.name",
        "lenet",
        "--optim.lr",
        0.1,
        "--output",
        tmp_path / "run",
    )
    assert outcome.status == 0, outcome.err
    checkpoint = tmp_path / "run" / "last.pt"
    model = load_model(checkpoint)
    assert model.loss == "bce" and model.classes == NAMES
    data = ["--checkpoint", checkpoint, "--data.path", faces, "--data.dataset", "attributes", "--data.workers", 0]
    assert call("eval.py", *data, "--output", tmp_path / "eval").status == 0
    (row,) = json.loads((tmp_path / "eval" / "results.json").read_text())["accuracy"]
    names, samples = read_attributes(faces / "val.csv")
    scale = [torch.tensor(model.normalize[key]).view(3, 1, 1) for key in ("mean", "std")]
    images = torch.stack(
        [torch.tensor(np.array(Image.open(path).copy())).permute(2, 0, 1) / 255 for path, _ in samples]
    )
    truth = torch.tensor([values for _, values in samples])
    with torch.no_grad():
        logits = model((images - scale[0]) / scale[1])
    right = (logits > 0) == (truth > 0)
    if row["images"] == 5 and images.shape[-1] == 32:  # evaluation crops; resized straight the pictures are these
        assert call("eval.py", *data, "--data.crop", "false", "--output", tmp_path / "straight").status == 0
        (row,) = json.loads((tmp_path / "straight" / "results.json").read_text())["accuracy"]
    assert row["acc1"] == pytest.approx(100 * right.float().mean().item(), abs=1e-4)
    assert row["acc5"] == pytest.approx(100 * right.all(dim=1).float().mean().item(), abs=1e-4)
    expected = nn.functional.binary_cross_entropy_with_logits(logits, truth.float()).item()
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    attack = ["--checkpoint", checkpoint, "--images", faces / "img" / "val3.png", "--attributes", faces / "val.csv"]
    for labels in ("known", "hidden"):
        out = tmp_path / labels
        outcome = call(
            "attack.py", *attack, "--attack", "inverting_gradients", "--attack_options.iterations", 5,
            "--labels", labels, "--output", out,
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        (found,) = json.loads((out / "results.json").read_text())["per_image"]
        assert found["label"] == "110" and (out / "report.html").exists()
        assert found.get("label_found") == (None if labels == "known" else 100.0)
    outcome = call("attack.py", *attack, "--attack", "dlg", "--attack_options.iterations", 3, "--labels", "hidden",
                   "--output", tmp_path / "joint")  # fmt: skip
    assert outcome.status == 0, outcome.err
    outcome = call("attack.py", *attack, "--attack", "dlg", "--label_flip", "--output", tmp_path / "flip")
    assert outcome.status == 2 and "label_flip is of classes" in outcome.err


def test_hidden_attributes_of_one_image_are_the_negative_bias_gradients():
    model = build_model("lenet", num_classes=6).double()
    model.loss = "bce"
    image = torch.rand(1, 3, 32, 32, generator=generator(), dtype=torch.float64)
    truth = torch.tensor([[1.0, 0, 1, 1, 0, 0]], dtype=torch.float64)
    parameters = dict(model.named_parameters())
    loss = training_loss(model, {}, image, truth, None)
    expected = nn.functional.binary_cross_entropy_with_logits(model(image), truth)
    torch.testing.assert_close(loss, expected)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    leak = Leak(model, gradients, (3, 32, 32), 1)
    assert attributes_of(leak).equal(truth.float())
    with pytest.raises(UserError, match="read off the gradient of one image"):
        attributes_of(Leak(model, gradients, (3, 32, 32), 2))


def test_the_true_image_and_attributes_have_objective_zero(monkeypatch):
    model = build_model("lenet", num_classes=6).double().eval()
    model.loss = "bce"
    image = torch.rand(2, 3, 32, 32, generator=generator(), dtype=torch.float64)
    truth = torch.tensor([[1.0, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]], dtype=torch.float64)
    loss, parameters = (
        nn.functional.binary_cross_entropy_with_logits(model(image), truth),
        dict(model.named_parameters()),
    )
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    leak = Leak(model, gradients, (3, 32, 32), 2, labels=truth)
    attack = gradient_matching(MatchingOptions(objective="l2", boxed=False))
    start_at(monkeypatch, image)
    found = attack(leak, generator=generator(1), iterations=0)
    assert found.diagnostics["objective"] < 1e-25 and found.labels.equal(truth.long())
    start_at(monkeypatch, image + 0.1)
    assert attack(leak, generator=generator(1), iterations=0).diagnostics["objective"] > 1e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,A\n", "needs a header of names and a line"),
        ("image,A,A\nx.png,1,0\n", "names an attribute twice"),
        ("image,A,B\nx.png,1\n", "line 2 of"),
        ("image,A,B\nx.png,1,2\n", "values of 1 and 0"),
    ],
)
def test_attribute_files_that_are_wrong_are_named(tmp_path, text, words):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_attributes(tmp_path / "a.csv")


def test_what_does_not_go_with_attributes_is_refused(call, faces, images, trained, tmp_path):
    options = ["--data.path", faces, *SHORT, "--model.name", "lenet", "--output", tmp_path / "run"]
    for more, words in (
        (["--optim.mixup", 0.8], "0 with --data.dataset attributes"),
        (["--optim.label_smoothing", 0.1], "0 with --data.dataset attributes"),
    ):
        outcome = call("train.py", *options, *more)
        assert outcome.status == 2 and words in outcome.err
    data = ["--checkpoint", trained / "last.pt", "--data.path", faces, "--data.workers", 0]
    outcome = call("eval.py", *data, "--data.dataset", "attributes", "--output", tmp_path / "eval")
    assert outcome.status == 2 and "the data has attributes, the model was not trained on them" in outcome.err
    text = (faces / "val.csv").read_text().replace("Young", "Old")
    (faces / "val.csv").write_text(text)
    outcome = call("train.py", *options)
    assert outcome.status == 2 and "different headers ('Young')" in outcome.err
