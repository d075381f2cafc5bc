"""Simulated clients that drop out of the sum: whose images are attacked, and what the server sees of them."""

from pathlib import Path

import pytest
import torch

from attacks.threat_model.client import Aggregation, Client
from campaigns.sources import remaining, simulated
from data.demo import write_photographs
from data.images import list_images
from defenses import build_defense
from models import build_model
from models.jigsaw import Jigsaw
from tests.attacks.small_victims import MEAN, STD
from utils.errors import UserError


def test_as_many_clients_drop_out_as_is_asked_for_and_each_takes_all_its_images_along():
    paths = [Path(f"{place}.png") for place in range(4000)]
    kept, sizes = remaining(paths, Aggregation(10, 2, dropout=0.25), 0)
    assert sum(sizes) == len(kept) and len(kept) / 4000 == pytest.approx(0.75, abs=0.03)
    assert all(path.stem.isdigit() and paths[int(path.stem) ^ 1] in kept for path in kept[:50])
    assert remaining(paths, Aggregation(10, 2, dropout=0.25), 0) == (kept, sizes)
    assert remaining(paths, Aggregation(10, 2, dropout=0.25), 1) != (kept, sizes)
    with pytest.raises(UserError, match="all clients leave"):
        remaining(paths[:2], Aggregation(2, 1, dropout=1 - 1e-9), 0)


def test_the_server_sees_the_mean_over_the_clients_that_are_left(tmp_path):
    write_photographs(tmp_path)
    paths = list_images(tmp_path)[:6]
    model = build_model("vit", image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3).eval()
    terms = {"mean": MEAN, "std": STD, "reveal_labels": True, "local": None}
    together = (6, 1, None, 0.5)
    jigsaw = Jigsaw(model.grid, 0.0, seed=0)
    client = Client(model, jigsaw, build_defense("none", {}), 0, terms, {}, together=together)
    source = simulated(client, paths, 1, {})
    assert 0 < len(source.names) < 6 and source.sizes == [len(source.names)]
    assert (
        source.threat_model["images of clients that stayed"] == f"{len(source.names)} of 6 images, over 1 of 1 rounds"
    )
    private, leak, _ = source.round(range(len(source.names)))
    alone = Client(model, jigsaw, build_defense("none", {}), 0, terms, {})
    joined = alone.round(0, private.images, [str(Path(name).parent) for name in source.names]).leak
    assert leak.batch_size == len(source.names)
    for name, value in joined.gradients.items():
        torch.testing.assert_close(leak.gradients[name], value)
