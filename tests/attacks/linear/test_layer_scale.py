"""attacks/linear/layer_scale.py: the folded leak is what a client with the folded model would have shared."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.linear.layer_scale import fold_layer_scale, lost_layers
from tests.attacks.small_victims import client, generator, vit
from tests.attacks.timm_victims import of_timm

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def scaled(model: nn.Module, zeros: int = 0) -> nn.Module:
    """Draw every gamma between 1e-5 and 1, and set the first ones of block 1's attention to 0."""
    own = generator(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("gamma"):
                value.copy_(10 ** (-5 * torch.rand(value.shape, generator=own, dtype=value.dtype)))
        model.blocks[1].ls1.gamma[:zeros] = 0
    return model


@pytest.mark.parametrize("ours", [True, False])
def test_the_folded_leak_is_that_of_the_folded_model(ours):
    model = vit(init_values=1e-5) if ours else of_timm("vit_tiny_patch16_224", 32, init_values=1e-5, **TINY)
    private, leak = client(scaled(model))
    folded = fold_layer_scale(leak)
    torch.testing.assert_close(
        folded.model(private.model_input), leak.model(private.model_input), rtol=1e-12, atol=1e-13
    )
    assert not any("gamma" in name for name, _ in folded.model.named_parameters())
    loss = nn.functional.cross_entropy(folded.model(private.model_input), private.labels)
    parameters = dict(folded.model.named_parameters())
    own = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert list(own) == list(folded.gradients)
    for name, value in own.items():
        torch.testing.assert_close(folded.gradients[name], value, rtol=1e-9, atol=1e-12 * float(value.abs().max()))


def test_the_original_leak_and_model_stay_as_they_are():
    _, leak = client(scaled(vit(init_values=0.1)))
    weights = {name: value.clone() for name, value in leak.model.state_dict().items()}
    gradients = {name: value.clone() for name, value in leak.gradients.items()}
    fold_layer_scale(leak)
    assert all(value.equal(leak.model.state_dict()[name]) for name, value in weights.items())
    assert all(value.equal(leak.gradients[name]) for name, value in gradients.items())


def test_a_leak_without_layer_scale_is_returned_itself():
    _, leak = client(vit())
    assert fold_layer_scale(leak) is leak


def test_a_channel_of_zero_loses_the_gradient_of_its_layer_alone():
    private, leak = client(scaled(vit(init_values=1e-5), zeros=3))
    assert lost_layers(leak.model) == ["blocks.1.attn.proj"]
    folded = fold_layer_scale(leak)
    gone = leak.gradients.keys() - folded.gradients.keys()
    assert {name for name in gone if not name.endswith("gamma")} == {
        "blocks.1.attn.proj.weight",
        "blocks.1.attn.proj.bias",
    }
    assert all(value.isfinite().all() for value in folded.gradients.values())
    torch.testing.assert_close(
        folded.model(private.model_input), leak.model(private.model_input), rtol=1e-12, atol=1e-13
    )


def test_withheld_gradients_stay_withheld_and_half_precision_overflows_nothing():
    model = scaled(vit(init_values=1e-5)).float()
    _, leak = client(model)
    kept = {name: (1e3 * value).half() for name, value in leak.gradients.items() if "fc2" not in name}
    folded = fold_layer_scale(replace(leak, gradients=kept))
    assert not any("fc2" in name for name in folded.gradients)
    assert all(value.isfinite().all() for value in folded.gradients.values())
