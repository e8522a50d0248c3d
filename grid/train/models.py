"""The built-in nets, built from a configuration."""

from math import prod

from torch import nn

from grid.config import InputError, TrialConfig, parse_sizes
from nets.blocks import NetSpec
from nets.cnn import CNN
from nets.mlp import MLP
from nets.resnet import ResNet


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
        channels=_checked_channels(config, spec),
        dense_size=config.dense_size,
        techniques=spec.techniques,
        weights=spec.weights,
        masks=spec.masks,
    )


def build_resnet(config: TrialConfig, spec: NetSpec) -> nn.Module:
    """Build a residual net of `channels`."""
    return ResNet(
        image_shape=spec.image_shape,
        classes=spec.classes,
        channels=_checked_channels(config, spec),
        techniques=spec.techniques,
        weights=spec.weights,
        masks=spec.masks,
    )


def _checked_channels(config: TrialConfig, spec: NetSpec) -> tuple[int, ...]:
    """Return the channels of convolutions that each halve the sides of an image.

    Raises:
        InputError: Nothing is left of it.
    """
    channels = parse_sizes(config.channels)
    _, height, width = spec.image_shape
    if min(height, width) >> len(channels) == 0:
        hint = "take fewer, such as --set channels=32-64"
        raise InputError(f"channels={config.channels} halve images of {height} x {width} until nothing is left; {hint}")
    return channels
