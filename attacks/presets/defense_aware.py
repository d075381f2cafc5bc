"""The attacker who knows the defence and its strength: maximum a posteriori under its likelihood, from the closed form.

For noise, DP-SGD, pruning and quantisation (attacks/matching/likelihood.py says what is assumed of each); other
defences have attackers of their own (mjp_aware, token_span, ats_aware, or any that leaves a gradient out). `defense`
and its options must be told: an honest-but-curious server knows the protocol. Needs what `closed_form` needs to start
from; with init randn or zeros any network.
Source: Balunovic, Dimitrov, Staab, Vechev, "Bayesian framework for gradient leakage", ICLR 2022, arXiv 2111.04706: the
likelihood of a known noise and a prior; the start from the closed form and the censored likelihoods are ours.
"""

from attacks.matching import MatchingOptions, gradient_matching

defense_aware = gradient_matching(
    MatchingOptions(
        objective="likelihood",
        init="closed_form",
        tv=0.02,
        lr=5e-3,
        schedule="cosine",
        iterations=300,
    ),
    name="defense_aware",
)
