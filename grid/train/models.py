"""The built-in nets, and what is needed to build one."""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from grid.config import TrialConfig, parse_sizes
from nets.blocks import Techniques
from nets.cnn import CNN
from nets.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class NetSpec:
    """What a builder of a net needs beside the configuration."""

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
