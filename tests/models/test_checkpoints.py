"""models/checkpoints.py: files of this project and of the official MJP code, and files of none."""

import argparse
import json
import os
import pickle
import re
import sys
import types
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import build_model
from models.checkpoints import load_model, load_weights, read_checkpoint, save_checkpoint
from models.official import from_official, to_official
from models.position import resize_pos_embed
from tests.models.small_models import assert_same_weights, picture, small
from utils.errors import UserError

# Variants of the official model; its file does not say which localization head without parameters it has.
OFFICIAL = {"nonlinear": {}, "linear": {}, "unk_idx": {}, "pca": {"localization": "pca_official"}}
OFFICIAL_RUNS = [("deit", "nomask"), *product(OFFICIAL, ("nomask", "mask"))]
MJP = {"unknown": True, "index_embed": True, "localization": "nonlinear"}


def small_swin(**options) -> nn.Module:
    shape = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    return build_model("swin_tiny", num_classes=5, **{**shape, **options}).eval()


def save_own(model: nn.Module, path: Path, **more) -> Path:
    save_checkpoint(path, {"arguments": model.arguments, "model": model.state_dict(), **more})
    return path


def official_weights(data: dict) -> dict[str, Tensor]:
    return {key.removeprefix("sd/"): torch.tensor(data[key]) for key in data if key.startswith("sd/")}


def load_official(golden, name: str, folder: Path) -> tuple[nn.Module, dict]:
    data = golden(f"mjp_model_{name}")
    torch.save({"model": official_weights(data), "epoch": 3}, folder / "official.pth")
    return load_model(folder / "official.pth", num_heads=3, **OFFICIAL.get(name, {})).double(), data


def align_signs(model: nn.Module, mask: Tensor, expected: float) -> None:
    """Principal axes have no sign: give the targets the signs with which the loss is the expected one."""
    target = model.localization.target.clone()
    losses = {}
    for signs in product((1, -1), repeat=2):
        model.localization.target = target * torch.tensor(signs)
        losses[signs] = abs(model.localization(model.patch_pos_embed(), mask).item() - expected)
    model.localization.target = target * torch.tensor(min(losses, key=losses.get))


@pytest.mark.parametrize(("name", "run"), OFFICIAL_RUNS)
def test_official_files_reproduce_logits_losses_and_gradients(golden, tmp_path, name, run):
    model, data = load_official(golden, name, tmp_path)
    config = golden(f"mjp_model_{name}.json")
    head = {"deit": "none", "unk_idx": "nonlinear", "pca": "pca_official"}.get(name, name)
    assert model.arguments["localization"] == head
    assert model.hides_positions == (name != "deit")
    assert (model.index_embed is not None) == (name == "unk_idx")

    def assert_close(actual: Tensor, key: str, rtol: float = 1e-6, atol: float = 1e-8) -> None:
        expected = torch.as_tensor(data[key])
        torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=atol, msg=lambda text: f"{key}: {text}")

    images, labels = torch.tensor(data["x"]).double(), torch.tensor(data["y"])
    mask = torch.tensor(data["unk_mask"])[:, 1:].bool() & (run == "mask")
    shown = mask if run == "mask" else None
    logits = model(images, shown)
    loss = nn.functional.cross_entropy(logits, labels)
    assert_close(logits, f"logits_{run}_f64")
    assert_close(model.features(images, shown), f"feat_{run}_f64")
    assert_close(loss, f"ce_{run}_f64")
    # The official PCA is randomised: its loss and what depends on it repeat to about 1e-3.
    loose = {"rtol": 1e-3, "atol": 1e-6} if name == "pca" else {}
    if head != "none":
        rows = model.patch_pos_embed()
        if name == "pca":
            possible = torch.as_tensor(data[f"dlocr_l1_4signs_{run}_f64"])
            assert (model.localization(rows, mask) / possible - 1).abs().min() < 1e-3
            align_signs(model, mask, float(data[f"dlocr_l1_{run}_f64"]))
        else:
            assert_close(model.localization.layers(rows)[None, ~mask[0]], f"xy_pred_{run}_f64")
        localization = model.localization(rows, mask)
        assert_close(localization, f"dlocr_l1_{run}_f64", **loose)
        loss = loss + config["config"]["lam"] * localization
    assert_close(loss, f"total_{run}_f64", **loose)

    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    if name != "deit" and run == "nomask":
        gradients["unknown_pos_embed"] = torch.zeros(1, 1, 48, dtype=torch.float64)
    gradients = to_official(gradients)
    table = "pos_embed" if name == "deit" else "pos_embed.weight"
    assert_close(gradients[table], f"grad_pos_embed_{run}_f64", **loose)
    norms = torch.stack([gradients[key].norm() for key in config["param_order"]])
    assert_close(norms, f"gradnorm_each_{run}_f64", **loose)
    assert_close(norms.norm(), f"gradnorm_{run}_f64", **loose)
    stored = [key for key in data if key.startswith("grad/") and key.endswith(f"_{run}_f64")]
    assert bool(stored) == (name in ("deit", "nonlinear"))
    for key in stored:
        gradient = gradients[key.removeprefix("grad/").removesuffix(f"_{run}_f64")]
        assert_close(gradient[::8] if len(gradient) > 12 else gradient, key)  # of long ones every eighth row is stored


