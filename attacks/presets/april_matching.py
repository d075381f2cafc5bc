"""The optimisation attack of APRIL: gradient matching with the direction of the position-embedding gradient.

Works on any ViT with a learned position embedding, where the closed form of april.py needs a special first block. The
paper gives neither its optimizer nor the weight of its term; Adam, and 1, which ports report to be insensitive.
Source: Lu et al., "APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers", CVPR 2022, section 4.
"""

from attacks.matching import MatchingOptions, gradient_matching

april_matching = gradient_matching(
    MatchingOptions(objective="l2", pos_embed_cosine=1.0, lr=0.1, schedule="cosine", iterations=8000),
    name="april_matching",
)
