"""The library, the scores and the ranking against numbers of the original implementation."""

import numpy as np
import pytest
import torch
from PIL import Image

from defenses.ats.policies import parse
from defenses.ats.scores import (
    accuracy_score,
    first_of_class,
    jacobian,
    privacy_curve,
    privacy_score,
    rank,
)
from defenses.ats.transforms import LIBRARY
from models import build_model

GEOMETRIC = {"shearX", "shearY", "translateX", "translateY", "rotate"}
MEAN = [0.4914672374725342, 0.4822617471218109, 0.4467701315879822]
STD = [0.24703224003314972, 0.24348513782024384, 0.26158785820007324]


def test_every_operation_in_both_directions(golden):
    found, table = golden("ats_transforms"), golden("ats_transforms.json")["table"]
    image, minus = Image.fromarray(found["image"]), iter(found["minus"])
    assert len(LIBRARY) == len(table) == 50
    for index, (operation, row) in enumerate(zip(LIBRARY, table, strict=True)):
        assert operation.name == row["operation"] and operation.signed == row["random_sign"]
        assert operation.probability == row["listed_probability"]
        if operation.name not in ("invert", "autocontrast", "equalize"):
            assert operation.magnitude == pytest.approx(row["magnitude"], abs=1e-12)
        for sign, picture in (
            (1, found["plus"][index]),
            (-1, next(minus) if operation.signed else found["plus"][index]),
        ):
            ours, theirs = np.asarray(operation(image, sign)).astype(int), picture.astype(int)
            if operation.name in GEOMETRIC:
                assert abs(ours - theirs).mean() < 1, operation
            else:
                assert (ours == theirs).all(), operation


def network(golden: dict, state: str) -> torch.nn.Module:
    """The reference's ConvNet of width 4: our own, its weights under other names."""
    model = build_model("convnet", num_classes=10, image_size=32, width=4).eval()
    names = {}
    for layer, place in enumerate([0, 3, 6, 9, 12, 15, 19, 22]):
        for key in ("weight", "bias"):
            names[f"body.{place}.{key}"] = f"conv{layer}.{key}"
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"body.{place + 1}.{key}"] = f"bn{layer}.{key}"
    names |= {f"fc.{key}": f"linear.{key}" for key in ("weight", "bias")}
    model.load_state_dict({ours: torch.tensor(golden[f"{state}/model.{theirs}"]) for ours, theirs in names.items()})
    return model


def normalized(pixels: np.ndarray) -> torch.Tensor:
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255 if pixels.dtype == np.uint8 else pixels
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("policy", ["crop", "3-1-7", "43-18-18"])
def test_scores(golden, policy):
    found, facts = golden("ats_scores"), golden("ats_scores.json")
    labels, noise = torch.tensor(found["privacy_labels"]), normalized(torch.tensor(found["noise"]))
    images = normalized(found[f"{policy}/privacy_inputs"])
    curve = privacy_curve(network(found, "trained"), images, labels, noise)
    assert curve.numpy() == pytest.approx(found[f"{policy}/privacy_curve"], abs=5e-3)
    scores = privacy_score(curve)
    assert scores.numpy() == pytest.approx(found[f"{policy}/privacy_score"], abs=1e-3)
    classes = [scores[labels == label].mean() for label in labels.unique()]
    assert float(torch.stack(classes).mean()) == pytest.approx(facts["results"][policy]["privacy"], abs=1e-3)

    model, inputs = network(found, "init"), normalized(found[f"{policy}/accuracy_inputs"])
    kept = first_of_class(torch.tensor(found["accuracy_labels"]))
    assert len(kept) == facts["scalars"][f"{policy}/kept_0"]["value"] < len(inputs)
    rows = jacobian(model, inputs[kept])
    assert torch.corrcoef(rows.double()).numpy() == pytest.approx(found[f"{policy}/acc_corr_0"], abs=1e-4)
    assert accuracy_score(rows) == pytest.approx(found[f"{policy}/accuracy_score"].item(), rel=1e-3)


def test_ranking(golden):
    found, facts = golden("ats_scores"), golden("ats_scores.json")
    order = rank(found["pool/privacy"], found["pool/accuracy"], -85.0)
    wanted = facts["pool_ranking"]
    assert [facts["pool_names"][place] for place, _ in order] == [row["policy"] for row in wanted]
    assert [value for _, value in order] == pytest.approx([row["combined"] for row in wanted], rel=1e-6)
    assert all(parse(name) for name in facts["pool_names"])
