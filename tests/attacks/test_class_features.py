"""The classifier's gradient alone gives the features and labels of all images of a batch."""

import pytest
import torch
from torch import nn

from attacks.class_features import class_features
from attacks.labels import recover_labels
from models import build_model
from tests.attacks.small_victims import VIT, client, generator
from utils.errors import UserError

CLASSES, WIDTH = 40, 24


def head_gradient(labels: list[int], confidence: float = 1.0, dtype=torch.float64):
    """(features, weight gradient, bias gradient, classifier) of one step on random features."""
    own = generator()
    features = torch.randn(len(labels), WIDTH, generator=own, dtype=torch.float64).to(dtype)
    weight = confidence * 0.2 * torch.randn(CLASSES, WIDTH, generator=own, dtype=torch.float64).to(dtype)
    bias = 0.1 * torch.randn(CLASSES, generator=own, dtype=torch.float64).to(dtype)
    excess = (features @ weight.T + bias).softmax(dim=1) - nn.functional.one_hot(torch.tensor(labels), CLASSES)
    return features, excess.T @ features / len(labels), excess.mean(dim=0), (weight, bias)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("labels", [[3, 7, 11, 30], [5, 5, 5, 9, 9, 20], [8]])
def test_features_and_repeated_labels_come_back(labels, dtype, tolerance):
    features, weight, bias, classifier = head_gradient(labels, dtype=dtype)
    starts = torch.randn(4, WIDTH, generator=generator(1))
    found = class_features(weight, bias, classifier, len(labels), starts=starts, generator=generator())
    assert found.complete and found.labels.tolist() == sorted(labels)
    assert torch.cdist(features.double(), found.features).min(dim=1).values.max() < tolerance


def test_what_is_not_a_batch_of_that_size_is_not_complete():
    _, weight, bias, classifier = head_gradient([3, 7, 11, 30])
    weight += 1e-3 * torch.randn(weight.shape, generator=generator(2), dtype=weight.dtype)
    found = class_features(weight, bias, classifier, 4, starts=torch.zeros(2, WIDTH), generator=generator())
    assert not found.complete


def test_too_many_images_are_refused_with_numbers():
    _, weight, bias, classifier = head_gradient(list(range(22)))
    with pytest.raises(UserError, match="22 images need at most 20"):
        class_features(weight, bias, classifier, 22, starts=torch.zeros(1, WIDTH), generator=generator())


def test_the_rule_counts_the_labels_of_a_vision_transformer():
    model = build_model("vit", num_classes=12, **VIT).double().eval()
    private, leak = client(model, 4, hidden=True)
    assert recover_labels(leak, "class_features", generator()).tolist() == private.labels.sort().values.tolist()
