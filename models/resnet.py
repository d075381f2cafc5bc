"""ResNets for ImageNet: 50, the convolutional baseline of the MJP paper, and 18, a victim of Inverting Gradients.

They have no positions to hide: images are only shuffled.
"""

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor


class ConvolutionalClassifier(ResNet):
    """timm's ResNet behind the interface of models/__init__.py; checkpoint names equal torchvision's."""

    hides_positions = False

    def __init__(self, *, image_size: int = 224, patch_size: int = 16, **timm_options):
        super().__init__(**timm_options)
        self.grid, self.patch_size = (image_size // patch_size, image_size // patch_size), patch_size

    def forward_features(self, images: Tensor, mask: None = None) -> Tensor:
        """Map images to a feature map (B, num_features, H/32, W/32)."""
        return super().forward_features(images)

    def features(self, images: Tensor, mask: None = None) -> Tensor:
        """Map images to average-pooled features (B, num_features)."""
        return self.forward_head(self.forward_features(images), pre_logits=True)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        return super().forward(images)


def build_resnet50(*, drop_path: float = 0.0, **options) -> ConvolutionalClassifier:
    """Return ResNet-50 (He et al., 2016), 25.6 M parameters; patch_size only sets the cells of the puzzle."""
    return ConvolutionalClassifier(block=Bottleneck, layers=(3, 4, 6, 3), drop_path_rate=drop_path, **options)


def build_resnet18(*, drop_path: float = 0.0, zero_init_last: bool = False, **options) -> ConvolutionalClassifier:
    """Return ResNet-18, 11.7 M parameters. zero_init_last: start residual branches at zero, as timm does; an untrained
    victim then has gradients of zero in them, and those of the attack papers do not."""
    options |= {"drop_path_rate": drop_path, "zero_init_last": zero_init_last}
    return ConvolutionalClassifier(block=BasicBlock, layers=(2, 2, 2, 2), **options)