@pytest.mark.parametrize("run", ["nomask", "mask"])
def test_an_official_file_without_a_head_has_none_unless_told(golden, tmp_path, run):
    data = golden("mjp_model_pca")
    torch.save({"model": official_weights(data)}, tmp_path / "official.pth")
    model = load_model(tmp_path / "official.pth", num_heads=3).double()
    assert model.arguments["localization"] == "none" and model.hides_positions and model.index_embed is None
    mask = torch.tensor(data["unk_mask"])[:, 1:].bool() if run == "mask" else None
    logits = model(torch.tensor(data["x"]).double(), mask).detach()
    torch.testing.assert_close(logits, torch.tensor(data[f"logits_{run}_f64"]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["deit", *OFFICIAL])
def test_official_names_survive_the_round_trip(golden, name):
    weights = official_weights(golden(f"mjp_model_{name}"))
    back = to_official(from_official(weights))
    assert back.keys() == weights.keys()
    for key in weights:
        assert back[key].equal(weights[key]), key


@pytest.mark.parametrize("options", [{}, {"unknown": True}, {"unknown": True, "localization": "linear"}, MJP])
def test_own_names_survive_the_round_trip(options):
    weights = small(**options).state_dict()
    official = to_official(weights)
    assert official["pos_embed.weight" if options else "pos_embed"].shape[-2:] == (18 if options else 17, 64)
    assert not any(key.startswith("localization") or key == "unknown_pos_embed" for key in official)
    back = from_official(official)
    assert back.keys() == weights.keys()
    for key in weights:
        assert back[key].equal(weights[key]), key


@pytest.mark.parametrize("options", [{}, {"unknown": True}, {"unknown": True, "localization": "linear"}, MJP])
def test_a_model_in_the_official_layout_is_recognised(tmp_path, options):
    model = small(**options)
    torch.save({"model": to_official(model.state_dict()), "epoch": 3}, tmp_path / "official.pth")
    loaded = load_model(tmp_path / "official.pth", num_heads=1)
    mask = (torch.arange(16) < 5)[None] if options else None
    assert_same_weights(loaded, model.state_dict())
    assert loaded(picture(), mask).equal(model(picture(), mask))


@pytest.mark.parametrize("legacy", [False, True])
def test_files_with_a_yacs_configuration_load_without_yacs(tmp_path, monkeypatch, legacy):
    class CfgNode(dict):
        def __init__(self, content):
            super().__init__(content)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    model, path = small(unknown=True), tmp_path / "official.pth"
    config = CfgNode({"MODEL": CfgNode({"DROP": 0.1, "DEPTHS": [2, 2], "SIZE": (224, 224), "RESUME": None})})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        content = {"model": to_official(model.state_dict()), "config": config, "epoch": 3}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert not {"yacs", "yacs.config"} & sys.modules.keys()
    assert b"CfgNode" in path.read_bytes()
    assert_same_weights(load_model(path, num_heads=1), model.state_dict())
    assert read_checkpoint(path)["config"] == {"MODEL": {**config["MODEL"]}}


def test_files_with_command_line_arguments_load(tmp_path):
    model = small()
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "deit.pth")
    assert_same_weights(load_model(tmp_path / "deit.pth", num_heads=1), model.state_dict())


