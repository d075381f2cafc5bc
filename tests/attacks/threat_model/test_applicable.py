"""What is said of the attacks before they work is what happens when they do."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from attacks import ATTACKS, FEATURES, SENTENCES
from attacks.threat_model.applicable import applicable, applicable_text, preview_leak, unmet_requirement
from attacks.threat_model.client import prepare, share
from attacks.threat_model.leak import LocalSteps, RefusalError
from attacks.threat_model.uses import ROWS
from defenses import no_defense
from models import build_model
from models.external import adopt
from models.jigsaw import Jigsaw
from utils.errors import UserError

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
# The least work for each attack: they only have to start.
SHORT = {"restarts": 1, "iterations": 1, "group": 0.0}
OPTIONS = {
    "mjp_aware": {"steps": 1, "hidden_steps": 1, "newton_steps": 0},
    "token_span": {"prior_steps": 1, "match_steps": 0},
    "first_block": {"starts": 2, "rounds": 1, "steps": 1},
    "joint": {},
    "ats_aware": {"base_options": SHORT},
    "defense_aware": SHORT | {"defense": "noise"},
    "levenberg_marquardt": {"defense": "noise", "base_options": SHORT, "steps": 0},
    "hybrid": {"iterations": 1, "deeper_iterations": 2},
    **dict.fromkeys(SENTENCES, {}),
}


def of_timm(name: str, **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=5, **options)
    adopt(network, f"timm:{name}", 32)
    return network.eval()


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
MODELS = {
    "vit": lambda: build_model("vit", **SMALL),
    "mjp": lambda: build_model("vit", unknown=True, **SMALL),
    "april": lambda: build_model("vit", **SMALL | {"april": True, "patch_size": 4}),
    "tied": lambda: build_model("vit", positions="tied", **SMALL),
    "sinusoidal": lambda: build_model("vit", positions="sinusoidal", **SMALL),
    "no positions": lambda: build_model("vit", positions="none", **SMALL),
    "lenet": lambda: build_model("lenet", num_classes=5),
    "chain": lambda: build_model("cnn2_c1", num_classes=5),
    "convnet": lambda: build_model("convnet", num_classes=5, width=4),
    "timm vit": lambda: of_timm("vit_tiny_patch16_224", **TINY),
    "timm vit without class row": lambda: of_timm("vit_tiny_patch16_224", **TINY, no_embed_class=True),
    "timm vit pooled": lambda: of_timm("vit_tiny_patch16_224", **TINY, class_token=False, global_pool="avg"),
    "timm pre-norm": lambda: of_timm("vit_tiny_patch16_224", **TINY, pre_norm=True),
    "timm resnet": lambda: of_timm("test_byobnet"),
}
TERMS = {
    "plain": {},
    "labels hidden": {"reveal_labels": False},
    "two images": {"batch": 2},
    "two steps": {"local": (2, 0.1, 1)},
    "no position gradient": {"withhold": ["pos_embed*"]},
    "no classifier": {"withhold": ["*head*", "fc*"], "reveal_labels": False},
}


def leaks(model: nn.Module, terms: dict):
    """(what is expected to leak, what leaks)."""
    batch, reveal = terms.get("batch", 1), terms.get("reveal_labels", True)
    known = [name for name, _ in model.named_parameters()]
    patterns = [p for p in terms.get("withhold", []) if any(p.strip("*") in name for name in known)]
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    private = prepare(model, images, torch.arange(batch), Jigsaw(model.grid, 0.0, seed=0), 0)
    local = terms.get("local")
    preview = preview_leak(model, batch, reveal_labels=reveal, local=local, withhold=patterns)
    local = LocalSteps(*local) if local else None
    leak = share(model, private, lambda gradients, step: no_defense(gradients), reveal, local=local)
    shared = {name: value for name, value in leak.gradients.items() if name in preview.gradients}
    return preview, replace(leak, gradients=shared)


CASES = [(model, "plain") for model in MODELS]
CASES += [(model, terms) for model in ("mjp", "chain") for terms in TERMS if terms != "plain"]


@pytest.mark.parametrize("model, terms", CASES)
def test_an_unmet_requirement_is_what_the_attack_would_raise(model, terms):
    preview, leak = leaks(MODELS[model]().eval(), TERMS[terms])
    for name, attack in ATTACKS.items():
        options = OPTIONS.get(name, SHORT if hasattr(attack, "preset") else {})
        says = unmet_requirement(name, preview, options)
        try:
            result = attack(leak, generator=torch.Generator().manual_seed(0), **options)
        except UserError as error:
            assert says == str(error), f"{name} on {model}, {terms}"
            named = str(error).startswith(f"attack '{name}'")
            assert isinstance(error, RefusalError) or not named, f"{name} on {model}, {terms}: {error}"
        else:
            assert not says, f"{name} on {model}, {terms}: works, but it is said that {says}"
            assert result.images.shape == (leak.batch_size * (name not in FEATURES), 3, 32, 32)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_declared_with_its_check_and_with_what_it_uses(name):
    attack = ATTACKS[name]
    assert callable(attack.check) and attack.__name__ == name
    assert callable(attack.uses) or set(attack.uses) <= set(ROWS)


def test_other_losses_and_unknown_dropout():
    model = build_model("vit", drop_path=0.1, **SMALL)
    plain = applicable(preview_leak(model, 1, reveal_labels=True, local=None))
    assert not plain["closed_form"] and not plain["dlg"]
    focal = applicable(preview_leak(model, 1, reveal_labels=True, local=None), loss="focal")
    assert not focal["closed_form"] and "the client's loss is 'focal'" in focal["dlg"]
    chain = preview_leak(MODELS["chain"](), 1, reveal_labels=True, local=None)
    for name in ("rgap", "hybrid"):
        assert not applicable(chain)[name] and "the client's loss is 'focal'" in applicable(chain, loss="focal")[name]
    dropped = applicable(preview_leak(model, 1, reveal_labels=True, local=None, training=True))
    assert "dropout" in dropped["inverting_gradients"] and "dropout" in dropped["token_span"]
    assert not dropped["closed_form"]  # what is dropped behind the tokens leaves its equations as they are
    text = applicable_text(dropped)
    assert (
        text.startswith("attacks that apply: closed_form, mjp_aware, joint\n")
        and "  dlg                  no: would have to know" in text
    )


def test_images_that_are_no_whole_patches_are_said_to_be():
    """Of 36 pixels a network with patches of 8 drops the last 4, which no attack can bring back."""
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY | {"img_size": 36})
    adopt(network, "timm:vit_tiny_patch16_224", 36)
    why = unmet_requirement("closed_form", preview_leak(network, 1, mean=(0.5,) * 3, std=(0.5,) * 3), {})
    assert "36 pixels are not a multiple of its patches' 8" in why
