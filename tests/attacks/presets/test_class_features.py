"""Class features as an attack: what comes back, how it is scored, and what is refused."""

from dataclasses import replace

import pytest
import torch

from attacks.presets.class_features import class_features
from attacks.threat_model.client import Round
from attacks.threat_model.leak import LocalSteps
from campaigns.features import feature_rows, true_features
from models import build_model
from tests.attacks.small_victims import VIT, client, generator
from utils.errors import UserError


def victim(number: int = 6, **options):
    """(model, private batch, leak) of a client that trains its head alone."""
    model = build_model("vit", num_classes=12, **VIT).double().eval()
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith("head."))
    return model, *client(model, number, hidden=True, **options)


def test_the_head_of_a_batch_gives_each_feature_and_label():
    model, private, leak = victim()
    one = Round(private, leak, generator())
    found = class_features(leak, generator=generator())
    assert found.diagnostics["complete"] and found.diagnostics["found"] == 6 and not len(found.images)
    assert "exact" not in found.diagnostics  # of features, not of pixels
    with torch.no_grad():
        assert torch.allclose(true_features(one) @ model.head.weight.T + model.head.bias, model(private.model_input))
    rows = feature_rows(one, found)
    assert max(row["feature_error"] for row in rows) < 1e-6
    assert all(row["feature_found"] == row["label_found"] == 100 for row in rows)
    assert [row["label_read"] for row in rows] == private.labels.tolist()


def test_images_without_a_feature_are_not_found():
    _, private, leak = victim()
    found = class_features(leak, generator=generator())
    found = replace(found, features=found.features[1:], labels=found.labels[1:])
    rows = feature_rows(Round(private, leak, generator()), found)
    assert sorted(row["feature_found"] for row in rows) == [0, 100, 100, 100, 100, 100]
    assert sum("features" in row for row in rows) == 5
    claimed = feature_rows(Round(None, leak, generator()), found)  # a leak file without originals
    assert [row["feature_found"] for row in claimed] == [100] * 5 + [0] and "feature_error" not in claimed[0]


@pytest.mark.parametrize(
    "number, terms, words",
    [
        (6, {"withhold": ["head.bias"]}, "head.bias"),
        (7, {}, "7 images need at most 6"),
        (2, {"local": LocalSteps(2, 0.1, 1)}, "2 local steps"),
    ],
)
def test_what_it_cannot_read_is_said(number, terms, words):
    with pytest.raises(UserError, match=words):
        class_features(victim(number, **terms)[2], generator=generator())
