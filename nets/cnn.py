"""Convolutional net: 3x3 convolutions, each pooled to half the side, then a dense layer."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nets.blocks import FlattenPixels, Techniques, block, conv3x3, linear, output


class CNN(nn.Module):
    """3x3 convolution blocks with 2x2 max pooling, one dense block, then a linear layer.

    Args:
        image_shape: Channels, height and width of an image; every block halves both sides, rounding down.
        classes: Number of outputs.
        channels: Output channels of each convolution block.
        dense_size: Width of the dense block.
        techniques: Activation, batch norm and dropout.
        weights: Draws the initial weights; on the CPU.
        masks: Draws the dropout masks; on the device that trains.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int],
        dense_size: int,
        techniques: Techniques,
        weights: torch.Generator,
        masks: torch.Generator,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        own_channels, height, width = image_shape
        for in_channels, out_channels in pairwise((own_channels, *channels)):
            layers += block(conv3x3, in_channels, out_channels, techniques, weights, masks, pooled=True)
        pixels = (height >> len(channels)) * (width >> len(channels))
        layers.append(FlattenPixels())
        layers += block(linear, channels[-1] * pixels, dense_size, techniques, weights, masks)
        layers.append(output(dense_size, classes, techniques, weights))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.layers(images)
        return logits
