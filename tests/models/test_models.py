"""models/: every name builds and classifies, weights follow the seed, names and sizes are those of timm and MJP."""

from typing import get_args

import pytest
import timm
import torch
from torch import nn

import options
from attacks import ATTACKS
from data.folders import DATASETS
from defenses import DEFENSES
from models import MODELS, build_model
from models.jigsaw import MASK_SAMPLERS, shuffle_patches
from models.localization import LOCALIZATION_HEADS
from models.official import to_official
from utils.errors import UserError
from utils.schema import option_types

TIMM = {
    "vit": "vit_base_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "resnet50": "resnet50",
    "resnet18": "resnet18",
}
# Parameters with 1000 classes: mjp.md 3 and 5 for DeiT-S and its MJP parts, the papers' tables rounded for the others.
PARAMETERS = {
    "deit_tiny": 5_717_416,
    "deit_small": 22_050_664,
    "deit_base": 86_567_656,
    "swin_tiny": 28_288_354,
    "swin_small": 49_606_258,
    "swin_base": 87_768_224,
    "swin_large": 196_532_476,
    "resnet50": 25_557_032,
    "resnet18": 11_689_512,
}
MJP_SMALL = {
    "mjp_s_unk": ({"unknown": True}, 22_051_048),
    "mjp_s_idx": ({"unknown": True, "index_embed": True}, 22_126_696),
    "mjp_s_linear": ({"unknown": True, "localization": "linear"}, 22_051_818),
    "mjp_s_nonlinear": ({"unknown": True, "localization": "nonlinear"}, 22_199_658),
    "mjp_s_pca": ({"unknown": True, "localization": "pca"}, 22_051_048),
}
SMALL_VIT = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}


def without_weights(name: str, **options) -> nn.Module:
    """The model with its names and shapes only, whatever its size."""
    with torch.device("meta"):
        return build_model(name, **options)


def shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in weights.items()}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("height", "classes"), [(32, 7), (64, 3)])
def test_every_model_maps_images_to_logits(name, height, classes):
    model = without_weights(name, num_classes=classes, image_size=height)
    images = torch.zeros(2, 3, height, height, device="meta")
    assert model(images).shape == (2, classes)
    assert model.features(images).shape == (2, model.num_features)
    assert model.grid == (height // model.patch_size, height // model.patch_size)
    assert model.patch_size == (16 if name.startswith(("vit", "deit")) or name in ("resnet18", "resnet50") else 4)
    assert model.arguments == {"name": name, "num_classes": classes, "image_size": height}
    assert model.normalize is None and model.classes is None
    assert not model.hides_positions


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("vit", "deit", "swin"))])
def test_every_transformer_takes_a_mask_when_it_has_an_unknown_embedding(name):
    model = without_weights(name, num_classes=7, image_size=32, unknown=True, localization="nonlinear")
    number = model.grid[0] * model.grid[1]
    for rows in (1, 2):
        mask = torch.zeros(rows, number, dtype=torch.bool, device="meta")
        assert model(torch.zeros(2, 3, 32, 32, device="meta"), mask).shape == (2, 7)
    assert model.hides_positions
    assert model.patch_pos_embed().shape == (number, model.embed_dim)


