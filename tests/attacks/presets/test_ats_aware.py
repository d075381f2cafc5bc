"""The attacker who knows the policy puts a shifted picture back, direction and chain found without the truth."""

from functools import partial

import pytest
import torch
from skimage.data import astronaut

from attacks.linear.closed_form import closed_form
from attacks.presets.ats_aware import ats_aware, undo
from attacks.threat_model.client import Client
from defenses import build_defense
from defenses.ats.policies import parse, transform
from models import build_model
from models.jigsaw import Jigsaw
from utils.errors import UserError

PHOTO = torch.from_numpy(astronaut()[30:190:5, 140:300:5].copy()).permute(2, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_shifts_are_undone_in_the_right_direction(seed):
    chains = parse("3-7+0")
    seen = transform(PHOTO, chains, torch.Generator().manual_seed(seed))
    found, name = undo(seen, chains)
    if name == "+0":
        assert found.equal(PHOTO)
    else:
        kept = (found == PHOTO).all(dim=0).float().mean()
        assert kept > 0.45 and (seen == PHOTO).all(dim=0).float().mean() < 0.2  # 17 of 32 columns, 28 of 32 rows


@pytest.mark.parametrize("policy", ["1", "15", "27"])
def test_enhancements_are_undone_up_to_clipping(policy):
    seen = transform((PHOTO // 2 + 50), parse(policy), torch.Generator().manual_seed(0))
    found, _ = undo(seen, parse(policy))
    assert (found.float() - (PHOTO // 2 + 50)).abs().mean() <= (seen.float() - (PHOTO // 2 + 50)).abs().mean()


def test_whole_attack_against_a_client_with_ats():
    model = build_model("vit", num_classes=3, image_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3).eval()
    terms = {"reveal_labels": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    client = Client(model, Jigsaw(model.grid, 0), build_defense("ats", {"policies": "3-7"}), 0, terms, ["a"])
    private, leak, generator = client.round(0, (PHOTO[None].float() / 255 - 0.5) / 0.25, ["a"])
    unaware = closed_form(leak, generator=generator)
    aware = ats_aware(leak, generator=generator, policies="3-7", base="closed_form")
    assert (unaware.images - private.model_input).abs().max() < 1e-2  # the transformed picture leaks exactly
    errors = [(found.images - private.images).square().mean() for found in (unaware, aware)]
    assert errors[1] < errors[0] / 2 and aware.diagnostics["undone"]
    assert not (aware.diagnostics["exact"] or aware.diagnostics["exact_up_to_order"])  # of the original, unlike:
    assert unaware.diagnostics["exact_up_to_order"]
    with pytest.raises(UserError, match="unknown base attack"):
        partial(ats_aware, leak, generator=generator)(base="dlg")
