"""The joint attack on gradients in single precision, as clients share them."""

import copy

import pytest
import torch

from attacks.joint.block import Places
from attacks.joint.diagonal import tokens_of
from attacks.joint.joint import forms_of, joint
from attacks.joint.search import token_solver
from attacks.joint.token_solver import FITS, _complement
from attacks.linear.mjp_aware import mjp_aware
from attacks.threat_model.leak import RefusalError
from models.jigsaw import patchify
from tests.attacks.joint.test_joint import SMALL, as_set, bordered, in_place, leaked, normalised, pictures
from tests.attacks.small_victims import STD, generator, vit


def test_tokens_that_drown_in_single_precision_are_told():
    """A patch of one image that is almost that of the other, at the same place."""
    model, images = vit(depth=4, **SMALL).float(), pictures(2)
    told = []
    for apart in (1.0, 1e-4):
        images[1, :, :8, :8] = images[0, :, :8, :8] + apart * pictures(1, seed=3)[0, :, :8, :8]
        told.append(joint(leaked(model, images)[1], generator=generator()).diagnostics)
    assert [one["tokens"] for one in told] == [18, 18]
    assert told[0]["resolved"] == 1.0 and told[0]["found"] == 18
    assert told[1]["resolved"] < 1.0 and told[1]["found"] < 18


def test_a_token_keeps_its_equations_where_noise_drowns_a_direction_of_it():
    """Four patches that are nearly one: the gradient of the MLP's second layer shows 18 of 20 tokens above noise."""
    model, images = vit(depth=4, **SMALL).float(), pictures(2)
    for place in (0, 8, 16):
        images[1, :, :8, place : place + 8] = images[0, :, :8, :8] + 0.03 * pictures(1, seed=3 + place)[0, :, :8, :8]
    private, leak = leaked(model, images)
    given = []
    attention = copy.deepcopy(leak.model).double()
    attention.blocks[0].attn.proj.register_forward_hook(lambda module, inputs, output: given.append(inputs[0][:, 1:]))
    with torch.no_grad():
        attention(private.model_input.double())
    places = Places.of(leak)
    forms = forms_of(leak, places)
    solver = token_solver(forms, tokens_of(forms).mixed, generator())
    read = copy.copy(solver)
    read.checks = [*solver.checks[:2], _complement(solver.block.active, None, generator())]
    patches = patchify(private.model_input.double(), 8).flatten(0, 1)
    outputs = (given[0].flatten(0, 1) - solver.mean) @ (solver.mixes / solver.scale.square()[:, None]).T
    true = torch.cat([(patches - solver.point) @ solver.basis.T, outputs], dim=1)
    misfits = []
    for one in (solver, read):
        errors = [one.residual(token, places.rows[place % 9], slope=False)[0] for place, token in enumerate(true)]
        misfits.append(float(torch.stack(errors).square().mean(dim=1).sqrt().max()))
    assert misfits[0] < FITS[False] < misfits[1] / 10


def test_single_precision_is_enough_with_the_forms_of_several_blocks():
    model = vit(**SMALL | {"depth": 5}).float()
    private, leak = leaked(model, pictures(2))
    found = joint(leak, generator=generator())
    assert found.diagnostics["images"] == 2 and found.diagnostics["found"] > 12
    assert in_place(found, private).max() < 0.05


def test_single_precision_finds_each_patch_and_its_image():
    """What is claimed in float32 is right to its predicted error, from the mean of what attention returns."""
    private, leak = leaked(vit(**SMALL | {"depth": 5, "embed_dim": 120}).float(), pictures(3))
    found = joint(leak, generator=generator())
    assert found.diagnostics["found"] == found.diagnostics["tokens"] == 27 and found.diagnostics["exact"]
    assert in_place(found, private).max() < 40 * found.diagnostics["noise"] / min(STD)


def test_single_precision_finds_equal_patches_once_and_all_their_places():
    """25 patches, 16 of them in a border: one content, which the gradients do not tell apart at its places."""
    model = vit(**SMALL | {"image_size": 40, "depth": 5, "embed_dim": 180}).float()
    private, leak = leaked(model, bordered(pictures(2, side=40)))
    found = joint(leak, generator=generator())
    told = found.diagnostics
    assert told["tokens"] == told["found"] == 2 * 9 + 16 and told["images"] == 2
    assert in_place(found, private).max() < 0.05


