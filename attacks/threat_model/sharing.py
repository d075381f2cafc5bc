"""What of a network clients train and share, by name (models/partial.py); the command line needs no torch for these."""

from utils.registry import Registry

SHARES = Registry(
    all="models.partial:All",
    head="models.partial:Head",
    lora="models.partial:Lora",
    adapters="models.partial:Adapters",
    without_positions="models.partial:WithoutPositions",
)
