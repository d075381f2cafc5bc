"""Official Swin and ResNet-50 files of MJP, and ViTs of Google's JAX code: under their own names they compute what an
independent reading of the published networks computes."""

import math

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from models import build_model
from models.checkpoints import load_model
from models.official import from_official, to_official
from tests.models.small_models import assert_same_weights, picture
from tests.models.test_file_kinds import google
from utils.errors import UserError

DIM, DEPTHS, HEADS, WINDOW, CLASSES = 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, 5
NUMBER = 56 * 56  # patches at 224 pixels


def swin_weights(*, bias: bool = True, **more: tuple) -> dict[str, Tensor]:
    """Random weights of a Swin-T under Microsoft's names, with its persistent buffers. more: shapes by name."""
    shapes = {"patch_embed.proj.weight": (DIM, 3, 4, 4), "patch_embed.proj.bias": (DIM,), "head.weight": (CLASSES, 768)}
    shapes |= {"head.bias": (CLASSES,)} | more
    norms = [("patch_embed.norm", DIM), ("norm", 8 * DIM)]
    for stage, depth in enumerate(DEPTHS):
        dim = DIM * 2**stage
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            norms += [(f"{block}.norm1", dim), (f"{block}.norm2", dim)]
            layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
            layers |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
            for name, shape in layers.items():
                shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            if bias:
                shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * WINDOW - 1) ** 2, HEADS[stage])
        if stage < 3:
            norms.append((f"layers.{stage}.downsample.norm", 4 * dim))
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
    for name, dim in norms:
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) if name.endswith("weight") and len(shape) > 1 else 0.3
        scale = 1.0 if name.startswith("absolute_pos_embed") else scale
        weights[name] = scale * torch.randn(shape, generator=draw)
    weights["layers.0.blocks.1.attn_mask"] = shift_mask(56, 3)
    return weights


