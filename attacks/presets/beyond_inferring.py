"""Two early recipes of L-BFGS within the range of pixels, with breaching's settings (its configuration, version 2024).

`beyond_inferring`: total variation with exponents 2 and 1.25, as the paper weighs it for 28 x 28 pictures. Source: Wang
et al., "Beyond Inferring Class Representatives", INFOCOM 2019.
`wei`: a patterned start and the client's own loss of the candidate (CPL). Source: Wei et al., "A Framework for
Evaluating Gradient Leakage Attacks in Federated Learning", 2020.

One iteration there is a call of torch's optimizer, 20 gradients, which are counted here.
"""

from attacks.matching import MatchingOptions, gradient_matching

beyond_inferring = gradient_matching(
    MatchingOptions(
        objective="euclidean", optimizer="lbfgs", lr=1.0, iterations=8000, boxed=True, tv=0.2352, tv_form="wang"
    ),
    name="beyond_inferring",
)
wei = gradient_matching(
    MatchingOptions(
        objective="euclidean", optimizer="lbfgs", lr=1.0, iterations=6000, boxed=True, init="patterned-16", task=1.0
    ),
    name="wei",
)
