"""campaigns/interval.py and reports/interval.py: what is proved of a round, and how it is said."""

import math
from dataclasses import replace

import pytest
import torch

from attacks.linear.closed_form import closed_form
from attacks.linear.mjp_aware import mjp_aware
from attacks.threat_model.client import Client, Round
from attacks.threat_model.leak import Reconstruction
from campaigns.interval import interval, unordered
from defenses import build_defense
from models.jigsaw import Jigsaw
from reports.interval import bar, proved, sentence
from tests.attacks.small_victims import MEAN, STD, client, generator, swin, vit

BITS = 8 * 3 * 32 * 32


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 16),
        ({"unknown": True}, 16 - 5),
        ({"positions": "none"}, 1),
        ({"positions": "tied"}, 4),
        ({"positions": "rotary"}, 16),
    ],
)
def test_only_patches_that_the_model_cannot_tell_apart_have_no_order(options, groups):
    model = vit(**options)
    _, leak = client(model)
    assert len(unordered(leak, torch.arange(16) < 6).unique()) == groups


def test_a_model_that_sees_where_its_patches_are_hides_no_order():
    model = swin()
    _, leak = client(model)
    assert len(unordered(leak, torch.arange(64) < 6).unique()) == 64


class Turning(torch.nn.Module):
    """Mixes every patch with the next one, around the end: it sees no difference when all move on by one place."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens + tokens.roll(1, dims=1).sigmoid()


def test_an_order_is_hidden_only_where_every_order_is():
    model = vit(positions="none", class_token=False, global_pool="avg")
    _, leak = client(model)
    assert len(unordered(leak, torch.zeros(16, dtype=torch.bool)).unique()) == 1
    model.norm_pre = Turning()
    assert len(unordered(leak, torch.zeros(16, dtype=torch.bool)).unique()) == 16


@pytest.mark.parametrize("table", [torch.nn.Identity(), torch.zeros(1, 9, 48), torch.zeros(16, 48)])
def test_a_table_of_another_kind_says_nothing_of_an_order(table):
    model = vit()
    _, leak = client(model)
    del model.pos_embed
    model.pos_embed = table
    assert len(unordered(leak, torch.arange(16) < 6).unique()) == 16


def test_an_interval_is_between_the_attack_and_the_symmetry():
    private, leak = client(vit(unknown=True), ratio=0.4)
    one = Round(private, leak, generator())
    found = interval(one, mjp_aware(leak, generator=generator()))
    hidden = int(private.mask.sum())
    assert found == {"bits": BITS, "bits_leaked": pytest.approx((16 - hidden) * 192 * 8),
                     "bits_hidden": pytest.approx(math.log2(math.factorial(hidden))), "psnr_proved": None}  # fmt: skip
    assert interval(one, Reconstruction(private.images))["bits_leaked"] == 0
    assert interval(one._replace(private=None), Reconstruction(private.images))["bits_hidden"] == 0


def test_noise_of_the_client_hides_whatever_the_attack_says():
    model = vit().float()
    private, _ = client(model)
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True}
    for name, options, least in (("none", {}, 0.0), ("dp_sgd", {"noise_multiplier": 1.0}, BITS - 0.73)):
        own = Client(model, Jigsaw(model.grid, 0.0), build_defense(name, options), 0, terms, {"a": 1})
        one = own.round(0, private.images.float(), ["a"])
        found = interval(one, closed_form(one.leak, generator=generator()))
        assert found["bits_hidden"] >= least and (found["bits_leaked"] > 0.9 * BITS) == (name == "none")
        assert interval(Round(replace(one.private, carried=math.inf), one.leak, one.generator),
                        Reconstruction(private.images))["bits_hidden"] == 0  # fmt: skip


def test_the_report_says_the_interval_and_that_nothing_certified_is_no_safety():
    rows = [{"bits": 1000.0, "bits_leaked": value, "bits_hidden": 250.0} for value in (400.0, 600.0)]
    found = proved(rows)
    assert found["leaked"] == {"mean": 500.0, "std": pytest.approx(141.42, rel=1e-3), "n": 2}
    says = sentence("joint", found)
    assert "joint proves 50.0 % leaked" in says and "25.0 % provably hidden" in says and says.endswith("25.0 % open.")
    assert 'class="open" style="width: 25.00%"' in bar("joint", found)
    nothing = sentence("dlg", proved([rows[0] | {"bits_leaked": 0.0, "bits_hidden": 0.0}]))
    assert "dlg certifies nothing; that is no sign of safety" in nothing and "none is provably hidden" in nothing
    assert proved([{"psnr": 3.0}]) is None


def test_a_planted_layer_that_only_its_gradient_shows_hides_no_order():
    model = vit(positions="none")
    _, leak = client(model)
    assert len(unordered(leak, torch.zeros(16, dtype=torch.bool)).unique()) == 1

    class Planted(type(model)):
        """Adds zero to the outputs, and the pixels in their places to a gradient."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images) + (images.flatten(1) @ self.planted)[:, None]

    model.planted = torch.nn.Parameter(torch.zeros(3 * 32 * 32, dtype=torch.float64))
    model.__class__ = Planted
    assert len(unordered(leak, torch.zeros(16, dtype=torch.bool)).unique()) == 16
