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


def test_options_of_timms_networks_reach_them():
    network = open_external("timm:vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1, num_classes=3)
    assert network.patch_embed.proj.weight.shape[2:] == (8, 8) and network.grid == (4, 4) and network.patch_size == 8
    with pytest.raises(UserError, match="cannot build timm model 'test_resnet'.*patch_size"):
        open_external("timm:test_resnet", patch_size=8)


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


SIZED = """
import timm
import torch
from torch import nn

class Sized(nn.Module):
    def __init__(self, image_size=16, classes=3):
        super().__init__()
        self.fc = nn.Linear(3 * image_size**2, classes)
    def forward(self, images):
        return self.fc(images.flatten(1))

def by_name(image_size=16):
    return Sized(image_size)

def by_timms_name(img_size=16):
    return Sized(img_size)

def by_keywords(**options):
    return Sized(**options)

def fixed(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

def of_timm(**options):
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5, "img_size": 32}
    return timm.create_model("vit_tiny_patch16_224", **shape | options)

def bare():
    return Sized()

def nothing():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.AdaptiveAvgPool1d(1), nn.Dropout(), Cut())

class Cut(nn.Module):
    def forward(self, values):
        return values[:, :0]

def undefined():
    model = Sized()
    nn.init.constant_(model.fc.weight, float("nan"))
    return model

class Named(Sized):
    def forward(self, images):
        return {"logits": super().forward(images)}

def named():
    return Named()
"""


@pytest.mark.parametrize("name", ["by_name", "by_timms_name", "by_keywords", "fixed", "of_timm"])
@pytest.mark.parametrize("size", [48, None])
def test_builders_get_the_size_of_the_input_where_they_take_it(tmp_path, name, size):
    (tmp_path / "sized.py").write_text(SIZED)
    if size is None and name not in ("fixed", "of_timm"):  # a network that does not say what it was built for
        with pytest.raises(UserError, match="fails on one 224 x 224 RGB image .*is --image_size what it was built for"):
            open_external(f"{tmp_path / 'sized.py'}:{name}")
        return
    model = open_external(f"{tmp_path / 'sized.py'}:{name}", image_size=size, seed=1)
    assert model.arguments["image_size"] == size or {"fixed": 224, "of_timm": 32}[name] == model.arguments["image_size"]
    again = open_external(f"{tmp_path / 'sized.py'}:{name}", image_size=size, seed=1)
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())


def test_torchvisions_vits_are_built_for_the_size_asked_for():
    model = open_external("torchvision:vit_b_16", image_size=32, num_classes=3)
    assert model.image_size == 32 and model.arguments["image_size"] == 32 and model.grid == (2, 2)


@pytest.mark.parametrize(
    "name, words",
    [
        ("bare", "fails on one 32 x 32 RGB image (RuntimeError: "),
        ("nothing", "gives (1, 0)"),
        ("undefined", "gives NaN or infinity"),
        ("named", "gives a dict: wrap it in a function of a Python file"),
    ],
)
def test_networks_that_are_no_classifiers(tmp_path, name, words):
    (tmp_path / "sized.py").write_text(SIZED)
    with pytest.raises(UserError) as raised:
        open_external(f"{tmp_path / 'sized.py'}:{name}", image_size=32 if name == "bare" else 16)
    assert words in str(raised.value) and "\n" not in str(raised.value)


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
