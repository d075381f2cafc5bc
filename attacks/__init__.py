"""Gradient-inversion attacks: functions (leak, *, generator, **options) -> Reconstruction.

An attack sees a Leak (attacks/leak.py) and nothing of the private batch. To add one: a file with one function whose
keyword arguments are its options, one line in ATTACKS, its name in config.AttackConfig, a config and a test.
"""

from attacks.closed_form import closed_form

ATTACKS = {"closed_form": closed_form}