@pytest.mark.parametrize("name", TIMM)
def test_names_and_shapes_are_timms(name):
    model = without_weights(name)
    with torch.device("meta"):
        expected = timm.create_model(TIMM[name], pretrained=False)
    assert shapes(model.state_dict()) == shapes(expected.state_dict())


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name):
    assert count(without_weights(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", MJP_SMALL)
def test_sizes_of_mjp_models_are_the_official_ones(name):
    options, parameters = MJP_SMALL[name]
    assert count(without_weights("deit_small", **options)) == parameters


@pytest.mark.parametrize("name", ["deit_s", *MJP_SMALL])
def test_names_and_shapes_are_the_official_ones(golden, name):
    official = golden("mjp_reference_facts.json")["models"][name]
    model = without_weights("deit_small", **MJP_SMALL.get(name, ({}, 0))[0])
    assert shapes(to_official(model.state_dict())) == {k: tuple(v) for k, v in official["names_shapes"].items()}
    assert count(model) == official["n_params"]


def test_initial_weights_are_spread_like_the_official_ones(golden):
    official = golden("mjp_reference_facts.json")["models"]["mjp_s_nonlinear"]
    model = build_model("deit_small", unknown=True, localization="nonlinear", pos_embed_std=1.0)
    weights = to_official(model.state_dict())
    del official["init_std"]["cls_token"]  # 1e-6 in today's timm; its position embedding spreads as before
    for name, std in official["init_std"].items():
        # Five standard errors of both samples, and of the mean where nothing is drawn.
        error = 5 * std * (1 / weights[name].numel()) ** 0.5
        assert abs(weights[name].std().item() - std) <= error, name
        assert abs(weights[name].mean().item() - official["init_mean"][name]) <= 1.5 * error, name
        assert std > 0 or not weights[name].std(), name


@pytest.mark.parametrize(
    ("std", "options"), [(0.02, {}), (0.02, {"pos_embed_std": 0.02}), (1.0, {"pos_embed_std": 1.0})]
)
def test_position_embeddings_start_with_the_chosen_spread(std, options):
    for name, size in (("vit", SMALL_VIT), ("swin_tiny", SMALL_SWIN)):
        model = build_model(name, **{**size, "embed_dim": 48}, unknown=True, **options)
        assert model.pos_embed.std().item() == pytest.approx(std, rel=0.15)
        assert model.unknown_pos_embed.std().item() == pytest.approx(std, rel=0.5)


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small"])
def test_without_a_mask_deit_gives_timms_logits(name):
    torch.manual_seed(0)
    size = {"img_size": 32, "num_classes": 10, "depth": 3}
    expected = timm.create_model(TIMM[name], pretrained=False, **size).eval()
    nn.init.normal_(expected.pos_embed)
    model = build_model(name, num_classes=10, image_size=32, depth=3, unknown=True, localization="nonlinear").eval()
    left = model.load_state_dict(expected.state_dict(), strict=False)
    assert left.unexpected_keys == []
    assert all(key.startswith(("localization.", "unknown_pos_embed")) for key in left.missing_keys)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), expected(images), rtol=0, atol=1e-6)
    assert expected(images).std() > 1e-3


def test_a_fresh_index_embedding_changes_nothing():
    plain, indexed = (build_model("vit", **SMALL_VIT, index_embed=index).eval() for index in (False, True))
    images = torch.randn(2, 3, 16, 16)
    assert indexed(images).equal(plain(images))
    nn.init.ones_(indexed.index_embed)
    assert not indexed(images).equal(plain(images))


@pytest.mark.parametrize(("name", "size"), [("vit", SMALL_VIT), ("swin_tiny", SMALL_SWIN)])
def test_weights_depend_on_the_seed_alone(name, size):
    torch.manual_seed(1)
    one = build_model(name, **size, seed=5).state_dict()
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1).equal(after)  # building draws nothing from the global generator
    same, other = (build_model(name, **size, seed=seed).state_dict() for seed in (5, 6))
    for key in one:
        assert same[key].equal(one[key]), key
    assert not other["patch_embed.proj.weight"].equal(one["patch_embed.proj.weight"])


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit", SMALL_VIT, {"unknown": True}),
        ("vit", SMALL_VIT, {"unknown": True, "index_embed": True, "localization": "nonlinear"}),
        ("vit", SMALL_VIT, {"localization": "linear"}),
        ("swin_tiny", SMALL_SWIN, {"unknown": True, "localization": "nonlinear"}),
    ],
)
def test_the_variants_of_one_seed_share_their_common_weights(name, size, options):
    plain, variant = build_model(name, **size).state_dict(), build_model(name, **size, **options).state_dict()
    assert plain.keys() < variant.keys()
    for key in plain:
        assert variant[key].equal(plain[key]), key


def test_features_are_what_the_classifier_reads():
    for name, size in (("vit", SMALL_VIT), ("swin_tiny", SMALL_SWIN)):
        model = build_model(name, num_classes=4, unknown=True, **size).eval()
        classifier = model.head if name == "vit" else model.head.fc
        images = torch.randn(2, 3, 16, 16)
        mask = torch.arange(model.grid[0] * model.grid[1])[None] < 5
        for hidden in (None, mask):
            torch.testing.assert_close(classifier(model.features(images, hidden)), model(images, hidden))
        assert not model(images, mask).equal(model(images))


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UserError, match="unknown model 'deit_smal': did you mean 'deit_small'"):
        build_model("deit_smal")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"image_size": 30, "patch_size": 16}),
        ("vit", {"image_size": 8, "patch_size": 16}),
        ("deit_tiny", {"image_size": 100}),
        ("swin_tiny", {"image_size": 102}),
        ("deit_tiny", {"patch_size": 15}),
    ],
)
def test_images_that_patches_do_not_tile_are_refused(name, options):
    with pytest.raises(UserError, match="not divisible"):
        without_weights(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("resnet50", {"unknown": True}, "unknown"),
        ("resnet50", {"localization": "linear"}, "localization"),
        ("resnet50", {"index_embed": True}, "index_embed"),
        ("deit_tiny", {"windows": 7}, "windows"),
        ("vit", {"embed_dim": 10, "num_heads": 3}, "divisible"),
        ("vit", {"localization": "liner"}, "did you mean 'linear'"),
        ("vit", {"dynamic_img_size": True}, "puzzle of fixed size"),
        ("vit", {"dynamic_img_pad": True}, "puzzle of fixed size"),
        ("vit", {"pos_embed": "none"}, "set positions to learned, sinusoidal, tied, none, rotary"),
        ("vit", {"global_pool": ""}, "choose token, avg"),
        ("vit", {"class_token": False}, "set global_pool avg"),
        ("vit", {"no_embed_class": True, "positions": "tied"}, "leave out no_embed_class"),
    ],
)
def test_options_a_model_does_not_have_are_refused(name, options, problem):
    with pytest.raises(UserError, match=problem):
        without_weights(name, **options)


