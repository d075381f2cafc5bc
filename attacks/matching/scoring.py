"""Choose the restart of a victim: by its objective, its smoothness, or what a classifier makes of it; or average all.

Source: Geiping et al., "Inverting Gradients", NeurIPS 2020, whose code calls it scoring_choice. The truth takes no
part.
"""

from collections.abc import Callable

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from attacks.matching.options import MatchingOptions
from attacks.matching.priors import total_variation
from attacks.matching.problem import MatchingProblem
from models.timm_models import open_timm
from utils.errors import UserError

Score = Callable[[Tensor], Tensor]
AVERAGES = ("pixelmean", "pixelmedian")


def build_score(problem: MatchingProblem, options: MatchingOptions) -> Score | None:
    """Return the function images (B, C, H, W) -> scalar, lower is better, of 'tv' and 'inception'; None for others.

    Raises UserError for a scoring_model that cannot be opened or does not read such images.
    """
    if options.scoring_choice == "tv":
        return total_variation
    if options.scoring_choice == "inception":
        return Certainty(options.scoring_model, options.scoring_checkpoint, problem)
    return None


class Certainty:
    """Entropy in nats of what a classifier trained on photographs thinks of images, summed over them.

    Images (B, C, H, W) in the victim's normalised space are enlarged to the network's input (bilinear) and normalised
    as it expects.
    """

    def __init__(self, name: str, checkpoint: str, problem: MatchingProblem):
        network = open_timm(name, checkpoint=checkpoint or None, pretrained=not checkpoint)
        self.network = network.to(problem.low).requires_grad_(False).eval()
        self.side = resolve_model_data_config(network.network)["input_size"][-1]
        own = network.normalize
        self.mean, self.std, self.own_mean, self.own_std = (
            torch.tensor(value, dtype=torch.float64).to(problem.low).view(-1, 1, 1)
            for value in (problem.mean, problem.std, own["mean"], own["std"])
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = (images * self.std + self.mean).expand(-1, 3, -1, -1)
        large = nn.functional.interpolate(pixels, size=(self.side, self.side), mode="bilinear", align_corners=False)
        logits = self.network((large - self.own_mean) / self.own_std)
        return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum()


def choose_restart(images: Tensor, distance: Tensor, finite: Tensor, score: Score | None) -> int:
    """Return the restart with the lowest score, or objective without one.

    images (R, B, C, H, W), distance (R,), finite (R,) bool: restarts that may be chosen; where there are none, the one
    of lowest objective.
    """
    if score is None or not finite.any():
        return int(distance.argmin())
    scores = torch.stack([score(one) if good else distance.new_tensor(torch.inf)
                          for one, good in zip(images, finite, strict=True)])  # fmt: skip
    return int(scores.argmin())


def average_restarts(images: Tensor, finite: Tensor, choice: str) -> Tensor:
    """Return the mean or median (pixelmean, pixelmedian) over restarts: (R, B, C, H, W) -> (B, C, H, W).

    Restarts that left the finite numbers take no part. The median of an even number is the lower middle one, as torch
    and the original have it. Raises UserError where none is finite.
    """
    if not finite.any():
        raise UserError(f"scoring_choice {choice}: every restart left the finite numbers: lower lr, or use loss")
    kept = images[finite]
    return kept.mean(dim=0) if choice == "pixelmean" else kept.median(dim=0).values
