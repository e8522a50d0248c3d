"""Residual net: 3x3 convolutions, each pooled to half the side and followed by a residual block."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nets.blocks import FlattenPixels, Techniques, block, conv3x3, output

Maps = Float[Tensor, "batch channels height width"]


class Residual(nn.Module):
    """Adds what layers make of feature maps to the maps, times a number that is learned and is 0 at first.

    So the net starts as one without the layers, and trains with and without batch norm.

    Args:
        layers: They keep the shape of the maps.

    Reference: De & Smith 2020, https://arxiv.org/abs/2002.10444 (SkipInit)
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.share = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Maps) -> Maps:
        """Return maps of the same shape."""
        changed: Tensor = maps + self.share.to(maps.dtype) * self.layers(maps)
        return changed


class ResNet(nn.Module):
    """Stages of a 3x3 convolution block with 2x2 max pooling and a residual block of two more; then a linear layer.

    It sees the pixels that are left, not their mean: where a stroke is matters for characters.

    Args:
        image_shape: Channels, height and width of an image; every stage halves both sides, rounding down.
        classes: Number of outputs.
        channels: Output channels of each stage.
        techniques: Activation, batch norm and dropout.
        weights: Draws the initial weights; on the CPU.
        masks: Draws the dropout masks; on the device that trains.

    Reference: He et al. 2016, https://arxiv.org/abs/1512.03385; stages as in Page 2018,
    https://github.com/davidcpage/cifar10-fast (one convolution, then a residual block)
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int],
        techniques: Techniques,
        weights: torch.Generator,
        masks: torch.Generator,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((image_shape[0], *channels)):
            layers += block(conv3x3, before, after, techniques, weights, masks, pooled=True)
            inner = [block(conv3x3, after, after, techniques, weights, masks) for _ in range(2)]
            layers.append(Residual(*(module for modules in inner for module in modules)))
        _, height, width = image_shape
        pixels = (height >> len(channels)) * (width >> len(channels))
        self.layers = nn.Sequential(
            *layers, FlattenPixels(), output(channels[-1] * pixels, classes, techniques, weights)
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.layers(images)
        return logits
