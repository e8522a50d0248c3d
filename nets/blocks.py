"""Building blocks; the order layer -> norm -> activation -> pool -> dropout is defined here and nowhere else."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nets.activations import Activation
from nets.dropout import SeededDropout
from nets.initialization import draw
from nets.pooling import PooledActivation


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """The techniques that a net is built with."""

    activation: Activation
    batch_norm: bool
    dropout_rate: float
    """Share of units dropped while training, in [0, 1); 0 leaves the dropout layers out."""
    initialization: str = "norm_aware"
    """A name in `INITIALIZATIONS`."""


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """What a net is built from, beside its own sizes."""

    image_shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    classes: int
    """Outputs of the net."""
    techniques: Techniques
    """Activation, batch norm and dropout: a net uses all of them, or they would be factors without an effect."""
    weights: torch.Generator
    """Draws the initial weights; on the CPU."""
    masks: torch.Generator
    """Draws the dropout masks; on the device that trains."""


class FlattenPixels(nn.Module):
    """Flatten feature maps pixel by pixel, channels innermost; without a copy if they are channels last in memory."""

    def forward(self, maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Return `[batch, height x width x channels]`."""
        return maps.permute(0, 2, 3, 1).flatten(start_dim=1)


def linear(in_features: int, out_features: int, *, bias: bool) -> nn.Linear:
    """Build a linear layer; `initialization.draw` fills it."""
    layer: nn.Linear = skip_init(nn.Linear, in_features, out_features, bias=bias)
    return layer


def conv3x3(in_channels: int, out_channels: int, *, bias: bool) -> nn.Conv2d:
    """Build a 3x3 convolution that keeps the size of the maps; `initialization.draw` fills it."""
    layer: nn.Conv2d = skip_init(nn.Conv2d, in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
    return layer


def block(
    layer: Callable[..., nn.Linear | nn.Conv2d],
    in_size: int,
    out_size: int,
    techniques: Techniques,
    weights: torch.Generator,
    masks: torch.Generator,
    *,
    pooled: bool = False,
) -> Iterator[nn.Module]:
    """Yield the modules of one hidden block.

    A layer in front of a norm has no bias, as the norm would subtract it again.

    Args:
        layer: `linear` or `conv3x3`.
        in_size: Input features (channels).
        out_size: Output features (channels).
        techniques: Activation, batch norm and dropout.
        weights: Draws the initial weights; on the CPU.
        masks: Draws the dropout masks; on the device that trains.
        pooled: Whether 2x2 max pooling follows the activation.

    Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167 (norm before activation, no bias)
    """
    built = layer(in_size, out_size, bias=not techniques.batch_norm)
    draw(
        built,
        techniques.initialization,
        activation=techniques.activation,
        norm=techniques.batch_norm,
        weights=weights,
    )
    yield built
    if pooled:
        yield PooledActivation(techniques.activation, nn.BatchNorm2d(out_size) if techniques.batch_norm else None)
    else:
        if techniques.batch_norm:
            yield nn.BatchNorm2d(out_size) if layer is conv3x3 else nn.BatchNorm1d(out_size)
        yield techniques.activation.build()
    if techniques.dropout_rate > 0:
        yield SeededDropout(techniques.dropout_rate, masks)


def output(in_size: int, classes: int, techniques: Techniques, weights: torch.Generator) -> nn.Linear:
    """Build the last layer, which returns the logits.

    Args:
        in_size: Input features.
        classes: Number of logits.
        techniques: Of these, the initialization alone.
        weights: Draws the initial weights; on the CPU.
    """
    layer = linear(in_size, classes, bias=True)
    draw(layer, techniques.initialization, activation=None, norm=False, weights=weights)
    return layer
