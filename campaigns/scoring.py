"""How reconstructed images are scored: the usual scores, those asked for, and the report they end in."""

from collections.abc import Callable, Mapping

from torch import Tensor

from attacks import FEATURES
from attacks.threat_model.client import Round
from attacks.threat_model.leak import Reconstruction
from campaigns.campaign import Scoring
from campaigns.features import score_features
from campaigns.interval import interval
from data.transforms import denormalize
from eval.lpips import load_lpips
from eval.reconstruction import METRICS, score_batch
from reports.attack import write_report


def scoring_of(attack: str, lpips: str | None, trunk: str | None, threshold: float) -> Scoring:
    """Return the scoring of what an attack on images gives: pictures, as `score_images`, or features."""
    return score_features() if attack in FEATURES else score_images(lpips, trunk, threshold)


def score_images(lpips: str | None, trunk: str | None, threshold: float) -> Scoring:
    """Return the scoring of images by METRICS, and by LPIPS where its network is named, its weights in `trunk`;
    threshold: PSNR in dB above which a reconstruction is a success."""
    network = load_lpips(lpips, trunk) if lpips else None
    metrics = {network.name: network} if network else {}
    return Scoring(
        score=lambda one, result: score_round(one, result, metrics),
        report=lambda run, rows, attack, threat_model: write_report(
            run, rows, METRICS, attack, threat_model, threshold
        ),
    )


def score_round(
    one: Round, result: Reconstruction, metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]]
) -> tuple[dict[str, Tensor], list[dict]]:
    """Return (pictures by their folder, a row of scores for each image); without originals only what the attack says.

    metrics: scores beside the usual ones, by name.
    """
    private, leak, _ = one
    views = [private.images, private.model_input, result.images] if private else [result.images]
    views = [denormalize(images.cpu(), leak.mean, leak.std) for images in views]
    proved = interval(one, result)
    if private is None:
        labels = [] if result.labels is None else result.labels.tolist()
        rows = [{"label_read": label} for label in labels] or [{}] * len(views[0])
        return {"reconstructions": views[0]}, [row | proved for row in rows]
    found = result.labels if leak.labels is None and private.labels is not None else None
    pictures, rows = score_batch(*views, private.mask, private.labels, found, leak.model.patch_size, metrics)
    return pictures, [row | proved for row in rows]
