"""More victims of Inverting Gradients by its names: CIFAR ResNets of every depth and width, perceptrons, DenseNets.

Source: Geiping et al., NeurIPS 2020. ResNets: He et al., 2016, section 4.2; 20-10 and 28-10 are ten times as wide.
DenseNets: Huang et al., CVPR 2017, with bottlenecks and half-size transitions, from torchvision's parts. The paper's
iRevNet is not here: no library that this project uses has reversible residual blocks.
"""

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition

from models.convnets import ConvolutionalNet, build_cifar_resnet


def build_mlp(
    *, image_size: int = 32, in_chans: int = 3, width: int = 1024, hidden: int = 3, **options
) -> ConvolutionalNet:
    """A perceptron with `hidden` layers of `width` and ReLU (the paper's MLP: three of 1024; TwoLP: one of 2048)."""
    before, layers = in_chans * image_size**2, [nn.Flatten()]
    for _ in range(hidden):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return ConvolutionalNet(nn.Sequential(*layers), before, image_size=image_size, **options)


def build_densenet(
    *, image_size: int = 32, in_chans: int = 3, growth: int = 12, layers: int = 6, **options
) -> ConvolutionalNet:
    """DenseNet-(6 * layers + 4) for CIFAR: three dense blocks of `layers` bottlenecks that add `growth` channels each.

    The stem is a 3 x 3 convolution of 2 * growth channels; a transition halves channels and sides between blocks.
    """
    channels = 2 * growth
    body: list[nn.Module] = [nn.Conv2d(in_chans, channels, kernel_size=3, padding=1, bias=False)]
    for block in range(3):
        body.append(_DenseBlock(layers, channels, bn_size=4, growth_rate=growth, drop_rate=0.0))
        channels += layers * growth
        if block < 2:
            body.append(_Transition(channels, channels // 2))
            channels //= 2
    body += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return ConvolutionalNet(nn.Sequential(*body), channels, image_size=image_size, **options)


def _resnet(depth: int, times: int = 1, **options) -> Callable[..., ConvolutionalNet]:
    """Return the builder of a CIFAR ResNet, `times` as wide as He et al. have it."""
    return partial(build_cifar_resnet, blocks=(depth - 2) // 6, width=16 * times, **options)


SMALL_NETS: dict[str, Callable[..., ConvolutionalNet]] = {
    **{f"resnet{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "resnet20_nostride": _resnet(20, strides=(1, 1, 1)),
    "resnet20_4": _resnet(20, 4),
    "resnet20_4_unpooled": _resnet(20, 4, pool="max"),
    "resnet20_10": _resnet(20, 10),
    "resnet28_10": partial(build_cifar_resnet, blocks=4, width=160),
    "resnet32_10": _resnet(32, 10),
    "mlp": build_mlp,
    "mlp2": partial(build_mlp, width=2048, hidden=1),
    "densenet40": build_densenet,
    "densenet40_4": partial(build_densenet, growth=48),
}