PREFIXES = [
    {"no_embed_class": True},
    {"reg_tokens": 2},
    {"reg_tokens": 2, "no_embed_class": True},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    {"global_pool": "max"},
]


@pytest.mark.parametrize("options", PREFIXES)
def test_tokens_in_front_of_the_patches_are_timms_and_no_mask_hides_them(options):
    model = build_model("vit", **SMALL_VIT, **options, unknown=True, num_classes=5).eval()
    size = {"img_size": SMALL_VIT["image_size"]} | {k: v for k, v in SMALL_VIT.items() if k != "image_size"}
    timms = timm.models.vision_transformer.VisionTransformer(**size, **options, num_classes=5).eval()
    timms.load_state_dict({key: value for key, value in model.state_dict().items() if key != "unknown_pos_embed"})
    images, number = torch.rand(2, 3, *[SMALL_VIT["image_size"]] * 2), model.grid[0] * model.grid[1]
    mask = torch.zeros(1, number, dtype=torch.bool)
    torch.testing.assert_close(model(images), timms(images))
    torch.testing.assert_close(model(images, mask), timms(images))
    mask[0, :3] = True
    source = torch.arange(number)[None].clone()
    source[0, :3] = torch.tensor([1, 2, 0])
    moved = shuffle_patches(images, source, model.patch_size)
    torch.testing.assert_close(model(images, mask, source), model(moved, mask))
    model(images, mask).sum().backward()
    hidden = (model.pos_embed.grad[0] == 0).all(dim=1).nonzero()[:, 0] - model.prefix_rows
    assert hidden.tolist() == [0, 1, 2] and model.patch_pos_embed().shape == (number, model.embed_dim)


@pytest.mark.parametrize("options", PREFIXES[1:5])
def test_rotary_positions_turn_the_patches_alone(options):
    """Prefix tokens see the patches as a set, whatever their number is: turned ones would tell places apart."""
    model = build_model("vit", **SMALL_VIT | {"num_heads": 1}, **options, positions="rotary").eval()
    rotary = model.blocks[0].attn
    assert rotary.cos.shape[0] == model.num_prefix_tokens + model.grid[0] * model.grid[1]
    assert bool((rotary.sin[: model.num_prefix_tokens] == 0).all()) and bool(rotary.sin[-1].any())
    assert model(torch.rand(1, 3, *[SMALL_VIT["image_size"]] * 2)).isfinite().all()


def test_options_left_at_none_are_not_passed():
    model = build_model("vit", **SMALL_VIT, unknown=None, localization=None)
    assert model.arguments == {"name": "vit", "num_classes": 1000, **SMALL_VIT}


def choices(hint) -> set:
    """The values of a Literal, also of one that may be None."""
    return {value for argument in get_args(hint) for value in (get_args(argument) or [argument])} - {type(None)}


@pytest.mark.parametrize(
    ("name", "registry"),
    [
        ("mask_sampler", MASK_SAMPLERS),
        ("dataset", DATASETS),
        ("attack", ATTACKS),
        ("defense", DEFENSES),
        ("localization", {"none", *LOCALIZATION_HEADS}),
    ],
)
def test_the_command_line_offers_exactly_what_is_registered(name, registry):
    schemas = [getattr(options, schema) for schema in options.__all__]
    hints = [hint for schema in schemas for key, hint in option_types(schema).items() if key.split(".")[-1] == name]
    assert hints
    for hint in hints:
        assert choices(hint) == set(registry)
