"""The convolutional victims of the attack papers: networks for small pictures, without positions to hide.

LeNet: Zhu, Liu and Han, "Deep Leakage from Gradients", NeurIPS 2019. ConvNet and the ResNets: Geiping et al.,
"Inverting Gradients", NeurIPS 2020, whose ResNets are those of He et al. (2016), section 4.2, made wider. TARGETS:
chains of layers that linear systems can take apart.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn

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
        """Images -> what the classifier reads, (B, num_features)."""
        return self.body(images)

    def forward(self, images: Tensor, mask: None = None) -> Tensor:
        return self.head(self.fc(self.features(images)))


def build_lenet(*, image_size: int = 32, in_chans: int = 3, activation: str = "sigmoid", **options) -> ConvolutionalNet:
    """DLG's LeNet: three 5 x 5 convolutions of 12 channels; every weight and bias uniform in [-0.5, 0.5].

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
    """Inverting Gradients' ConvNet64: eight 3 x 3 convolutions with BatchNorm and ReLU, two 3 x 3 max-poolings.

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
    """ResNet-(6 * blocks + 2) of He et al. for CIFAR: stem of `width`, three stages of width, 2 width and 4 width.

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


class Target(NamedTuple):
    """A chain without pooling, normalisation or shortcut. layers: (channels, kernel, stride, padding) of a convolution,
    or the width of a linear layer; acts: a letter of LETTERS for each, and one for the classifier behind them."""

    layers: list[tuple[int, int, int, int] | int]
    acts: str
    conv_bias: bool = False


LETTERS: dict[str, Callable[[], nn.Module]] = {
    "T": nn.Tanh,
    "L": nn.LeakyReLU,
    "R": partial(nn.LeakyReLU, 0.2),
    "S": nn.Sigmoid,
    "P": nn.Softplus,
    "I": nn.Identity,
}

WIDE3, NARROW3, WIDE4, LENET = (6, 3, 1, 0), (1, 3, 1, 0), (6, 4, 2, 0), [(12, 5, 2, 2), (12, 5, 2, 2), (12, 5, 1, 2)]
CNN6 = [(36, 3, 2, 1), (36, 3, 1, 1), (36, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1)]

# cnn2 to cnn4, lenet2, cnn6d: Chen and Campbell, "Analysing Training-Data Leakage from Gradients through Linear Systems
# and Gradient Matching", BMVC 2022, named as in their code (whose cnn3_c5 does not run: its classifier is too small).
# lenet_leaky is their LeNet; lenet is DLG's. cnn6, fcn3: Zhu and Blaschko, "R-GAP", ICLR 2021, for many classes.
TARGETS = {
    "cnn2_c0": Target([(1, 3, 2, 0)], "TT"),
    "cnn2_c1": Target([WIDE3], "TI"),
    "cnn2_c2": Target([WIDE4], "TI"),
    "cnn2_c4": Target([NARROW3], "TT"),
    "cnn2_c5": Target([(3, 3, 1, 1)], "TT"),
    "cnn2_c6": Target([(12, 5, 2, 0)], "TI"),
    "cnn2_c11": Target([WIDE3], "LS"),
    "cnn2_c21": Target([WIDE4], "LS"),
    "cnn2_c41": Target([NARROW3], "LS"),
    "cnn3_c1": Target([WIDE3, (3, 4, 2, 0)], "TTI"),
    "cnn3_c2": Target([WIDE4, (3, 3, 2, 0)], "TTI"),
    "cnn3_c3": Target([WIDE3, (9, 3, 1, 0)], "TTI"),
    "cnn3_c4": Target([NARROW3, WIDE3], "TTI"),
    "cnn3_c5": Target([(12, 5, 1, 1), (12, 5, 2, 2)], "TTI"),
    "cnn3_c6": Target([WIDE3, (3, 4, 2, 0)], "LLT"),
    "cnn3_c7": Target([WIDE3, (3, 4, 2, 0)], "TLT"),
    "cnn3_c8": Target([(9, 3, 1, 0), (3, 4, 2, 0)], "TTT"),
    "cnn3_c9": Target([(5, 3, 1, 0), (7, 3, 1, 0)], "TTT"),
    "cnn3_c11": Target([WIDE3, (3, 4, 2, 0)], "LLS"),
    "cnn3_c12": Target([WIDE3, (3, 4, 2, 0)], "PPS"),
    "cnn3_c13": Target([WIDE3, (3, 4, 2, 0)], "TTS"),
    "cnn3_c14": Target([WIDE3, (3, 4, 2, 0)], "IIS"),
    "cnn3_c15": Target([WIDE3, (3, 4, 2, 0)], "IIT"),
    "cnn3_c21": Target([WIDE4, (3, 3, 2, 0)], "LLS"),
    "cnn3_c22": Target([WIDE4, (3, 3, 2, 0)], "PPS"),
    "cnn3_c31": Target([WIDE3, (9, 3, 1, 0)], "LLS"),
    "cnn3_c32": Target([WIDE3, (9, 3, 1, 0)], "PPS"),
    "cnn3_c41": Target([NARROW3, WIDE3], "LLS"),
    "cnn3_c42": Target([NARROW3, WIDE3], "PPS"),
    "cnn4_c1": Target([WIDE3, (5, 4, 2, 0), (3, 4, 1, 0)], "TTTI"),
    "cnn4_c2": Target([(16, 5, 1, 0), (6, 5, 2, 0), (32, 5, 1, 2)], "TTTI"),
    "cnn4_c3": Target([(6, 5, 1, 0), (16, 5, 2, 0), (16, 5, 1, 2)], "TTTI"),
    "lenet_leaky": Target(LENET, "LLLI", conv_bias=True),
    "lenet2": Target([(12, 3, 2, 1), *LENET[1:]], "TTTI"),
    "cnn6": Target([(12, 4, 2, 2), *CNN6], "RRRRRRI"),
    "cnn6d": Target([(12, 4, 2, 2), (20, 3, 2, 1), *CNN6[1:]], "RRRRRRI"),
    "fcn3": Target([1000, 100], "RRI"),
}


def build_target(name: str, *, image_size: int = 32, in_chans: int = 3, **options) -> ConvolutionalNet:
    """A network of TARGETS with torch's own initial weights. fc_bias false leaves the classifier without a bias, as in
    R-GAP."""
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
