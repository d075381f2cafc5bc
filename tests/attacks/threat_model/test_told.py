"""What the server of a round is told, and what it infers (leak.py, knowledge.py)."""

import math

import pytest
import torch
from torch import Tensor

from attacks.threat_model.client import Client, share
from attacks.threat_model.knowledge import known_mask, pixel_bounds
from attacks.threat_model.leak import Leak, LocalSteps, Reconstruction, vectorized
from defenses.noise import Noise
from models.jigsaw import Jigsaw, shuffle_patches
from tests.attacks.threat_model.test_leak import LOCALS, UNDEFENDED, batch_for, net, vit
from utils.errors import UserError


def test_what_the_server_is_told():
    model = net()
    private = batch_for(model, ratio=0.5)
    options = {"mean": [0.5, 0.4, 0.3], "std": (0.2, 0.3, 0.4), "local": LOCALS[1], "training": True, "dropout_seed": 3}
    leak = share(model, private, UNDEFENDED, False, **options)
    assert (leak.image_shape, leak.batch_size, leak.labels) == ((3, 8, 8), 2, None)
    assert (leak.mean, leak.std, leak.local) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), LOCALS[1])
    assert leak.training and leak.dropout_seed == 3
    assert share(model, private, UNDEFENDED, True).labels.equal(private.labels)


@pytest.mark.parametrize(
    "attacker_knowledge, told, knows",
    [
        ("none", [], []),
        ("method", [], ["mask", "shuffled_mask"]),
        ("mask", ["mask"], ["mask", "shuffled_mask"]),
        ("permutation", *[["mask", "source"]] * 2),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_what_is_told_and_what_is_inferred(attacker_knowledge, told, knows, number):
    model = vit(unknown=True)
    private = batch_for(model, number=number, ratio=0.5)
    leak = share(model, private, UNDEFENDED, True, attacker_knowledge=attacker_knowledge)
    assert [name for name in ("mask", "source") if getattr(leak, name) is not None] == told
    puzzle = known_mask(leak)
    assert sorted(puzzle) == knows
    truth = {"mask": private.mask, "shuffled_mask": private.mask, "source": private.source}
    assert all(puzzle[name].equal(truth[name]) for name in knows)
    if "source" in knows:
        shown = shuffle_patches(private.images, puzzle["source"], model.patch_size)
        assert shown.equal(private.model_input) and not shown.equal(private.images)


def test_the_mask_survives_local_steps_and_not_withholding():
    model = vit(unknown=True)
    private = batch_for(model, number=3, ratio=0.5)
    leak = share(model, private, UNDEFENDED, True, local=LocalSteps(2, 0.1, 2))
    assert known_mask(leak)["mask"].equal(private.mask)
    assert not known_mask(share(model, private, UNDEFENDED, True, withhold=["pos_embed"]))
    assert known_mask(share(model, private, UNDEFENDED, True, withhold=["pos_embed"], attacker_knowledge="mask"))


def test_models_that_hide_nothing_have_no_mask():
    for model in (vit(), net()):
        private = batch_for(model, ratio=0.5)
        assert not known_mask(share(model, private, UNDEFENDED, True))
        puzzle = known_mask(share(model, private, UNDEFENDED, True, attacker_knowledge="mask"))
        assert list(puzzle) == ["shuffled_mask"] and puzzle["shuffled_mask"].equal(private.mask)
        assert sorted(known_mask(share(model, private, UNDEFENDED, True, attacker_knowledge="permutation"))) == [
            "source"
        ]


def test_the_box_is_black_to_white():
    leak = Leak(net(), {}, (3, 8, 8), 1, mean=(0.5, 0.45, 0.4), std=(0.25, 0.24, 0.26))
    low, high = pixel_bounds(leak, torch.zeros((), dtype=torch.float64))
    for value, pixel in ((low, 0.0), (high, 1.0)):
        assert value.shape == (3, 1, 1) and value.dtype == torch.float64
        torch.testing.assert_close(
            value.flatten() * torch.tensor(leak.std).double() + torch.tensor(leak.mean).double(),
            torch.full((3,), pixel, dtype=torch.float64),
            atol=1e-7,
            rtol=0,
        )


def test_missing_and_broken_gradients_are_named():
    leak = Leak(net(), {"conv.bias": torch.tensor([1.0, math.nan])}, (3, 8, 8), 1)
    with pytest.raises(UserError, match="attack 'some' needs the gradient of 'fc.bias', which this leak does not have"):
        leak.gradient("fc.bias", "some")
    with pytest.raises(UserError, match="the gradient of 'conv.bias' holds NaN or infinity"):
        leak.gradient("conv.bias", "some")


def test_a_vectorized_attack_takes_one_leak_or_several():
    calls = []

    @vectorized
    def attack(leaks, *, generator, scale: float = 1.0):
        calls.append((len(leaks), len(generator)))
        return [Reconstruction(scale * torch.ones(leak.batch_size)) for leak in leaks]

    one, other = (Leak(net(), {}, (3, 8, 8), number) for number in (1, 2))
    assert attack(one, generator=torch.Generator(), scale=2.0).images.tolist() == [2.0]
    assert [len(result.images) for result in attack([one, other], generator=[torch.Generator()] * 2)] == [1, 2]
    assert calls == [(1, 1), (2, 2)] and attack.vectorized


def test_a_clients_round_depends_on_its_seed_and_index_alone():
    model = vit(unknown=True)
    images = batch_for(model).images
    terms = {
        "reveal_labels": True,
        "local": (2, 0.1, 1),
        "attacker_knowledge": "mask",
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
    }
    noisy = {"defense": Noise(std=0.1), "classes": ["cat", "dog"]}

    def play(index: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        client = Client(model, Jigsaw(model.grid, 0.5, "uniform", seed=seed), **noisy, seed=seed, terms=terms)
        private, leak, own = client.round(index, images, ["dog", "cat"])
        assert leak.labels.tolist() == [1, 0] and leak.local == LocalSteps(2, 0.1, 1)
        assert leak.mask.equal(private.mask[0]) and leak.std == (0.2, 0.2, 0.2)
        return leak.gradients["head.bias"], leak.mask, torch.randn(3, generator=own)

    first, again = play(4), play(4)
    assert all(one.equal(other) for one, other in zip(first, again, strict=True))
    for other in (play(5), play(4, seed=1)):
        assert not any(one.equal(two) for one, two in zip(first, other, strict=True))
