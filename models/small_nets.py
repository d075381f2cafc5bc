"""More victims of Inverting Gradients by its names: perceptrons, DenseNets, i-RevNet.

Source: Geiping et al., NeurIPS 2020. Its ResNets are wider ones of models/convnets.py.
DenseNets: Huang et al., CVPR 2017, with bottlenecks and half-size transitions, from torchvision's parts.
i-RevNet: Jacobsen, Smeulders and Oyallon, ICLR 2018, up to its last average invertible.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_unshuffle
from torchvision.models.densenet import _DenseBlock, _Transition

from models.convnets import ConvolutionalNet


def build_mlp(
    *, image_size: int = 32, in_chans: int = 3, width: int = 1024, hidden: int = 3, **options
) -> ConvolutionalNet:
    """Return a perceptron with `hidden` layers of `width` and ReLU (the paper's MLP: three of 1024; TwoLP: one of
    2048)."""
    before, layers = in_chans * image_size**2, [nn.Flatten()]
    for _ in range(hidden):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return ConvolutionalNet(nn.Sequential(*layers), before, image_size=image_size, **options)


def build_densenet(
    *, image_size: int = 32, in_chans: int = 3, growth: int = 12, layers: int = 6, **options
) -> ConvolutionalNet:
    """Return DenseNet-(6 * layers + 4) for CIFAR: three dense blocks of `layers` bottlenecks that add `growth` channels
    each.

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


class ReversibleBlock(nn.Module):
    """(x1, x2) -> (S x2, S x1 + F(x2)), halves (B, C, H, W) of the channels: no information is lost.

    S moves squares of stride x stride pixels into channels; F is a bottleneck of three convolutions from `before` to
    `after` = before * stride^2 channels, a fourth as wide inside. The first block of a network has no norm in front.
    """

    def __init__(self, before: int, after: int, stride: int, first: bool, dropout: float):
        super().__init__()
        inner = after // 4
        layers = [] if first else [nn.BatchNorm2d(before), nn.ReLU()]
        layers += [nn.Conv2d(before, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()]
        layers += [nn.Conv2d(inner, inner, 3, 1, 1, bias=False), nn.Dropout(dropout), nn.BatchNorm2d(inner), nn.ReLU()]
        self.branch = nn.Sequential(*layers, nn.Conv2d(inner, after, 3, 1, 1, bias=False))
        self.stride = stride

    def forward(self, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        one, other = (pixel_unshuffle(half, self.stride) for half in halves)
        return other, one + self.branch(halves[1])


class ReversibleBody(nn.Module):
    """Images (B, C, H, W) -> features (B, 2 * 16 * width): empty channels fill up two halves of `width`, then blocks
    of which the first of the second and third stage halves the sides, a norm, and the mean over places."""

    def __init__(self, width: int, blocks: int, dropout: float):
        super().__init__()
        channels, self.width, self.blocks = width, width, nn.ModuleList()
        for stage in range(3):
            for place in range(blocks):
                stride = 2 if stage and not place else 1
                first = not stage and not place
                self.blocks.append(ReversibleBlock(channels, channels * stride**2, stride, first, dropout))
                channels *= stride**2
        self.norm = nn.BatchNorm2d(2 * channels, momentum=0.9)

    def halves(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last block gives, two halves (B, 16 * width, H / 4, W / 4)."""
        filled = pad(images, (0, 0, 0, 0, 0, 2 * self.width - images.shape[1]))  # (B, 2 * width, H, W)
        halves = filled[:, : self.width], filled[:, self.width :]
        for block in self.blocks:
            halves = block(halves)
        return halves

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(torch.cat(self.halves(images), dim=1)).relu().mean(dim=(2, 3))


def build_irevnet(
    *, image_size: int = 32, in_chans: int = 3, width: int = 16, blocks: int = 18, dropout: float = 0.1, **options
) -> ConvolutionalNet:
    """Return i-RevNet for CIFAR: three stages of `blocks` reversible blocks, of 1, 4 and 16 times `width` channels a
    half."""
    if in_chans > 2 * width or image_size % 4:
        raise ValueError("irevnet needs a side divisible by 4 and channels for the image: 2 width, at least")
    return ConvolutionalNet(ReversibleBody(width, blocks, dropout), 32 * width, image_size=image_size, **options)
