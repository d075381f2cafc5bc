"""campaigns/audit_subject.py: the MJP variant of a model in any precision, on any device."""

import copy

import torch
from torch import nn

from campaigns.audit_subject import masked_variant
from models import build_model


def test_the_masked_variant_is_in_the_precision_of_its_model():
    """A row that is converted is a parameter all the same: what is not cannot be copied, nor shared."""
    options = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    for dtype in (torch.float32, torch.float64):
        variant = copy.deepcopy(masked_variant(build_model("vit", **options).to(dtype)))
        row = dict(variant.named_parameters())["unknown_pos_embed"]
        assert isinstance(row, nn.Parameter) and row.dtype == dtype and variant.hides_positions
