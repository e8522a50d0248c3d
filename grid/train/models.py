"""The built-in nets, built from a configuration."""

from math import prod

from torch import nn

from grid.config import TrialConfig, parse_sizes
from nets.blocks import NetSpec
from nets.cnn import CNN
from nets.mlp import MLP


def build_mlp(config: TrialConfig, spec: NetSpec) -> nn.Module:
    """Build a multi-layer perceptron of `hidden_sizes`."""
    return MLP(
        pixels=prod(spec.image_shape),
        classes=spec.classes,
        hidden_sizes=parse_sizes(config.hidden_sizes),
        techniques=spec.techniques,
        weights=spec.weights,
        masks=spec.masks,
    )


def build_cnn(config: TrialConfig, spec: NetSpec) -> nn.Module:
    """Build a convolutional net of `channels` and `dense_size`."""
    return CNN(
        image_shape=spec.image_shape,
        classes=spec.classes,
        channels=parse_sizes(config.channels),
        dense_size=config.dense_size,
        techniques=spec.techniques,
        weights=spec.weights,
        masks=spec.masks,
    )
