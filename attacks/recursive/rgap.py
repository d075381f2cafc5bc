"""R-GAP: recursive gradient attack on privacy, one least-squares problem per layer and no optimisation.

The minimum-norm solution of each layer's system is handed to the layer in front. With full rank everywhere it is the
image; what a rank-deficient layer leaves open stays zero, and the error grows on the way to the image.
Source: Zhu and Blaschko, "R-GAP: Recursive Gradient Attack on Privacy", ICLR 2021; for many classes as in breaching.
"""

import torch

from attacks.recursive.recursion import check_recursion, go_back
from attacks.threat_model.checks import checked
from attacks.threat_model.leak import Leak, Reconstruction
from attacks.threat_model.uses import LABELS


@checked(check_recursion, uses=(LABELS,))
def rgap(
    leak: Leak, *, generator: torch.Generator, balance: bool = True, keep_saturated: bool = False
) -> Reconstruction:
    """Reconstruct one image from the gradients of a chain of layers; `generator` is not drawn from.

    Diagnostics per layer and in all, and errors: attacks.recursive.recursion.go_back.

    Args:
        balance: Weigh both halves of a layer's equations alike, which deep networks need; false stacks them as in the
            paper.
        keep_saturated: Take outputs whose activation has no inverse as just inside its range; false refuses them.
    """
    return go_back(leak, "rgap", balance=balance, keep_saturated=keep_saturated, correct=None)
