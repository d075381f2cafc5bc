"""models/containers.py, models/unpickling.py: weights are found whatever lies around them, and nothing is run."""

import argparse
import collections
import datetime
import pathlib
import types

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoints import load_model, read_checkpoint, save_checkpoint
from models.containers import DEPTH, plain_weights
from models.external import open_external
from models.layouts import MARKS
from models.timm_models import open_timm
from tests.models.small_models import assert_same_weights, small
from utils.errors import UserError
from utils.notes import Notes

PREFIXES = (
    "", "_orig_mod.", "module.", "model.", "backbone.", "base_model.model.", "net.", "encoder.", "module._orig_mod.",
    "_orig_mod.module.model.", "model.backbone.vit.", "anything.at.all.", "_fsdp_wrapped_module.",
)  # fmt: skip
WRAPPINGS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3},
    "state_dict": lambda weights: {"state_dict": weights, "optimizer": {"state": weights}},
    "net": lambda weights: {"net": weights, "acc": 93.1},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "optimizer_state_dict": weights},
    "one level deeper": lambda weights: {"checkpoint": {"model": weights}},
    "any word": lambda weights: {"trained things": weights, "history": [1, 2]},
    "student and teacher": lambda weights: {
        "student": weights,
        "teacher": {name: value + 1 for name, value in weights.items()},
    },
}
HEADS = {"num_heads": 1}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    model = small()
    torch.save({"state_dict": {prefix + name: value for name, value in model.state_dict().items()}}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", **HEADS), model.state_dict())


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_are_opened(tmp_path, wrapping):
    model = small()
    torch.save(WRAPPINGS[wrapping](model.state_dict()), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth", **HEADS)
    assert_same_weights(loaded, model.state_dict())
    assert ("weights" in loaded.assumed) == (wrapping == "student and teacher")


def test_names_with_a_wrapper_inside_are_cleaned(tmp_path):
    """As torch.compile and checkpointing of single blocks leave them."""
    model = small()
    names = {name: name.replace("blocks.0.", "blocks.0._orig_mod.") for name in model.state_dict()}
    names = {name: new.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module.") for name, new in names.items()}
    torch.save({names[name]: value for name, value in model.state_dict().items()}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", **HEADS), model.state_dict())


@pytest.mark.parametrize("name", ["head", "classifier", "fc", "linear"])
def test_a_classifier_beside_the_backbone_belongs_to_it(tmp_path, name):
    model = small()
    weights = {
        key.replace("head.", f"{name}.") if key.startswith("head.") else f"backbone.{key}": value
        for key, value in model.state_dict().items()
    }
    torch.save({"state_dict": weights | {"criterion.weight": torch.ones(3)}}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", **HEADS), model.state_dict())


AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "teacher", "swa_model")


@pytest.mark.parametrize("key", AVERAGED)
def test_averaged_weights_of_others_are_taken_when_asked_for(tmp_path, key):
    model, averaged = small(), small(seed=1)
    torch.save({"state_dict": model.state_dict(), key: averaged.state_dict()}, tmp_path / "a.pth")
    plain = load_model(tmp_path / "a.pth", **HEADS)
    assert_same_weights(plain, model.state_dict())
    assert f"averaged ones of '{key}' passed over" in plain.assumed["weights"]
    taken = load_model(tmp_path / "a.pth", ema=True, **HEADS)
    assert_same_weights(taken, averaged.state_dict())
    assert "weights" not in taken.assumed


def test_our_own_averaged_weights_are_said_to_be_passed_over(tmp_path):
    model = small()
    content = {"arguments": model.arguments, "model": model.state_dict(), "model_ema": small(seed=1).state_dict()}
    save_checkpoint(tmp_path / "last.pt", content)
    assert "passed over" in load_model(tmp_path / "last.pt").assumed["weights"]
    assert not load_model(tmp_path / "last.pt", ema=True).assumed


def test_a_file_of_averaged_weights_alone_says_so(tmp_path):
    torch.save({"ema": small().state_dict()}, tmp_path / "a.pth")
    assert "the file has no others" in load_model(tmp_path / "a.pth", **HEADS).assumed["weights"]


def test_several_sets_of_weights_are_not_chosen_from(tmp_path):
    content = {"first": small().state_dict(), "second": small(seed=1).state_dict()}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="several sets of weights \\('first', 'second'\\)"):
        load_model(tmp_path / "a.pth", **HEADS)
    notes = Notes()
    weights = plain_weights({"model": content["first"], "best": content["second"]}, "a.pth", MARKS, notes=notes)
    assert (
        weights["head.bias"].equal(content["first"]["head.bias"]) and "'best' passed over" in notes.assumed["weights"]
    )


def test_adapters_are_named():
    weights = {"base_model.model.blocks.0.attn.qkv.lora_A.default.weight": torch.ones(2, 2)}
    with pytest.raises(UserError, match="LoRA adapters"):
        plain_weights(weights, "a.pth", MARKS)


def test_wrappers_are_opened_down_to_a_fixed_depth():
    content: dict = {"w": torch.ones(1)}
    for _ in range(DEPTH - 1):
        content = {"state": content}
    (found,) = plain_weights(content, "a.pth", {"w"}).values()
    assert found.equal(torch.ones(1))
    with pytest.raises(UserError):
        plain_weights({"state": content}, "a.pth", {"w"})


def test_dicts_that_refer_to_each_other_end():
    circle: dict = {"w": torch.ones(1)}
    circle["self"] = circle
    assert plain_weights(circle, "a.pth", {"w"})
    wide: dict = {str(k): 0 for k in range(500)}
    for _ in range(4):
        wide = {str(k): wide for k in range(500)}
    with pytest.raises(UserError, match="more than"):
        plain_weights(wide, "a.pth", {"w"})


def test_any_network_is_found_by_its_own_names(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))\n\n"
        "    def forward(self, images):\n        return self.module(images)\n\n\ndef net():\n    return Net()\n"
    )
    model = open_external(f"{tmp_path}/net.py:net", image_size=16, seed=1)
    weights = {f"model._orig_mod.{name}": value + 1 for name, value in model.state_dict().items()}
    content = {"net": weights, "net_ema": {name: value * 2 for name, value in weights.items()}}
    torch.save(content, tmp_path / "w.pth")
    for ema, factor in ((False, 1), (True, 2)):
        loaded = open_external(f"{tmp_path}/net.py:net", image_size=16, checkpoint=str(tmp_path / "w.pth"), ema=ema)
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].equal((value + 1) * factor)


