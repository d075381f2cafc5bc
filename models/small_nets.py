"""More victims of Inverting Gradients by its names: perceptrons, DenseNets.

Source: Geiping et al., NeurIPS 2020. Its ResNets are wider ones of models/convnets.py.
DenseNets: Huang et al., CVPR 2017, with bottlenecks and half-size transitions, from torchvision's parts. The paper's
iRevNet is not here: no library that this project uses has reversible residual blocks.
"""

from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition

from models.convnets import ConvolutionalNet


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
