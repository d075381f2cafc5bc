"""The classifier's gradient alone gives the features and labels of all images of a batch."""

import pytest
import torch
from torch import nn

from attacks.class_features import ClassFeatures, check_count, class_features
from attacks.label_recovery import recover_class_features, recover_labels
from models import build_model
from tests.attacks.small_victims import VIT, client, generator
from utils.errors import UserError

CLASSES, WIDTH = 40, 24
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}


def head_gradient(features: torch.Tensor, labels: list[int], confidence: float = 1.0, weights=None):
    """(weight gradient, bias gradient, classifier) of one step on features (B, F); weights: of the images."""
    own, dtype = generator(5), features.dtype
    weight = confidence * 0.2 * torch.randn(CLASSES, WIDTH, generator=own, dtype=torch.float64).to(dtype)
    bias = 0.1 * torch.randn(CLASSES, generator=own, dtype=torch.float64).to(dtype)
    excess = (features @ weight.T + bias).softmax(dim=1) - nn.functional.one_hot(torch.tensor(labels), CLASSES)
    excess = excess * torch.tensor(weights or [1 / len(labels)] * len(labels), dtype=dtype)[:, None]
    return excess.T @ features, excess.sum(dim=0), (weight, bias)


def random_features(number: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(number, WIDTH, generator=generator(), dtype=torch.float64).to(dtype)


def check_all_found(found: ClassFeatures, features: torch.Tensor, labels: list[int], tolerance: float) -> None:
    assert found.complete and found.found == len(labels)
    assert found.labels.repeat_interleave(found.counts).tolist() == sorted(labels)
    apart = torch.cdist(features.double(), found.features)
    apart[torch.tensor(labels)[:, None] != found.labels] = torch.inf  # each with its own label
    assert apart.min(dim=1).values.max() < tolerance


@pytest.mark.parametrize("confidence, dtype", [(1.0, torch.float64), (1.0, torch.float32), (4.0, torch.float64)])
@pytest.mark.parametrize("labels", [[3, 7, 11, 30], [5, 5, 5, 9, 9, 20], [8], list(range(10))])
def test_features_and_repeated_labels_come_back(labels, confidence, dtype):
    features = random_features(len(labels), dtype)
    weight, bias, classifier = head_gradient(features, labels, confidence)
    found = class_features(weight, bias, classifier, len(labels), generator=generator())
    check_all_found(found, features, labels, TOLERANCE[dtype])
    logits = found.features @ classifier[0].double().T + classifier[1].double()
    assert torch.equal(found.logits, logits)


def test_equal_images_are_counted():
    features, labels = random_features(4)[[0, 0, 0, 1, 1, 2, 3]], [6, 6, 6, 6, 6, 2, 30]
    weight, bias, classifier = head_gradient(features, labels)
    found = class_features(weight, bias, classifier, 7, generator=generator())
    check_all_found(found, features, labels, 1e-6)
    assert sorted(found.counts.tolist()) == [1, 1, 2, 3]


def test_the_weights_of_an_aggregate_are_told_and_used():
    features, labels, weights = random_features(5), [3, 7, 11, 30, 30], [0.3, 0.3, 0.2, 0.1, 0.1]
    weight, bias, classifier = head_gradient(features, labels, weights=weights)
    found = class_features(weight, bias, classifier, 5, generator=generator(), weights=weights)
    check_all_found(found, features, labels, 1e-6)
    assert not class_features(weight, bias, classifier, 5, generator=generator()).complete


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_what_is_not_a_batch_of_that_size_is_not_complete(size):
    features, labels = random_features(4), [3, 7, 11, 30]
    weight, bias, classifier = head_gradient(features, labels)
    weight += size * torch.randn(weight.shape, generator=generator(2), dtype=weight.dtype)
    found = class_features(weight, bias, classifier, 4, generator=generator())
    assert not found.complete and found.found == 0


def test_no_image_is_claimed_that_is_not_there():
    """More images than said: what holds of the equations would be chance, and no weight proves it."""
    for seed in range(10):
        features = torch.randn(6, WIDTH, generator=generator(seed), dtype=torch.float64)
        weight, bias, classifier = head_gradient(features, [1, 2, 3, 4, 5, 6])
        assert class_features(weight, bias, classifier, 4, generator=generator(seed)).found == 0


def test_too_many_images_are_refused_with_numbers():
    weight, bias, classifier = head_gradient(random_features(22), list(range(22)))
    with pytest.raises(UserError, match="22 images need at most 20"):
        class_features(weight, bias, classifier, 22, generator=generator())


def test_as_many_images_as_features_are_told_apart_at_most():
    check_count(WIDTH, 2 * WIDTH, WIDTH)
    for number, classes in ((WIDTH + 1, 4 * WIDTH), (WIDTH, 2 * WIDTH - 1)):
        with pytest.raises(UserError, match=f"{number} images need at most"):
            check_count(number, classes, WIDTH)


def test_the_rule_counts_the_labels_of_a_vision_transformer():
    model = build_model("vit", num_classes=12, **VIT).double().eval()
    private, leak = client(model, 6, hidden=True)
    assert recover_labels(leak, "class_features", generator()).tolist() == private.labels.sort().values.tolist()
    found = recover_class_features(leak, generator())
    with torch.no_grad():
        logits = model(private.model_input)
    assert found.complete and torch.cdist(logits, found.logits).min(dim=1).values.max() < 1e-6


def test_a_client_that_trains_its_head_alone_gives_the_same_away():
    model = build_model("vit", num_classes=12, **VIT).double().eval()
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith("head."))
    private, leak = client(model, 6, hidden=True)
    assert set(leak.gradients) == {"head.weight", "head.bias"}
    assert recover_class_features(leak, generator()).complete


def test_what_the_classifier_does_not_share_is_named():
    model = build_model("vit", num_classes=12, **VIT).double().eval()
    _, leak = client(model, 2, hidden=True, withhold=["head.bias"])
    with pytest.raises(UserError, match="head.bias"):
        recover_class_features(leak, generator())
