"""The convolutional victims of the attack papers: networks for small pictures, without positions to hide.

LeNet: Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019. ConvNet and the ResNets: Geiping et al.,
"Inverting Gradients", NeurIPS 2020, whose ResNets are those of He et al. (2016), section 4.2, made wider.
"""

import math
from collections.abc import Callable
from functools import partial

from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

from models.chains import TARGETS
from utils.errors import look_up

ACTIVATIONS = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
}


class ConvolutionalNet(nn.Module):
    """`body`, images (B, C, H, W) -> (B, num_features), and a linear classifier `fc`, behind the interface of
    models/__init__.py. patch_size only sets the cells of the puzzle; `head` is an activation of the logits."""

    hides_positions = False

    def __init__(
        self,
        body: nn.Module,
        num_features: int,
        *,
        num_classes: int,
        image_size: int,
        patch_size: int = 4,
        drop_path: float = 0.0,
        fc_bias: bool = True,
        head: nn.Module | None = None,
    ):
        super().__init__()
        if drop_path:
            raise ValueError("stochastic depth is not part of this network: set drop_path to 0")
        self.grid, self.patch_size = (image_size // patch_size, image_size // patch_size), patch_size
        self.image_size, self.num_features = image_size, num_features
        self.body, self.fc = body, nn.Linear(num_features, num_classes, bias=fc_bias)
        self.head = head or nn.Identity()

    def features(self, images: Tensor, mask: None = None) -> Tensor:
        """Map images to what the classifier reads, (B, num_features)."""
        return self.body(images)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        return self.head(self.fc(self.features(images)))


def build_lenet(*, image_size: int = 32, in_chans: int = 3, activation: str = "sigmoid", **options) -> ConvolutionalNet:
    """Return DLG's LeNet: three 5 x 5 convolutions of 12 channels; every weight and bias uniform in [-0.5, 0.5].

    Smooth activations leak to L-BFGS; with ReLU (as with any piecewise linear one) the matching loses its curvature.
    activation: a name in ACTIVATIONS.
    """
    act = look_up(ACTIVATIONS, activation, "activation")
    convolutions = [
        layer
        for channels, stride in ((in_chans, 2), (12, 2), (12, 1))
        for layer in (nn.Conv2d(channels, 12, kernel_size=5, stride=stride, padding=2), act())
    ]
    side = (image_size + 3) // 4  # rounded up twice
    model = ConvolutionalNet(nn.Sequential(*convolutions, nn.Flatten()), 12 * side**2, image_size=image_size, **options)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def build_convnet(*, image_size: int = 32, in_chans: int = 3, width: int = 64, **options) -> ConvolutionalNet:
    """Return Inverting Gradients' ConvNet64: eight 3 x 3 convolutions with BatchNorm and ReLU, two 3 x 3 max-poolings.

    2.9 M parameters with 10 classes. The paper's own code lists one more convolution, which a repeated name overwrites.
    """
    widths = [in_chans, *(factor * width for factor in (1, 2, 2, 4, 4, 4, 4, 4))]
    layers = []
    for place, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        if place in (5, 7):
            layers.append(nn.MaxPool2d(3))
    side = image_size // 3 // 3
    body = nn.Sequential(*layers, nn.Flatten())
    return ConvolutionalNet(body, 4 * width * side**2, image_size=image_size, **options)


def build_cifar_resnet(
    *,
    image_size: int = 32,
    in_chans: int = 3,
    width: int = 64,
    blocks: int = 3,
    strides: tuple[int, int, int] = (1, 2, 2),
    pool: str = "mean",
    **options,
) -> ConvolutionalNet:
    """Return ResNet-(6 * blocks + 2) of He et al. for CIFAR: stem of `width`, three stages of width, 2 width and 4
    width.

    Where the shape changes the shortcut is a 1 x 1 convolution with BatchNorm. strides: of the three stages. pool: mean
    or max over the places of the last stage (max is the variant that Inverting Gradients' code calls unpooled).
    """
    pooling = look_up({"mean": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}, pool, "pool")
    layers: list[nn.Module] = [
        nn.Conv2d(in_chans, width, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for after, stride in zip((width, 2 * width, 4 * width), strides, strict=True):
        changes = stride > 1 or after != before
        shortcut = downsample_conv(before, after, kernel_size=1, stride=stride) if changes else None
        layers.append(BasicBlock(before, after, stride, shortcut))
        layers += [BasicBlock(after, after) for _ in range(blocks - 1)]
        before = after
    body = nn.Sequential(*layers, pooling(1), nn.Flatten())
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return ConvolutionalNet(body, before, image_size=image_size, **options)


LETTERS: dict[str, Callable[[], nn.Module]] = {
    "T": nn.Tanh,
    "L": nn.LeakyReLU,
    "R": partial(nn.LeakyReLU, 0.2),
    "S": nn.Sigmoid,
    "P": nn.Softplus,
    "I": nn.Identity,
}


def build_target(name: str, *, image_size: int = 32, in_chans: int = 3, **options) -> ConvolutionalNet:
    """Return a network of TARGETS with torch's own initial weights. fc_bias false leaves the classifier without a bias,
    as in R-GAP."""
    layers, acts, conv_bias = TARGETS[name]
    body: list[nn.Module] = []
    shape = (in_chans, image_size, image_size)
    for layer, act in zip(layers, acts, strict=False):
        if isinstance(layer, int):
            body += [nn.Flatten(), nn.Linear(math.prod(shape), layer, bias=False)]  # Flatten leaves flat input alone
            shape = (layer,)
        else:
            channels, kernel, stride, padding = layer
            body.append(nn.Conv2d(shape[0], channels, kernel, stride, padding, bias=conv_bias))
            side = (shape[1] + 2 * padding - kernel) // stride + 1
            shape = (channels, side, side)
        body.append(LETTERS[act]())
    body, head = nn.Sequential(*body, nn.Flatten()), LETTERS[acts[-1]]()
    return ConvolutionalNet(body, math.prod(shape), image_size=image_size, head=head, **options)
