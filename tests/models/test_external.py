"""Models from outside: timm's, torchvision's, and what a function in a Python file returns."""

import pytest
import timm
import torch
import torchvision

from models import build_model
from models.external import is_external, open_external
from utils.errors import UserError

NET = """
import torch
from torch import nn
from dataclasses import dataclass

@dataclass
class Shape:
    width: int

def net(width=4, classes=3):
    first = nn.Conv2d(3, Shape(width).width, 4, stride=4)
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

def breaks():
    raise ValueError("the dataset server\\nis down")

def number():
    return 3

def maps():
    return nn.Conv2d(3, 5, 3)

def rows():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 5))
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def test_names_that_say_where_a_model_is_from():
    assert is_external("timm:resnet18") and is_external("a/b.py:f")
    assert not is_external("deit_small") and not is_external(None)


def test_models_of_timm_keep_their_parameters_and_say_what_they_expect():
    model = open_external("timm:vit_tiny_patch16_224", seed=3, num_classes=7, depth=1)
    torch.manual_seed(3)
    same = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=1)
    assert all(value.equal(same.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.grid == (14, 14) and model.patch_size == 16 and not model.hides_positions and not model.training
    assert model.arguments == {"name": "timm:vit_tiny_patch16_224", "num_classes": 7, "image_size": 224}
    assert model.normalize["mean"] == (0.5, 0.5, 0.5)


def test_models_of_torchvision_get_cells_to_score_in():
    model = open_external("torchvision:squeezenet1_1", seed=1, image_size=60, num_classes=4)
    torch.manual_seed(1)
    same = torchvision.models.squeezenet1_1(num_classes=4)
    assert all(value.equal(same.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.patch_size == 15 and model.grid == (4, 4) and model.arguments["num_classes"] == 4


def test_functions_in_files(file, tmp_path):
    model = open_external(f"{file}:net", seed=1, image_size=32, width=6)
    assert model[0].out_channels == 6 and model.grid == (2, 2) and model.arguments["num_classes"] == 3
    again = open_external(f"{file}:net", seed=1, image_size=32, width=6)
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
    torch.save({"state_dict": {name: value + 1 for name, value in model.state_dict().items()}}, tmp_path / "w.pt")
    loaded = open_external(f"{file}:net", checkpoint=str(tmp_path / "w.pt"), image_size=32, width=6)
    assert loaded[0].bias.equal(model[0].bias + 1)
    with pytest.raises(UserError, match="w.pt' does not fit model '.*net.py:net'"):
        open_external(f"{file}:net", checkpoint=str(tmp_path / "w.pt"), image_size=32, width=7)


def test_models_of_this_project_keep_what_they_say(tmp_path):
    (tmp_path / "ours.py").write_text(
        "from models import build_model\n"
        "def vit():\n    return build_model('vit', image_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2,"
        " unknown=True)\n"
    )
    model = open_external(f"{tmp_path / 'ours.py'}:vit")
    same = build_model("vit", image_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, unknown=True)
    assert model.hides_positions and model.patch_size == 8 and model.arguments == same.arguments


@pytest.mark.parametrize(
    "spec, words",
    [
        ("timm:vit_tiny_patch16_22", "did you mean 'vit_tiny_patch16_224'"),
        ("torchvision:resnet19", "did you mean 'resnet"),
        ("torchvision:maskrcnn_resnet50_fpn", "unknown torchvision model"),
        ("no/such.py:net", "there is no Python file 'no/such.py'"),
        ("FILE:nett", "has no function 'nett': did you mean 'net'?"),
        ("FILE:breaks", "cannot be built: ValueError: the dataset server"),
        ("FILE:number", "must be a torch.nn.Module with parameters, not a int"),
        ("FILE:maps", "must map an image to a tensor of logits (1, classes), and gives (1, 5, 30, 30)"),
        ("FILE:rows", "fails on one 32 x 32 RGB image (RuntimeError: "),
    ],
)
def test_models_that_are_none_say_so_in_one_line(file, spec, words):
    with pytest.raises(UserError) as raised:
        open_external(spec.replace("FILE", str(file)), image_size=32)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_fail_and_options_that_do_not_exist(file, tmp_path):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(
        UserError, match="bad.py' fails when it is run: ModuleNotFoundError: No module named 'nothing_of"
    ):
        open_external(f"{tmp_path / 'bad.py'}:net")
    with pytest.raises(UserError, match="cannot be built: TypeError: .*widht"):
        open_external(f"{file}:net", widht=3)
    with pytest.raises(UserError, match="cannot build timm model .*widht"):
        open_external("timm:vit_tiny_patch16_224", widht=3)
