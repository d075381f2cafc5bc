"""Tell a model that was tampered with from an honest one, before training on private images with it.

    python audit.py --check RECEIVED --reference BEFORE [--images DIR] --output DIR

RECEIVED: the checkpoint a client was sent. BEFORE: an earlier one of the same training. With --images, which stay here,
it also measures what one step on them would share. Statistics, each from a published attack's needs (larger is more
suspicious, and none of them names an attack that was not tried); the largest over layers is kept:

    new_values            share of the values in parameters that the reference has not
    drift                 change of a layer relative to its own size before, in decades
    dead_rows             share of a layer's rows that are zero
    equal_rows            share of a layer's rows that point where another row of it points
    one_direction         share of a layer's rows, each of length 1, that lies along one direction
    bias_ladder           rank correlation of a layer's biases with their order, sorted ones being thresholds
    bias_outlier          largest |bias| over the median |entry| of its layer, in decades from 0 on
    row_norms             largest norm of a row of a layer over its median, in decades
    image_share           share of one image in the squared gradient of a batch in front of the classifier
    row_share             share of one image in the squared gradient of a row, the median over rows of a layer

From dead_rows on they are of the change: what the same layer of the reference had already is taken off. Trained models
have rows and biases that stand out; between two rounds they hardly move. Layers that are new count as they are, and so
do biases that were all zero, as at the start of a training: of a few dozen the order passes for a ladder by chance.

99 % of the honest models that set THRESHOLDS stay below all of them; false alarms on others, and what each attack
exceeds, are in docs/servers.md. A model that exceeds one is reported with the layer.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from utils.errors import UserError

PARALLEL = 0.999  # cosine from which on two rows point alike
FEW = 8  # rows, and values in a row, that a layer needs for statistics of its rows
MOST = 1024  # rows of a layer that are compared with each other
FULL = 256  # of which a leading direction is sought
TINY = 1e-12
THRESHOLDS = {  # of docs/results/detector.json
    "new_values": 0.012,
    "dead_rows": 0.012,
    "equal_rows": 0.012,
    "one_direction": 0.614,
    "bias_ladder": 0.331,
    "bias_outlier": 0.401,
    "drift": 0.089,
    "row_norms": 0.312,
    "image_share": 0.820,
    "row_share": 0.842,
}

Found = dict[str, tuple[float, str]]  # by statistic: the value, and the layer or parameter it was found at


def weight_statistics(
    received: dict[str, Tensor], reference: dict[str, Tensor], known: dict[str, dict[str, float]] | None = None
) -> Found:
    """Return the statistics of two state dicts, by name, each with the parameter that gave it.

    known: `layer_statistics` of the reference, where they are at hand.
    """
    known = layer_statistics(reference) if known is None else known
    received = {name: value for name, value in received.items() if value.is_floating_point()}
    total = sum(value.numel() for value in received.values())
    new = [name for name in received if name not in reference or reference[name].shape != received[name].shape]
    share = sum(received[name].numel() for name in new) / max(total, 1)
    found: Found = {"new_values": (share, ", ".join(new[:2]))}
    for name, value in received.items():
        before = reference.get(name)
        before = before if before is not None and before.shape == value.shape else None
        if not _is_layer(name, value):
            continue
        if before is not None and float(before.double().norm()) > TINY:
            _keep(found, "drift", _decades(float((value - before).double().norm() / before.double().norm())), name)
        then = {} if before is None else known.get(name, {})
        for statistic, number in _of_layer(name, received).items():
            where = f"{name.removesuffix('weight')}bias" if statistic.startswith("bias") else name
            _keep(found, statistic, number - then.get(statistic, 0.0), where)
    return found


def _keep(found: Found, statistic: str, value: float, where: str) -> None:
    """Keep the largest value of a statistic over layers."""
    if statistic not in found or value > found[statistic][0]:
        found[statistic] = (value, where)


def _decades(value: float) -> float:
    return math.log10(max(value, TINY))


def layer_statistics(weights: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the statistics of every layer of a state dict by itself, by the name of its weight."""
    return {name: _of_layer(name, weights) for name, value in weights.items() if _is_layer(name, value)}


def _is_layer(name: str, value: Tensor) -> bool:
    return value.dim() >= 2 and value.is_floating_point() and "pos_embed" not in name and "token" not in name


def _of_layer(name: str, weights: dict[str, Tensor]) -> dict[str, float]:
    """Return the statistics of one layer, of its rows and of its biases."""
    bias = weights.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
    return _of_rows(weights[name]) | (_of_bias(bias, weights[name]) if bias is not None else {})


def _of_rows(weight: Tensor) -> dict[str, float]:
    """Return the statistics of a layer's rows: its output dimension against all others, or groups of rows (G, K, P)."""
    rows = weight.double().flatten(0, -2) if weight.dim() == 3 else weight.double().flatten(1)  # (m, n)
    if len(rows) < FEW or rows.shape[1] < FEW:
        return {}
    norms = rows.norm(dim=1)
    alive = norms > TINY * norms.max().clamp_min(TINY)
    told = {"dead_rows": float((~alive).double().mean())}
    if not alive.any():  # a layer that starts at zero, as the second of an adapter does
        return told
    told["row_norms"] = _decades(float(norms.max() / norms[alive].median()))
    unit = (rows[alive] / norms[alive][:, None])[:MOST]
    cosines = unit @ unit.T
    told["one_direction"] = float(torch.linalg.eigvalsh(cosines[:FULL, :FULL])[-1] / len(cosines[:FULL]))
    cosines = cosines.abs().fill_diagonal_(0)
    told["equal_rows"] = float((cosines.amax(dim=1) > PARALLEL).double().mean()) if len(unit) > 1 else 0.0
    return told


