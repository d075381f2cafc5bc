"""Every random draw is a function of (seed, where it is used), so resuming needs no saved generator states.

A training step seeds from (seed, epoch, step, rank), a training image from (seed, epoch, its place in the epoch) and an
evaluated image from (seed, its index). Results therefore do not depend on the number of loader workers, and
a run continued in the middle of an epoch draws what the straight run would have drawn.
"""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part: derive_seed(0, 'image', 7) != derive_seed(0, 'image', 8)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_cpu(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch on the CPU, from which image transforms draw."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed all global generators, those of GPUs included, from which models and Mixup draw."""
    seed_cpu(seed)
    torch.manual_seed(seed)
