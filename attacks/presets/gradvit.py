"""GradViT: gradient matching for Vision Transformers, with a convolutional network to say what images look like.

A ViT has no BatchNorm statistics to match, so the image prior comes from a CNN the user names (image_prior_checkpoint):
it sets in after half of the iterations, when the weight of the gradients halves. The patch prior smooths the seams
between patches, and several starts are drawn to their mean. There is no official code and the paper's weights are not
public; these are those of the MJP authors' reimplementation, without its errors (logits as labels, a random patch
embedding inside the patch prior, the mask forgotten in both gradients).
Source: Hatamizadeh et al., "GradViT: Gradient Inversion of Vision Transformers", CVPR 2022.
"""

from attacks.matching import MatchingOptions, gradient_matching

gradvit = gradient_matching(
    MatchingOptions(
        objective="mean_squared",
        objective_weight=4e-3,
        second_phase=0.5,
        second_objective_weight=2e-3,
        image_prior=0.2,
        patch_prior=1e-4,
        tv=1e-4,
        l2=1e-4,
        group=1e-2,
        restarts=2,
        init="uniform",
        schedule="cosine",
        lr=0.1,
        iterations=120000,
    ),
    name="gradvit",
)