def outside(found, private) -> tuple[int, int]:
    """Return (how many patches the certificate claims, how many of them lie outside their radius of every true one)."""
    true = patchify(private.model_input.double(), 8).flatten(0, 1)
    told, scale = found.certificate, torch.tensor(STD, dtype=torch.float64).repeat_interleave(64)
    away = torch.stack([((true - patch) * scale).abs().amax(dim=1).amin() for patch in told.patches.flatten(0, 1)])
    claimed = told.claimed.flatten()
    return int(claimed.sum()), int((away > told.radius.flatten())[claimed].sum())


def grey(seed: int) -> torch.Tensor:
    """Return a picture of 16 patches of one grey each, which are on one line."""
    greys = torch.rand(1, 1, 4, 4, generator=generator(seed), dtype=torch.float64)
    return normalised(0.3 + 0.3 * greys.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3).expand(1, 3, 32, 32))


@pytest.mark.parametrize("seed", [2, 6])
def test_a_mixture_of_dependent_patches_is_not_certified(seed):
    """Tokens of patches on one line are combinations of each other, and some of these fit all equations."""
    model = vit(**SMALL | {"image_size": 32, "depth": 4, "unknown": True}).float()
    private, leak = leaked(model, grey(seed), 0.3, seed)
    found = joint(leak, generator=generator())
    assert outside(found, private)[1] == 0 and not found.diagnostics["exact_up_to_order"]


def test_hidden_patches_that_are_all_equal_are_refused_and_nearly_equal_ones_solved():
    """Of one hidden token the form is a number, and no error shows in an antisymmetric part."""
    for apart, seed in ((0.0, 0), (2e-3, 1)):
        model = vit(**SMALL | {"image_size": 32, "depth": 4, "unknown": True}).float()
        with torch.no_grad():
            model.pos_embed *= 50
        patches = patchify(pictures(1, side=32, seed=seed), 8)
        patches = patches[:, :1] + apart * patches
        images = patches.view(1, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 32, 32)
        private, leak = leaked(model, images, 0.3)
        if not apart:
            with pytest.raises(RefusalError, match="all equal up to rounding"):
                joint(leak, generator=generator())
            continue
        found = joint(leak, generator=generator())
        assert outside(found, private)[1] == 0 and found.diagnostics["hidden"] == 1


def test_single_precision_takes_one_image_that_is_there_twice_for_one():
    images = pictures(1, side=32)
    private, leak = leaked(vit(**SMALL | {"image_size": 32, "depth": 4}).float(), torch.cat([images, images]))
    found = joint(leak, generator=generator())
    assert found.diagnostics["tokens"] == found.diagnostics["found"] == 16 and found.diagnostics["exact"]
    assert in_place(found, private).max() < 0.01


@pytest.mark.parametrize("depth", [2, 4])
def test_one_masked_image_in_single_precision_is_solved_from_where_adaptive_is(depth):
    """Visible patches are claimed and right, and hidden ones too where two blocks have forms, else what draws find."""
    model = vit(unknown=True, image_size=48, embed_dim=96, num_heads=3, depth=depth).float()
    private, leak = leaked(model, pictures(1, side=48), ratio=0.25)
    found, start = (attack(leak, generator=generator()) for attack in (joint, mjp_aware))
    hidden = private.mask[0]
    visible, before = (in_place(one, private)[0, ~hidden] for one in (found, start))
    assert int((visible < 0.01).sum()) >= 24 and visible.median() < before.median() / 10
    right = int((visible < 0.01).sum()) + int((as_set(found, private)[0, hidden] < 0.01).sum())
    assert 24 <= found.diagnostics["found"] <= right and not found.diagnostics["exact"]
    assert right == 36 or depth == 2


@pytest.mark.parametrize("images, ratio", [(1, 0.3), (2, 0.0)])
def test_one_block_is_refused(images, ratio):
    """Behind it only the class token is read, so that its MLP says nothing of the patches."""
    model = vit(**SMALL | {"image_size": 32, "depth": 1, "unknown": ratio > 0}).float()
    with pytest.raises(RefusalError, match="needs two blocks or more"):
        joint(leaked(model, pictures(images, side=32), ratio)[1], generator=generator())
