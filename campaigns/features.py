"""How features that an attack read are scored: beside those of the private images, matched by label and distance."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from attacks.label_recovery import classifier_of
from attacks.threat_model.client import Round
from attacks.threat_model.leak import Reconstruction
from attacks.threat_model.local_step import client_model
from campaigns.campaign import Scoring
from models.position import given_mask
from reports.features import write_feature_report

RIGHT = 1e-2  # relative error up to which a feature is that of the image


def score_features() -> Scoring:
    """Return the scoring of attacks that read features and no pictures."""
    return Scoring(score=lambda one, result: ({}, feature_rows(one, result)), report=write_feature_report)


def feature_rows(one: Round, result: Reconstruction) -> list[dict]:
    """Return a row for each image of a batch: its relative feature_error and whether its label is right, in percent, as
    label_found, where a feature is matched to it; feature_found: 100 where that is within 1 %, else 0. Without
    originals, feature_found is 100 where a feature is claimed. `features` and `logits` are lists."""
    private, leak, _ = one
    features, labels = result.features, result.labels.tolist()
    layer: nn.Linear = leak.model.get_submodule(classifier_of(leak.model, leak.image_shape))
    weight, bias = (value.detach().double().cpu() for value in (layer.weight, layer.bias))
    logits = features @ weight.T + bias
    rows: list[dict] = [{"feature_found": 0.0} for _ in range(leak.batch_size)]
    pairs = [(place, place, None) for place in range(len(labels))]
    if private is not None:
        true = true_features(one)
        apart = torch.cdist(true, features, compute_mode="donot_use_mm_for_euclid_dist") / true.norm(dim=1)[:, None]
        matched = zip(*linear_sum_assignment(apart.numpy()), strict=True)
        pairs = [(int(place), int(found), float(apart[place, found])) for place, found in matched]
    for place, found, error in pairs:
        row = rows[place]
        row |= {"label_read": labels[found], "features": features[found].tolist(), "logits": logits[found].tolist()}
        row["feature_found"] = 100.0 * (error is None or error < RIGHT)
        if error is not None:
            row["feature_error"] = error
            row["label_found"] = 100.0 * (labels[found] == int(private.labels[place]))
    return rows


@torch.no_grad()
def true_features(one: Round) -> Tensor:
    """Return what enters the classifier (B, F), in float64, when the client's model reads the private images."""
    private, leak, _ = one
    model = client_model(leak.model, training=leak.training)
    seen: list[Tensor] = []
    layer = model.get_submodule(classifier_of(leak.model, leak.image_shape))
    layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    mask = given_mask(model, private.mask)
    model(private.model_input) if mask is None else model(private.model_input, mask)
    return seen[-1].double().cpu()
