"""Models, pictures and a comparison that the tests of checkpoints share."""

import torch
from torch import Tensor, nn

from models import build_model


def small(**options) -> nn.Module:
    """A ViT whose heads are 64 wide, as in the published models."""
    shape = {"image_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 5}
    model = build_model("vit", **{**shape, **options}).eval()
    if model.index_embed is not None:
        nn.init.normal_(model.index_embed, generator=torch.Generator().manual_seed(0))
    return model


def picture(side: int = 32, number: int = 2) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for name in expected:
        assert weights[name].equal(expected[name]), name
