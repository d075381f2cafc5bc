"""Inverting Gradients: the direction of the gradient and total variation, by the sign of the derivative.

One cosine over all parameters makes the attack indifferent to the scale of the gradient, so it also works on trained
networks. Adam takes the sign of the derivative; the rate falls tenfold at 3/8, 5/8 and 7/8 of the iterations; pixels
stay in range. Batches, and updates of several local steps (unrolled in the graph, compared as mean gradients, which the
cosine cannot tell from updates), need no other options. The weight of tv is per setting: 1e-6 for CIFAR networks, 1e-1
for trained ImageNet ones, 1e-4 the default of the official command line; 24000 iterations there, for final figures.
Source: Geiping, Bauermeister, Droege, Moeller, "Inverting Gradients - How easy is it to break privacy in federated
learning?", NeurIPS 2020.

`modern` is the strongest single-image setting of the breaching toolkit by the same authors: a patterned start, softened
signs, a cosine schedule, isotropic total variation over colours and their differences, and the feature prior.
"""

from attacks.matching import MatchingOptions, gradient_matching

inverting_gradients = gradient_matching(
    MatchingOptions(
        objective="cosine",
        tv=1e-4,
        signed="hard",
        schedule="step",
        lr=0.1,
        iterations=24000,
        labels="bias_corrected",
    ),
    name="inverting_gradients",
)
modern = gradient_matching(
    MatchingOptions(
        objective="cosine",
        tv=0.1,
        tv_form="opponents",
        features=0.1,
        init="patterned-4",
        signed="soft",
        schedule="cosine",
        warmup=50,
        lr=0.1,
        iterations=24000,
    ),
    name="modern",
)
