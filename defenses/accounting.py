"""The privacy that training spends: a history of its updates, and the (epsilon, delta) composed over all of it.

A history is a list of segments [z, q, updates], plain values that a checkpoint holds: the noise multiplier, the share
of the training set that an update takes, and how many such updates there were, in order. z is 0 where nothing is
guaranteed: no defence, or one without clipping or without noise. A history of None is not known, and never becomes
known again. Adding or removing one example is taken to change the sum that is noised by at most C. Two numbers follow:

    epsilon           every update draws each example with probability q, independently (Poisson sampling). By Opacus:
                      Renyi differential privacy (rdp: Mironov et al., 2019) or privacy loss distributions (prv: Gopi et
                      al., 2021), which are upper bounds; gdp (Bu et al., 2020) is a limit that may understate.
    epsilon_shuffled  every epoch shuffles the examples and takes each at most once, as our training does. Nothing is
                      gained from not knowing when: an example spends one Gaussian mechanism an epoch, E of which are
                      one with mu = sqrt(E) / z, whose epsilon is exact (Balle and Wang, ICML 2018, theorem 8).
"""

import math
import warnings
from collections.abc import Sequence

History = list  # of segments [z, q, updates]

ACCOUNTANTS = ("rdp", "prv", "gdp")
PRV_ERROR = 0.01  # of epsilon, Opacus' default
LARGEST_GRID = 2e7  # cells, about a gigabyte
NO_OPACUS = "epsilon is not accounted: Opacus is not installed (pip install opacus)"
NO_NOISE = "no guarantee: no noise"
NOT_KNOWN = "no guarantee: the checkpoint that was resumed does not say how its updates were noised"
MEANING = "epsilon holds for Poisson sampling of the same rate, epsilon_shuffled for the shuffled epochs of this run"


def extended(history: Sequence | None, noise_multiplier: float, sample_rate: float, updates: int) -> History | None:
    """Return the history followed by `updates` more; equal neighbours become one segment, and None stays None."""
    if history is None:
        return None
    segments = [list(segment) for segment in history]
    if updates and segments and segments[-1][:2] == [noise_multiplier, sample_rate]:
        segments[-1][2] += updates
    elif updates:
        segments.append([noise_multiplier, sample_rate, updates])
    return segments


def guarantee(history: Sequence | None, delta: float, accountant: str = "rdp") -> dict:
    """Return {"epsilon", "epsilon_shuffled", "delta", "privacy"}; privacy says in words what the numbers mean.

    Both are None where one update was without guarantee or the history is not known, epsilon also where Opacus is not
    installed or cannot compute it.
    """
    told = {"epsilon": None, "epsilon_shuffled": None, "delta": delta}
    if history is None:
        return told | {"privacy": NOT_KNOWN}
    updates, bare = sum(segment[2] for segment in history), sum(n for z, _, n in history if z == 0)
    if bare:
        some = f"no guarantee: {bare} of {updates} updates were made without clipping or without noise"
        return told | {"privacy": NO_NOISE if bare == updates else some}
    try:
        told["epsilon_shuffled"] = shuffled_epsilon(history, delta)
        epsilon = poisson_epsilon(history, delta, accountant)
    except ImportError:
        return told | {"privacy": NO_OPACUS}
    except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
        failed = f"epsilon is not accounted: {accountant} failed ({type(error).__name__})"
        return told | {"privacy": f"{failed}; choose another --defense_options.accountant, or more noise"}
    caution = "; gdp may understate epsilon" if accountant == "gdp" else ""
    return told | {"epsilon": epsilon, "privacy": MEANING + caution}


def poisson_epsilon(history: Sequence, delta: float, accountant: str) -> float:
    """Return epsilon of all segments together under Poisson sampling. Raises ImportError without Opacus, one of the
    errors that `guarantee` catches where the accountant fails."""
    from opacus.accountants import create_accountant
    from opacus.accountants.analysis import gdp

    if not history:
        return 0.0
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest one tried: the bound holds at each
        if accountant == "gdp":  # Opacus' own looks at the last segment alone; mu adds up in squares
            parts = [gdp.compute_mu_poisson(steps=n, noise_multiplier=z, sample_rate=q) for z, q, n in history]
            return finite(gdp.eps_from_mu(mu=math.hypot(*parts), delta=delta))
        for name in dict.fromkeys(("rdp", accountant)):
            if name == "prv" and grid_cells(found["rdp"], history, delta) > LARGEST_GRID:
                raise MemoryError
            ledger = create_accountant(name)
            ledger.history = [tuple(segment) for segment in history]
            found[name] = finite(ledger.get_epsilon(delta))
    return found[accountant]


def shuffled_epsilon(history: Sequence, delta: float) -> float:
    """Return the exact epsilon of Gaussian mechanisms, one for every epoch in which an example may have taken part."""
    from scipy.optimize import brentq  # takes a second to import, and every defence imports this module
    from scipy.special import log_ndtr

    mu = finite(math.hypot(*(math.sqrt(times) / z for z, times in participations(history))))
    if mu == 0:
        return 0.0

    def excess(epsilon: float) -> float:  # log of the delta that epsilon needs, less the one allowed
        first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return first + math.log(max(-math.expm1(second - first), 1e-300)) - math.log(delta)

    if excess(0) <= 0:
        return 0.0
    largest = finite(mu**2 / 2) + mu * math.sqrt(2 * math.log(1 / delta))  # the Gaussian tail of the privacy loss
    return brentq(excess, 0, largest)


def participations(history: Sequence) -> list[tuple[float, int]]:
    """Return (z, how often an example may have taken part) of every segment: once in each epoch that it touches."""
    found, inside = [], False  # whether the segment begins inside an epoch
    for z, q, updates in history:
        an_epoch = max(1, math.floor(1 / q + 1e-9))
        found.append((z, -(-updates // an_epoch) + inside))
        inside = inside or updates % an_epoch > 0
    return found


def grid_cells(epsilon: float, history: Sequence, delta: float) -> float:
    """Return about how many cells prv's grid has: from -epsilon to epsilon at the width that Opacus takes."""
    updates = sum(segment[2] for segment in history)
    return 2 * epsilon / PRV_ERROR * math.sqrt(updates * math.log(12 * 1000 / delta) / 2)


def finite(epsilon: float) -> float:
    """Return epsilon as a plain number. Raises ArithmeticError unless it is finite."""
    if not math.isfinite(epsilon):
        raise ArithmeticError
    return float(epsilon)
