"""Small ViTs of timm as victims, built as `--model timm:NAME --model_options.KEY VALUE` builds them."""

from torch import nn

from models.external import open_external


def of_timm(name: str, image_size: int, **options) -> nn.Module:
    """The timm model `name` in float64 and evaluation mode, its weights drawn from seed 0."""
    return open_external(f"timm:{name}", image_size=image_size, **options).double()
