"""The gradient-matching loop refuses what it cannot do in one clear line."""

import math
from dataclasses import replace

import pytest

from attacks.threat_model.leak import Leak, LocalSteps
from models import build_model
from models.checkpoints import save_checkpoint
from tests.attacks.small_victims import (
    VIT,
    attack,
    client,
    leaks_of,
    net,
    vit,
)
from utils.errors import UserError


def broken(leak: Leak, name: str) -> Leak:
    gradient = leak.gradients[name].clone()
    gradient.flatten()[0] = math.nan
    return replace(leak, gradients=leak.gradients | {name: gradient})


BAD = {
    "unknown objective 'cosin': did you mean 'cosine'": {"objective": "cosin"},
    "unknown optimizer 'adan': did you mean 'adam'": {"optimizer": "adan"},
    "unknown schedule 'cosin': did you mean 'cosine'": {"schedule": "cosin"},
    "unknown init 'zero': choose randn": {"init": "zero"},
    "unknown init 'patterned-0'": {"init": "patterned-0"},
    "unknown label rule 'ying': did you mean 'yin'": {"labels": "ying"},
    "unknown tv_form 'round'": {"tv_form": "round"},
    "unknown layer_weights 'square'": {"layer_weights": "square"},
    "unknown value of 'signed' 'harsh'": {"signed": "harsh"},
    "unknown precision 'fp16'": {"precision": "fp16"},
    "unknown rule to select layers 'best3'": {"layers": "best3"},
    "layers 'top9' asks for 9 of 4": {"layers": "top9"},
    "restarts must be at least 1 and iterations at least 0, got 0 and 4": {"restarts": 0},
    "restarts must be at least 1 and iterations at least 0, got 1 and -1": {"iterations": -1},
    "attack_options.lr must be 0 or more, got -1": {"lr": -1.0},
    "attack_options.tv must be 0 or more, got -0.1": {"tv": -0.1},
    "attack_options.median_every must be 0 or more, got -2": {"median_every": -2},
    "attack_options.l2 must be 0 or more, got nan": {"l2": math.nan},
    "attack_options.second_phase must be from 0 to 1, got 1.5": {"second_phase": 1.5},
    "the group prior compares restarts: set restarts to 2": {"group": 0.1},
    "the image prior needs a CNN with BatchNorm: pass image_prior_checkpoint": {
        "image_prior": 0.1,
        "second_phase": 0.9,
    },
    "checkpoint 'no.pt' does not exist": {"image_prior": 0.1, "image_prior_checkpoint": "no.pt"},
    "the batch_norm prior needs a victim with BatchNorm": {"batch_norm": 0.1},
    "the feature prior needs labels to start with": {"features": 0.1, "labels": "joint"},
    "precision 'bf16' is of float32 arithmetic": {"precision": "bf16"},
    "needs the gradient of 'pos_embed', which this leak does not have": {"pos_embed_cosine": 1.0},
}


@pytest.mark.parametrize("message, options", BAD.items(), ids=BAD)
@pytest.mark.parametrize("victims", [1, 2])
def test_options_that_cannot_be_are_one_clear_line(message, options, victims):
    leaks = leaks_of(net(), victims=victims, hidden=True)
    with pytest.raises(UserError, match=message) as error:
        attack(leaks, **options)
    assert "\n" not in str(error.value)


def test_leaks_that_cannot_be_matched_name_what_is_wrong(tmp_path):
    model = net()
    private, leak = client(model)
    with pytest.raises(UserError, match="the gradient of 'fc.weight' holds NaN"):
        attack(broken(leak, "fc.weight"))
    with pytest.raises(UserError, match="the gradient of 'fc.bias' holds NaN"):
        attack([leak, broken(leak, "fc.bias")])
    with pytest.raises(UserError, match="the gradient of 'fc.bias' holds NaN"):
        attack(broken(client(model, hidden=True)[1], "fc.bias"))
    with pytest.raises(UserError, match="needs at least one gradient: everything is withheld"):
        attack(client(model, withhold=["*"])[1])
    for part in ("weight", "bias"):
        with pytest.raises(
            UserError, match="the feature prior needs the gradients of the classifier's weight and bias"
        ):
            attack(client(model, withhold=[f"fc.{part}"])[1], features=0.1)
    with pytest.raises(UserError, match="needs the gradient of 'fc.bias'"):
        attack(client(model, withhold=["fc.bias"], hidden=True)[1])
    with pytest.raises(UserError, match="label rule 'idlg' reads one label, the batch has 2"):
        attack(client(model, number=2, hidden=True)[1], labels="idlg")
    with pytest.raises(UserError, match="label rule 'yin' finds a class once, but 6 images exceed 5 classes"):
        attack(client(model, number=6, hidden=True)[1], labels="yin")
    with pytest.raises(UserError, match="finite_difference works on single gradients"):
        attack(client(model, local=LocalSteps(2, 0.1, 1))[1], finite_difference=1e-6)
    with pytest.raises(UserError, match="the patch prior needs borders between patches"):
        attack(client(vit(patch_size=32))[1], patch_prior=0.1)
    attention = build_model("vit", num_classes=5, **VIT)
    save_checkpoint(tmp_path / "vit.pt", {"arguments": attention.arguments, "model": attention.state_dict()})
    with pytest.raises(UserError, match="has no BatchNorm layers: use a CNN such as ResNet-50"):
        attack(leak, image_prior=0.1, image_prior_checkpoint=str(tmp_path / "vit.pt"))
    with pytest.raises(UserError, match="'timm:test_resnet' names no weights: write timm:test_resnet=FILE"):
        attack(leak, image_prior=0.1, image_prior_checkpoint="timm:test_resnet")
    convnet = build_model("convnet", num_classes=5, image_size=32, width=2)
    save_checkpoint(tmp_path / "convnet.pt", {"arguments": convnet.arguments, "model": convnet.state_dict()})
    with pytest.raises(UserError, match="cannot read 3x8x8 images"):
        attack(leak, image_prior=0.1, image_prior_checkpoint=str(tmp_path / "convnet.pt"))


def test_a_leak_without_any_gradient_is_refused():
    (leak,) = leaks_of(net(), victims=1)
    with pytest.raises(UserError, match="everything is withheld"):
        attack(replace(leak, gradients={}))
