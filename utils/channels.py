"""How many channels a model's pictures have: 3 of colour, or 1 of grey."""

from torch import nn


def channels_of(model: nn.Module) -> int:
    """Return the channels of the images a model takes: as it was built with, else 1 where the first convolution reads
    one channel, else 3."""
    built = (getattr(model, "arguments", None) or {}).get("in_chans")
    if built:
        return built
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return 1 if first is not None and first.in_channels == 1 else 3