def test_timm_models_are_found_by_their_own_names(tmp_path):
    model = open_timm("test_vit", seed=1)
    weights = {f"student.backbone.{name}": value for name, value in model.network.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "w.pth")
    assert_same_weights(open_timm("test_vit", checkpoint=tmp_path / "w.pth").network, model.network.state_dict())


def test_harmless_things_beside_the_weights_load(tmp_path):
    model = small()
    beside = {
        "best": np.float64(0.5),
        "count": np.int64(7),
        "flag": np.bool_(True),
        "history": np.arange(6, dtype=np.float32).reshape(2, 3),
        "output": pathlib.Path("/somewhere/else"),
        "meters": collections.defaultdict(list, {"loss": [np.float32(0.1)]}),
        "recent": collections.deque([1, 2], maxlen=2),
        "args": argparse.Namespace(lr=0.1, path=pathlib.Path("x")),
        "space": types.SimpleNamespace(a=1),
        "when": datetime.datetime(2024, 1, 2),
        "classes seen": frozenset({1}),
        "dtype": torch.float16,
    }
    torch.save({"model": model.state_dict()} | beside, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", **HEADS), model.state_dict())
    found = read_checkpoint(tmp_path / "a.pth")
    assert found["best"] == 0.5 and type(found["best"]) is float and found["count"] == 7 and found["flag"] is True
    assert str(found["output"]) == "/somewhere/else" and not isinstance(found["output"], pathlib.Path)
    assert found["meters"]["loss"] == [pytest.approx(0.1)] and list(found["recent"]) == [1, 2]
    assert found["history"].values.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_weights_as_numpy_arrays_load(tmp_path):
    model = small()
    torch.save({name: value.numpy() for name, value in model.state_dict().items()}, tmp_path / "a.pth")
    assert_same_weights(load_model(tmp_path / "a.pth", **HEADS), model.state_dict())


class Huge:
    """Asks for an array of a terabyte when it is read."""

    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (10**12,), b"b")


def test_an_array_gets_no_more_memory_than_the_file_has(tmp_path):
    torch.save({"model": small().state_dict(), "huge": Huge()}, tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["huge"].values.size == 0


def test_whole_pickled_models_are_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a whole pickled model \('torch.nn.modules.linear.Linear'\).*state_dict\(\)"):
        load_model(tmp_path / "a.pth")
    torch.save({"model": small().state_dict(), "objects": np.array([print], dtype=object)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="b.pth"):
        load_model(tmp_path / "b.pth")


def test_another_network_is_no_choice_between_sets(tmp_path):
    """Blocks of another network have names of this one inside them; none of them is the network that is meant."""
    torch.save(
        {f"blocks.{number}.{name}": torch.zeros(2) for number in range(3) for name in ("bn1.bias", "bn1.weight")},
        tmp_path / "a.pth",
    )
    for spec in ("timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(UserError, match=r"does not fit .*missing: .*unexpected: blocks.0.bn1"):
            open_external(spec, checkpoint=tmp_path / "a.pth")
