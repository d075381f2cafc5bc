"""What a CNN trained on photographs expects of images: GradViT's image prior."""

import torch
from torch import Tensor

from attacks.matching import priors
from attacks.matching.problem import MatchingProblem
from models.checkpoints import load_model
from models.external import open_external
from utils.errors import UserError

LIBRARIES = ("timm:", "torchvision:")


def open_prior(checkpoint: str, side: int) -> torch.nn.Module:
    """Return the network of an image_prior_checkpoint: a file `load_model` reads, or timm:NAME=FILE or
    torchvision:NAME=FILE, the weights of a network of these libraries, with timm's normalisation.

    side: of the images it will see, in pixels. Raises UserError, also for a name without a file: statistics of random
    weights are no prior.
    """
    name, _, file = checkpoint.partition("=")
    if not checkpoint.startswith(LIBRARIES):
        return load_model(checkpoint)
    if not file:
        raise UserError(f"image_prior_checkpoint '{checkpoint}' names no weights: write {name}=FILE")
    return open_external(name, checkpoint=file, image_size=side)


class ImagePrior:
    """What a CNN trained on photographs expects: BatchNorm statistics of the candidates against its running ones.

    The mean squared difference of means and of variances, summed over its layers (GradViT); images (B, C, H, W) in the
    victim's normalised space are turned into the network's own.
    """

    def __init__(self, checkpoint: str, problem: MatchingProblem):
        like = problem.low
        side = problem.images.shape[-1]
        self.model = open_prior(checkpoint, side).to(like).requires_grad_(False).eval()
        times = 3 if len(problem.mean) == 1 else 1  # grey candidates become three equal colours
        own = self.model.normalize or {"mean": problem.mean * times, "std": problem.std * times}
        self.mean, self.std, self.own_mean, self.own_std = (
            torch.tensor(value, dtype=torch.float64).to(like).view(-1, 1, 1)
            for value in (problem.mean, problem.std, own["mean"], own["std"])
        )
        if not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in self.model.modules()):
            raise UserError(
                f"image_prior_checkpoint '{checkpoint}' has no BatchNorm layers: use a CNN such as ResNet-50"
            )
        try:
            self(torch.zeros_like(problem.images[0, :1]))
        except RuntimeError as error:
            size = "x".join(map(str, problem.images.shape[2:]))
            raise UserError(f"image_prior_checkpoint '{checkpoint}' cannot read {size} images") from error

    def __call__(self, images: Tensor) -> Tensor:
        pixels = (images * self.std + self.mean).expand(-1, 3, -1, -1)
        with priors.BatchNormStatistics(self.model) as seen:
            self.model((pixels - self.own_mean) / self.own_std)
            statistics = list(seen.values)
        targets = priors.running_statistics(self.model, seen.names)
        return priors.batch_norm_distance(statistics, targets, first_scale=1.0, form="mse")