def windows(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * windows, 49, C), row by row."""
    batch, side, _, dim = x.shape
    x = x.reshape(batch, side // WINDOW, WINDOW, side // WINDOW, WINDOW, dim)
    return x.transpose(2, 3).reshape(-1, WINDOW**2, dim)


def shift_mask(side: int, shift: int) -> Tensor:
    """(windows, 49, 49): minus 100 between places that were not neighbours before the shift."""
    bands = torch.zeros(side, dtype=torch.long)
    bands[-WINDOW:], bands[-shift:] = 1, 2
    region = windows((3 * bands[:, None] + bands)[None, :, :, None].float())[..., 0]
    return -100.0 * (region[:, :, None] != region[:, None, :])


def swin_logits(weights: dict[str, Tensor], images: Tensor, mask: Tensor | None = None) -> Tensor:
    """Swin-T as published, from Microsoft's names; positions as in the official MJP code. mask (1, N) bool or None."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    ticks = torch.arange(WINDOW)
    offset = ticks[:, None] - ticks + WINDOW - 1  # 0 to 2 window - 2
    relative = (2 * WINDOW - 1) * offset[:, None, :, None] + offset[None, :, None, :]
    relative = relative.reshape(WINDOW**2, WINDOW**2)
    x = conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    x = norm(x.flatten(2).mT, "patch_embed.norm")
    if "index_embed" in weights:
        x = x + weights["index_embed"]
    if "absolute_pos_embed.weight" in weights:
        order = torch.arange(NUMBER)
        x = x + weights["absolute_pos_embed.weight"][torch.where(mask[0], NUMBER, order) if mask is not None else order]
    elif "absolute_pos_embed" in weights:
        x = x + weights["absolute_pos_embed"]
    for stage, depth in enumerate(DEPTHS):
        side, dim = 56 >> stage, DIM << stage
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            shift = WINDOW // 2 if number % 2 and side > WINDOW else 0
            y = norm(x, f"{block}.norm1").reshape(-1, side, side, dim).roll((-shift, -shift), (1, 2))
            q, k, v = dense(windows(y), f"{block}.attn.qkv").unflatten(2, (3, HEADS[stage], -1)).permute(2, 0, 3, 1, 4)
            logits = q @ k.mT / math.sqrt(dim / HEADS[stage])
            if f"{block}.attn.relative_position_bias_table" in weights:
                table = weights[f"{block}.attn.relative_position_bias_table"]
                logits = logits + table[relative].permute(2, 0, 1)
            if shift:
                per_image = shift_mask(side, shift)
                logits = logits + per_image.repeat(len(images), 1, 1)[:, None]
            y = dense((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
            y = y.reshape(len(images), side // WINDOW, side // WINDOW, WINDOW, WINDOW, dim).transpose(2, 3)
            x = x + y.reshape(len(images), side, side, dim).roll((shift, shift), (1, 2)).flatten(1, 2)
            x = x + dense(gelu(dense(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        if stage < 3:
            x = x.reshape(len(images), side, side, dim)
            x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1).flatten(1, 2)
            x = dense(norm(x, f"layers.{stage}.downsample.norm"), f"layers.{stage}.downsample.reduction")
    return dense(norm(x, "norm").mean(dim=1), "head")


TABLE = {"absolute_pos_embed.weight": (NUMBER + 1, DIM)}
HEAD = {"dlocr.layers.0.weight": (DIM, DIM), "dlocr.layers.0.bias": (DIM,)}
HEAD |= {"dlocr.layers.2.weight": (2, DIM), "dlocr.layers.2.bias": (2,)}
SWINS = {
    "mjp": TABLE | HEAD,
    "no unknown": {"absolute_pos_embed": (1, NUMBER, DIM)},
    "index, no bias": TABLE | {"bias": False, "index_embed": (1, NUMBER, DIM)},
}


@pytest.mark.parametrize("name", SWINS)
def test_official_swins_give_their_logits(tmp_path, name):
    weights = swin_weights(**SWINS[name])
    torch.save({"model": weights, "epoch": 299, "max_accuracy": 81.0}, tmp_path / "swin.pth")
    model = load_model(tmp_path / "swin.pth").double()
    doubled = {key: value.double() for key, value in weights.items()}
    images = picture(224, 1).double()
    torch.testing.assert_close(model(images), swin_logits(doubled, images), rtol=0, atol=1e-6)
    hides = "absolute_pos_embed.weight" in weights
    assert model.hides_positions == hides and model.arguments["image_size"] == 224
    assert (model.index_embed is not None) == ("index_embed" in weights)
    assert model.arguments.get("localization", "none") == ("nonlinear" if len(SWINS[name]) > 4 else "none")
    assert model.arguments.get("relative_position_bias", True) == (name != "index, no bias")
    if hides:
        mask = torch.rand(1, NUMBER, generator=torch.Generator().manual_seed(2)) < 0.3
        shown = model(images, mask)
        torch.testing.assert_close(shown, swin_logits(doubled, images, mask), rtol=0, atol=1e-6)
        assert (shown - model(images)).abs().max() > 1e-3
    if name == "mjp":
        own = {key.replace("dlocr", "localization"): value for key, value in weights.items()}
        torch.save(own, tmp_path / "own.pth")
        assert_same_weights(load_model(tmp_path / "own.pth"), load_model(tmp_path / "swin.pth").state_dict())


def test_positions_of_a_swin_go_back_to_the_official_names():
    weights = {key: value for key, value in swin_weights(**TABLE, **HEAD).items() if "attn_mask" not in key}
    back = to_official(from_official(weights))
    assert back.keys() == weights.keys() and all(back[key].equal(value) for key, value in weights.items())
    plain = swin_weights(absolute_pos_embed=(1, NUMBER, DIM))
    assert to_official(from_official(plain)).keys() == plain.keys()


def test_a_swin_of_version_2_is_still_refused(tmp_path):
    weights = swin_weights(bias=False) | {"layers.0.blocks.0.attn.logit_scale": torch.ones(3, 1, 1)}
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match="Swin of version 2"):
        load_model(tmp_path / "a.pth")


def test_windows_without_bias_are_those_of_a_bias_of_zero():
    shape = {"image_size": 32, "embed_dim": 12, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
    with_bias, without = (build_model("swin_tiny", relative_position_bias=on, **shape).eval() for on in (True, False))
    missing = with_bias.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert missing and all(key.endswith("relative_position_bias_table") for key in missing)
    for key in missing:
        nn.init.zeros_(with_bias.get_parameter(key))
    torch.testing.assert_close(without(picture()), with_bias(picture()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["model.", "backbone.features."])
def test_official_resnet50_gives_its_logits(tmp_path, wrapper):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=CLASSES)
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1), nn.init.uniform_(layer.running_var, 0.5, 1.5)
    theirs = theirs.double().eval()
    body = nn.Sequential(*list(theirs.children())[:-1])
    weights = {f"{wrapper}{key}": value.float() for key, value in body.state_dict().items()}
    weights |= {f"fc.{key}": value.float() for key, value in theirs.fc.state_dict().items()}
    torch.save({"model": weights, "epoch": 299}, tmp_path / "resnet.pth")
    model = load_model(tmp_path / "resnet.pth").double()
    theirs = theirs.float().double()
    images = picture(64, 2).double()
    torch.testing.assert_close(model(images), theirs(images), rtol=0, atol=1e-6)
    assert model.arguments["name"] == "resnet50" and not model.hides_positions


def big_vision(name: str) -> str:
    """The name that a newer file gives to an array of an older one."""
    for old, new in {"MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0", "MlpBlock_3": "MlpBlock_0",
                     "LayerNorm_2": "LayerNorm_1", "Transformer/posembed_input/pos": "pos"}.items():  # fmt: skip
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("layout", ["vision_transformer", "big_vision"])
def test_jax_vits_load_without_a_name(tmp_path, layout):
    model = build_model("vit", image_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4).eval()
    arrays = google(model.state_dict(), 3)
    if layout == "big_vision":
        arrays = {f"params/{big_vision(name)}": value for name, value in arrays.items()}
    np.savez(tmp_path / "vit.npz", **arrays)
    loaded = load_model(tmp_path / "vit.npz")
    assert loaded.arguments["num_heads"] == 3 and "num_heads" not in loaded.assumed
    torch.testing.assert_close(loaded(picture()), model(picture()), rtol=0, atol=1e-6)
    for absent, words in (("cls", "without a class token"), ("head/kernel", "with a classifier")):
        np.savez(tmp_path / "less.npz", **{name: value for name, value in arrays.items() if not name.endswith(absent)})
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "less.npz")
    np.savez(
        tmp_path / "more.npz", **arrays | {next(iter(arrays)).replace("cls", "pre_logits/kernel"): np.ones((2, 2))}
    )
    with pytest.raises(UserError, match="between the class token and the classifier"):
        load_model(tmp_path / "more.npz")
    np.savez(tmp_path / "object.npz", **arrays | {"x": np.array([{}], dtype=object)})
    assert load_model(tmp_path / "object.npz")(picture()).equal(loaded(picture()))  # never unpickled
