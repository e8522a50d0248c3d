"""Multi-layer perceptron: dense layers on the flattened image."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nets.blocks import Techniques, block, linear, output


class MLP(nn.Module):
    """Hidden blocks on the flattened image, then a linear layer.

    Args:
        pixels: Numbers in an image: channels x height x width.
        classes: Number of outputs.
        hidden_sizes: Width of each hidden layer.
        techniques: Activation, batch norm and dropout.
        weights: Draws the initial weights; on the CPU.
        masks: Draws the dropout masks; on the device that trains.
    """

    def __init__(
        self,
        *,
        pixels: int,
        classes: int,
        hidden_sizes: Sequence[int],
        techniques: Techniques,
        weights: torch.Generator,
        masks: torch.Generator,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for in_size, out_size in pairwise((pixels, *hidden_sizes)):
            layers += block(linear, in_size, out_size, techniques, weights, masks)
        layers.append(output(hidden_sizes[-1], classes, techniques, weights))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.layers(images)
        return logits