class Evil:
    """Unpickling this runs a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("writer", ["torch", "torch legacy", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, writer):
    path, trace = tmp_path / "evil.pth", tmp_path / "was here"
    content = {"model": small().state_dict(), "config": Evil(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_model(path)
    assert not trace.exists()
    if writer == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()  # the file is as dangerous as it was meant to be


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing", "folder"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith(".pt"):
        save_own(small(), path)
    else:
        save_file(small().state_dict(), path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"not a model\n" * 50, "empty": b""}[damage])
    problems = {"missing": "does not exist", "folder": "is a folder without model.safetensors .* pass a file"}
    problem = problems.get(damage, "truncated or not a checkpoint")
    with pytest.raises(UserError, match=problem) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (torch.ones(3), "holds a Tensor"),
        ([torch.ones(3)], "holds a list"),
        ({"epoch": 3, "loss": 0.1}, "holds no weights"),
        ({"model": {}}, "holds no weights"),
        ({"model": {"conv1.weight": torch.ones(3)}}, "not a ViT, Swin or ResNet-50"),
    ],
)
def test_files_without_a_known_model_are_refused(tmp_path, content, problem):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=problem):
        load_model(tmp_path / "other.pth")


def test_weights_that_do_not_fit_are_named(tmp_path):
    path = save_own(small(unknown=True), tmp_path / "model.pt")
    with pytest.raises(UserError, match="missing: localization.layers.weight, localization.layers.bias"):
        load_model(path, localization="linear")
    with pytest.raises(UserError, match="unexpected: unknown_pos_embed"):
        load_model(path, unknown=False)
    with pytest.raises(UserError, match=r"different shape: cls_token, .* and \d+ more"):
        load_model(path, embed_dim=128)
    with pytest.raises(UserError, match=f"'{path}' does not fit model 'vit'.*different shape: head.weight"):
        load_weights(small(unknown=True, num_classes=6), small(unknown=True).state_dict(), path)


def without_pos_embed(weights: dict[str, Tensor]) -> None:
    del weights["pos_embed"]


def without_class_row(weights: dict[str, Tensor]) -> None:
    weights["pos_embed"] = weights["pos_embed"][:, 1:]


def distilled(weights: dict[str, Tensor]) -> None:
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], weights["pos_embed"]], dim=1)
    weights["dist_token"] = weights["cls_token"].clone()
    weights["head_dist.weight"], weights["head_dist.bias"] = weights["head.weight"], weights["head.bias"]


@pytest.mark.parametrize(
    ("change", "side"), [(without_pos_embed, 32), (without_class_row, 32), (distilled, 32), (distilled, 40)]
)
def test_vits_of_another_kind_are_refused(tmp_path, change, side):
    weights = small(image_size=side).state_dict()
    change(weights)
    torch.save({"model": weights}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth"):
        load_model(tmp_path / "other.pth")


def test_saving_leaves_one_whole_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert read_checkpoint(path) == {"format": "mjp", "epoch": 1}
    save_checkpoint(path, {"epoch": 2})
    assert os.listdir(tmp_path) == ["last.pt"]
    assert read_checkpoint(path)["epoch"] == 2


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint(path, {"weights": torch.ones(1000), "epoch": lambda: 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize(
    ("build", "options"),
    [(small, {}), (small, MJP), (small_swin, {}), (small_swin, {"unknown": True, "localization": "linear"})],
)
def test_own_files_give_back_the_model(tmp_path, build, options):
    model = build(**options)
    normalize, classes = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}, ["a", "b", "c", "d", "e"]
    loaded = load_model(save_own(model, tmp_path / "best.pt", normalize=normalize, classes=classes))
    assert loaded.arguments == model.arguments
    assert (loaded.normalize, loaded.classes, loaded.training) == (normalize, classes, False)
    assert_same_weights(loaded, model.state_dict())
    assert loaded(picture()).equal(model(picture()))


def test_averaged_weights_are_loaded_on_demand(tmp_path):
    model, averaged = small(), small(seed=1)
    path = save_own(model, tmp_path / "last.pt", model_ema=averaged.state_dict())
    assert_same_weights(load_model(path), model.state_dict())
    assert_same_weights(load_model(path, ema=True), averaged.state_dict())


@pytest.mark.parametrize("more", [{}, {"model_ema": None}])
def test_averaged_weights_that_are_not_there_are_refused(tmp_path, more):
    path = save_own(small(), tmp_path / "last.pt", **more)
    with pytest.raises(UserError, match="holds no averaged weights"):
        load_model(path, ema=True)


def test_averaged_weights_of_a_foreign_file_are_not_replaced_in_silence(tmp_path):
    torch.save({"model": small().state_dict()}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match="averaged"):
        load_model(tmp_path / "deit.pth", ema=True)


@pytest.mark.parametrize("options", [{}, MJP])
def test_another_image_size_resizes_the_position_embeddings(tmp_path, options):
    model = small(**options)
    for path in (save_own(model, tmp_path / "own.pt"), tmp_path / "official.pth"):
        if path.suffix == ".pth":
            torch.save({"model": to_official(model.state_dict())}, path)
        loaded = load_model(path, image_size=48, num_heads=1)
        assert loaded.grid == (6, 6)
        assert loaded.arguments["image_size"] == 48
        assert loaded(picture(48)).isfinite().all()
        for name, value in model.state_dict().items():
            if name in ("pos_embed", "index_embed"):
                value = resize_pos_embed(value, (6, 6), (4, 4), 1)
            assert loaded.state_dict()[name].equal(value), name


def test_another_image_size_resizes_the_table_of_a_swin(tmp_path):
    model = small_swin(unknown=True, window_size=4)
    loaded = load_model(save_own(model, tmp_path / "own.pt"), image_size=64)
    assert loaded.grid == (16, 16)
    assert loaded.pos_embed.equal(resize_pos_embed(model.pos_embed, (16, 16), (8, 8), 0))
    assert loaded(picture(64)).isfinite().all()


def test_a_classifier_and_an_unknown_row_that_are_asked_for_are_new(tmp_path):
    model = small()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    path = tmp_path / "backbone.pth"
    torch.save(weights, path)
    with pytest.raises(UserError, match="start train.py from it with --init, or give attack.py or audit.py a new one"):
        load_model(path)
    loaded = load_model(path, num_heads=1, num_classes=3, unknown=True)
    new = {"head.weight", "head.bias", "unknown_pos_embed"}
    assert set(loaded.assumed["new"].split(": ")[1].split(", ")) == new
    assert_same_weights(loaded, weights | {name: loaded.state_dict()[name] for name in new})
    assert loaded.head.out_features == 3 and loaded.hides_positions


def test_a_classifier_of_another_size_takes_the_names_of_the_classes_with_it(tmp_path):
    path = save_own(small(), tmp_path / "best.pt", classes=list("abcde"))
    assert load_model(path, num_classes=5).classes == list("abcde")
    loaded = load_model(path, num_classes=3)
    assert loaded.classes is None and "head.weight" in loaded.assumed["new"]


def test_a_header_of_safetensors_says_what_weights_do_not(tmp_path):
    weights = small(num_heads=2).state_dict()  # heads 32 wide, which no published model of this width has
    config = {"num_heads": 2, "normalize": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, "tokenizer": "{}"}
    save_file(weights, tmp_path / "w.safetensors", {"config": json.dumps(config)})
    model = load_model(tmp_path / "w.safetensors")
    assert model.arguments["num_heads"] == 2 and model.tokenizer == "{}"
    assert model.normalize == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
