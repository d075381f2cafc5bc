"""Which pictures scripts/joint_victims.py makes."""

import torch

from models.jigsaw import patchify
from scripts.joint_cases import PATCHES, SMALL, Case
from scripts.joint_victims import victims


def test_pictures_of_mixtures_have_the_patches_they_are_named_for():
    rank, total = {}, 3 * 16
    for kind in PATCHES:
        _, private = victims(Case(3, SMALL, side=32, shown=kind), 0, None)
        patches = patchify(private.model_input.double(), 8).flatten(0, 1)
        values = torch.linalg.svdvals(patches)
        rank[kind] = int((values > 1e-5 * values[0]).sum())
    assert rank["random"] == rank["faint"] == total
    assert (rank["greys"], rank["colours"], rank["two greys"], rank["few"]) == (2, 3, 2, 5) and rank["ramp"] <= 9
