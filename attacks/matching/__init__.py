"""Gradient matching: search images whose gradient is the leaked one.

A preset is an instance of MatchingOptions, and `gradient_matching(preset)` the attack with its values as defaults. What
matching knows of a leak is read in one place (problem.py); the loss and the loop see tensors only.
"""

from attacks.matching.loop import gradient_matching, match
from attacks.matching.options import MatchingOptions, attack_with

__all__ = ["MatchingOptions", "attack_with", "gradient_matching", "match"]