def _of_bias(bias: Tensor, weight: Tensor) -> dict[str, float]:
    """Return the statistics of a layer's biases (m,), or of G groups of them (G, K), beside its weights."""
    told = {}
    entries = weight.double().abs().flatten()
    middle = float(entries[entries > 0].median()) if (entries > 0).any() else 0.0
    if middle:
        told["bias_outlier"] = max(_decades(float(bias.double().abs().max()) / middle), 0.0)
    groups = [group for group in bias.double().reshape(-1, bias.shape[-1]) if len(group.unique()) >= 2 * FEW]
    if groups:
        ranks = [abs(float(spearmanr(range(len(group)), group.cpu().numpy()).statistic)) for group in groups]
        told["bias_ladder"] = sum(ranks) / len(ranks)
    return told


def gradient_statistics(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    classifier: str,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Found:
    """Return the statistics of what one step on images (B, C, H, W), labels (B,) would share; B at least 2.

    classifier: prefix of the parameters behind the features, which are left out: every label reaches those.
    """
    names = [n for n, value in model.named_parameters() if value.requires_grad and not n.startswith(f"{classifier}.")]
    own = dict(model.named_parameters())
    total = torch.zeros(len(images), dtype=torch.float64)
    rows: dict[str, Tensor] = {}
    for place in range(len(images)):
        value = loss(model(images[place : place + 1]), labels[place : place + 1])
        gradients = torch.autograd.grad(value, [own[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                continue
            power = gradient.detach().double().square()
            total[place] += power.sum()
            if gradient.dim() > 1 and gradient.shape[-1] >= FEW and "pos_embed" not in name and "token" not in name:
                power = power.flatten(0, -2).sum(1) if gradient.dim() == 3 else power.flatten(1).sum(1)
                rows.setdefault(name, torch.zeros(len(images), len(power), dtype=torch.float64))[place] = power
    if not float(total.sum()):  # an honest classifier passes something back of every image
        return {"image_share": (1.0, "nowhere: in front of the classifier the gradient is zero for every image")}
    found: Found = {"image_share": (float(total.max() / total.sum()), "all layers in front of the classifier")}
    for name, power in rows.items():
        lit = power.sum(dim=0) > TINY * power.sum()
        if lit.sum() >= FEW:
            share = (power.amax(dim=0) / power.sum(dim=0).clamp_min(1e-300))[lit]
            _keep(found, "row_share", float(share.median()), name)
    return found


def suspicion(found: Found, thresholds: dict[str, float] = THRESHOLDS) -> list[str]:
    """Return one line for every statistic above its threshold, none for a model that looks honest."""
    return [
        f"{name} {value:.3g} at {where or 'no layer'}, above {thresholds[name]:.3g} of honest models"
        for name, (value, where) in found.items()
        if value > thresholds[name]
    ]


def check_model(received: Path, reference: Path, images: Path | None = None, seed: int = 0) -> dict:
    """Return {"statistics", "alarms", "verdict"} of a checkpoint beside an earlier one, and of a step on images."""
    from models.checkpoints import read_checkpoint

    contents = [read_checkpoint(path) for path in (received, reference)]
    weights = [_tensors(content, path) for content, path in zip(contents, (received, reference), strict=True)]
    found = weight_statistics(*weights)
    if images is not None:
        found |= _step_statistics(received, images, seed)
    alarms = suspicion(found)
    told = {name: {"value": value, "at": where} for name, (value, where) in found.items()}
    return {"statistics": told, "alarms": alarms, "verdict": "tampered with" if alarms else "looks honest"}


def _step_statistics(received: Path, folder: Path, seed: int) -> Found:
    """Return the gradient statistics of a checkpoint that one of our models can be rebuilt from."""
    from data.images import list_images, read_images
    from models.checkpoints import load_model
    from models.partial import head_of

    model = load_model(received)
    paths = list_images(folder)[:16]
    if len(paths) < 2:
        raise UserError(f"--images: '{folder}' holds {len(paths)} image, and a share of one needs two or more")
    scale = getattr(model, "normalize", None) or {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    batch = read_images(paths, model.arguments["image_size"], **scale).to(next(model.parameters()))
    labels = torch.randint(model.arguments["num_classes"], (len(batch),), generator=torch.Generator().manual_seed(seed))
    return gradient_statistics(model, batch, labels, head_of(model))


def _tensors(content: dict, path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint as they are named in it."""
    content = content.get("model", content.get("state_dict", content))
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)} if content else {}
    if not found:
        raise UserError(f"checkpoint '{path}' holds no weights by name: use one with a state dict")
    return found


def findings_text(told: dict) -> str:
    """Return what `check_model` found as lines: statistics beside what honest models reach, alarms, verdict."""
    lines = [
        f"{name:<14} {row['value']:>10.4g}  honest up to {THRESHOLDS[name]:<8.4g} {row['at']}"
        for name, row in told["statistics"].items()
    ]
    return "\n".join([*lines, *(f"alarm: {line}" for line in told["alarms"]), f"verdict: {told['verdict']}"])
