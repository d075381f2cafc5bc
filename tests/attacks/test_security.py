"""attacks/security.py: the index of every target as published, and what attacks on ViTs really leave open."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from attacks.linear.closed_form import closed_form
from attacks.linear.mjp_aware import mjp_aware
from attacks.linear.token_span import token_span
from attacks.security import exposure, index, security, security_text
from attacks.threat_model.applicable import preview_leak, unmet_requirement
from attacks.threat_model.client import PrivateBatch, prepare, share
from attacks.threat_model.leak import Leak
from defenses import no_defense
from models import build_model
from models.chains import TARGETS
from models.jigsaw import Jigsaw, patchify
from tests.attacks.timm_victims import of_timm
from utils.errors import UserError

# Deficiencies by layer, from the image on, as measured on the original networks at 32 pixels.
DEFICIENCIES = {
    "cnn2_c0": [-2821], "cnn2_c1": [0], "cnn2_c11": [0], "cnn2_c2": [-1470], "cnn2_c21": [-1470], "cnn2_c4": [-2146],
    "cnn2_c41": [-2146], "cnn2_c5": [0], "cnn2_c6": [-189], "cnn3_c2": [-1470, -1050], "cnn3_c3": [0, 0],
    "cnn3_c4": [-2146, 0], "cnn3_c8": [0, -7089], "cnn3_c9": [0, 0], "cnn3_c5": [0, -4644], "cnn4_c1": [0, -3965, -386],
    "cnn4_c2": [0, -9316, 0], "cnn4_c3": [0, -330, 0], "lenet2": [0, 0, 0], "lenet_leaky": [0, 0, 0],
    "cnn6d": [0, -280, 0, 0, 0, 0], "cnn6": [0] * 6, "fcn3": [0, 0],
    **dict.fromkeys(["cnn3_c1", *(f"cnn3_c{k}" for k in (6, 7, 11, 12, 13, 14, 15))], [0, -4533]),
    **dict.fromkeys(["cnn3_c21", "cnn3_c22"], [-1470, -1050]), **dict.fromkeys(["cnn3_c31", "cnn3_c32"], [0, 0]),
    **dict.fromkeys(["cnn3_c41", "cnn3_c42"], [-2146, 0]),
}  # fmt: skip
TOTALS = {
    "cnn3_c1": -2266.5,
    "cnn3_c2": -1995,
    "cnn3_c8": -3544.5,
    "cnn4_c1": -2772,
    "cnn4_c3": -220,
    "cnn6d": -233 - 1 / 3,
}
ROUNDED = {"cnn3_c1": -2266, "cnn3_c8": -3544, "cnn4_c2": -6211, "cnn6d": -233}  # half to even, layer by layer
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL = {"image_size": 32, "patch_size": 8, "depth": 3, "num_heads": 1, "num_classes": 10}  # 16 patches of 192 values


def test_the_table_holds_every_target():
    assert DEFICIENCIES.keys() == TARGETS.keys()


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_the_index_of_every_target(name):
    found = security(build_model(name, num_classes=10, image_size=32))
    assert [row["deficiency"] for row in found["layers"]] == DEFICIENCIES[name]
    assert found["layers"][0]["weight"] == 1 and found["index"] <= 0
    if name in TOTALS:
        assert found["index"] == pytest.approx(TOTALS[name])
    if name in ROUNDED:
        assert found["index_rounded"] == ROUNDED[name]
    assert f"index {found['index']:.6g}" in security_text(found)


def test_the_index_grows_with_the_image_size():
    small, large = (
        index(build_model("cnn2_c2", num_classes=10, image_size=side), (3, side, side)) for side in (32, 64)
    )
    assert large["index"] < 3 * small["index"] < 0


def victim(width: int, ratio: float, number: int = 1, **options) -> tuple[nn.Module, PrivateBatch, Leak]:
    torch.manual_seed(0)
    model = build_model("vit", embed_dim=width, unknown=ratio > 0, seed=1, **SMALL, **options).double()
    images = torch.rand(number, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    jigsaw = Jigsaw(model.grid, ratio, "uniform", seed=0)
    private = prepare(model, images, torch.arange(number), jigsaw, 0)
    return model, private, share(model, private, no_defense, True, mean=(0.5,) * 3, std=(0.5,) * 3)


def error_of(attack, private: PrivateBatch, leak: Leak) -> Tensor:
    options = {"underdetermined": True} if attack is closed_form else {}
    found = attack(leak, generator=torch.Generator().manual_seed(0), **options).images
    return (patchify(found, 8) - patchify(private.model_input, 8))[0][~private.mask[0]]


@pytest.mark.parametrize(
    "width, ratio", [(24, 0), (17, 0), (16, 0), (12, 0), (24, 0.0625), (32, 0.25), (32, 0.5), (40, 0.75)]
)
def test_what_the_closed_form_leaves_open_is_what_its_error_spans(width, ratio):
    model, private, leak = victim(width, ratio)
    row = exposure(model, mask_ratio=ratio)["attacks"][0]
    error = error_of(closed_form, private, leak)
    rank = int((torch.linalg.svdvals(error) > 1e-6).sum())
    if ratio < 0.1:  # every missing equation is missing for each of the 192 values of a patch
        assert rank == round(row["open_visible"] * 16 / 192) and row["exact"] == (rank == 0)
    else:  # known up to the span of the differences of hidden patches
        assert rank == min(row["open_visible"], len(error)) > 0


@pytest.mark.parametrize("width, exact", [(26, False), (27, True)])
def test_the_adaptive_attack_is_exact_just_where_it_says(width, exact):
    model, private, leak = victim(width, 0.5)
    assert exposure(model, mask_ratio=0.5)["attacks"][1]["exact"] == exact
    assert (error_of(mjp_aware, private, leak).square().mean().sqrt() < 1e-5) == exact


@pytest.mark.parametrize("number, options", [(1, {"withhold": ["pos_embed"]}), (2, {})])
def test_without_single_position_gradients_patches_are_known_to_a_span(number, options):
    model, private, leak = victim(40, 0, number)
    row = exposure(model, batch_size=number, **options)["attacks"][0]
    assert row["open_visible"] == number * 16 and not row["exact"]
    span = torch.linalg.svd(leak.gradients["patch_embed.proj.weight"].flatten(1), full_matrices=False)
    basis = span[2][span[1] > 1e-9 * span[1][0]]
    patches = patchify(private.model_input, 8).flatten(0, 1)
    assert len(basis) == row["open_visible"]
    torch.testing.assert_close(patches @ basis.T @ basis, patches, atol=1e-7, rtol=0)


def test_more_patches_than_equations_leave_them_all_open():
    model, _, leak = victim(24, 0, 2)  # 32 patches in 23 equations: their span is not to be had
    assert exposure(model, batch_size=2)["attacks"][0]["open_visible"] == 192
    assert torch.linalg.matrix_rank(leak.gradients["patch_embed.proj.weight"].flatten(1)) == 23


def test_other_withheld_gradients():
    model, _, _ = victim(32, 0.5)
    exact = {row["attack"] for row in exposure(model, mask_ratio=0.5)["attacks"] if row["exact"]}
    blind = exposure(model, mask_ratio=0.5, withhold=["blocks.0.*"])["attacks"]
    nothing = exposure(model, withhold=["patch_embed.*"])["attacks"]
    assert exact == {"mjp_aware", "joint"} and not any(row["exact"] for row in blind)
    assert [row["open_visible"] for row in blind] == [7, 16, 16, 16]  # the span of all where an attack does not apply
    assert {row["open_visible"] for row in nothing} == {192} and all(row["why"] for row in nothing)


def test_an_index_embedding_undoes_the_mask():
    model, _, _ = victim(32, 0.5, index_embed=True)
    assert exposure(model, mask_ratio=0.5)["attacks"][0]["exact"]
    assert not exposure(model, mask_ratio=0.5, withhold=["index_embed"])["attacks"][0]["exact"]


@pytest.mark.parametrize(
    "options", [{}, {"positions": "sinusoidal"}, {"positions": "tied"}, {"positions": "none"}, {"positions": "rotary"}]
)
def test_what_the_span_attack_leaves_open_without_position_gradients(options):
    model, _, leak = victim(40, 0, **options)
    row = exposure(model, withhold=["pos_embed"] if not options else [])["attacks"][2]
    alone = {"prior_steps": 0, "match_steps": 0, "underdetermined": True}  # the equations
    found = token_span(leak, generator=torch.Generator().manual_seed(0), **alone).diagnostics
    assert row["attack"] == "token_span" and row["open_visible"] == found["span"] - found["determined"]
    assert row["exact"] == found["exact"] == (not options)


def test_too_narrow_a_model_starves_the_span_attack():
    assert [exposure(victim(width, 0)[0])["attacks"][2]["open_visible"] for width in (33, 32, 24)] == [0, 1, 9]


FOREIGN = {
    "DINOv2": ("vit_small_patch14_dinov2", {"init_values": 0.1}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "BEiT": ("beit_base_patch16_224", {"init_values": 0.1}),
    "CLIP": ("vit_base_patch32_clip_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "too narrow": ("vit_tiny_patch16_224", {"img_size": 96}),
    "grey": ("vit_tiny_patch16_224", {"in_chans": 1}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("batch", [1, 2])
def test_it_promises_what_the_attacks_own_checks_allow(kind, batch):
    """Of networks from outside too: nothing is exact that an attack would refuse, and a refusal is in its words."""
    name, options = FOREIGN[kind]
    side = 2 * int(name.partition("_patch")[2][:2])
    model = of_timm(name, options.get("img_size", side), **{"img_size": side} | TINY | options)
    found = security(model, batch_size=batch)
    preview = preview_leak(model, batch, reveal_labels=True, local=None)
    for row in found["attacks"]:
        why = unmet_requirement(row["attack"], preview, {})
        assert row["exact"] == (not why) and why.endswith(row["why"]) and bool(why) == bool(row["why"])
        assert not why or row["why"] in security_text(found)
    assert found["values_per_patch"] == options.get("in_chans", 3) * model.patch_size**2
    assert found["largest_batch"] == max((number for number in range(1, 9) if not unmet_requirement(
        "joint", preview_leak(model, number, reveal_labels=True, local=None), {})), default=0)  # fmt: skip


def test_the_span_attack_is_counted_under_a_mask_as_it_measures():
    model, private, leak = victim(60, 0.5)
    row = exposure(model, mask_ratio=0.5)["attacks"][2]
    with torch.no_grad():
        model.unknown_pos_embed.add_(0.05)
    leak = share(model, private, no_defense, True, mean=(0.5,) * 3, std=(0.5,) * 3)
    told = replace(leak, attacker_knowledge="mask", mask=private.mask)
    alone = {"prior_steps": 0, "match_steps": 0, "underdetermined": True}
    found = token_span(told, generator=torch.Generator().manual_seed(0), **alone).diagnostics
    assert row["attack"] == "token_span" and row["open_visible"] == found["span"] - found["determined"] == 7


def test_it_says_in_words_what_stays_open():
    model, _, _ = victim(32, 0.5)
    text = security_text(security(model, mask_ratio=0.5))
    assert "hidden 8" in text and "7 of 192 numbers open per visible patch, 7 per hidden one" in text


def test_bad_input():
    chain = build_model("cnn2_c1", num_classes=10, image_size=12)
    for options in ({"batch_size": 2}, {"mask_ratio": 0.5}, {"withhold": ["fc.bias"]}):
        with pytest.raises(UserError, match="one plain image"):
            security(chain, **options)
    with pytest.raises(UserError, match="BatchNorm2d"):
        security(build_model("convnet", width=4, num_classes=10, image_size=32))


def test_the_largest_batch_is_the_one_that_joint_takes():
    model = build_model("vit", image_size=64, patch_size=16, embed_dim=192, depth=2, num_heads=3).eval()
    found = exposure(model, batch_size=3)
    assert found["largest_batch"] == 5  # 2 B (N + 1) = 170 of 191, and 204 for six
    opens = {number: exposure(model, batch_size=number)["attacks"][-1]["exact"] for number in (5, 6)}
    assert opens == {5: True, 6: False} and "largest batch 5" in security_text(found)


@pytest.mark.parametrize("batch, opens", [(1, 0), (3, 0), (4, 64)])
def test_a_larger_batch_does_not_protect_below_the_bound_of_joint(batch, opens):
    """2 B (N + 1) <= D - 1: for 16 patches and 120 dimensions up to three images."""
    found = exposure(build_model("vit", **SMALL | {"embed_dim": 120}), batch_size=batch)
    row = next(row for row in found["attacks"] if row["attack"] == "joint")
    assert row["open_visible"] == row["open_hidden"] == opens and row["exact"] == (opens == 0)


def test_joint_opens_everything_just_where_it_refuses_nothing():
    """On both sides of the bound by dimensions, and where the rows of the table have to make up for small patches."""
    says = []
    for positions, width, withhold in product(
        ("learned", "sinusoidal", "tied", "none"), (64, 68, 72), ([], ["pos_embed"])
    ):
        model = build_model(
            "vit", positions=positions, **SMALL | {"image_size": 12, "patch_size": 3, "embed_dim": width}
        )
        if withhold and "pos_embed" not in dict(model.named_parameters()):
            continue
        leak = preview_leak(model, 2, reveal_labels=True, local=None, withhold=withhold)
        rows = exposure(model, batch_size=2, withhold=withhold)["attacks"]
        says.append(next(row["exact"] for row in rows if row["attack"] == "joint"))
        assert says[-1] == (not unmet_requirement("joint", leak, {})), (positions, width, withhold)
    assert set(says) == {True, False}
