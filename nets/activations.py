"""What a net has to know of an activation, and the gain of the initial weights in front of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn


@dataclass(frozen=True)
class Activation:
    """How an activation is built, and what may be done because of its shape."""

    build: Callable[[], nn.Module]
    """Called for each layer, never once for all: one PReLU in all layers would share one slope."""
    shape: str = "any"
    """`rising`: it never falls, so that of several inputs, the largest gives the largest output.

    `falling_then_rising`: it falls, if at all, before it rises, so that the largest or the smallest input gives the
    largest output. `any` always works, and costs more time in front of a pooling.
    """


POINTS = 20_001
"""Points of the trapezoidal rule over [-10, 10]; gives the gains to eight digits."""


@cache
def gain(activation: Activation) -> float:
    """Return the factor by which the standard deviation 1/sqrt(fan_in) of a layer before `activation` is multiplied.

    It is 1/sqrt(E[f(z)^2]) for a standard normal z, which keeps the second moment of the features at 1 from layer to
    layer for any activation: sqrt(2) for relu, as in He et al.

    Reference: He et al. 2015, https://arxiv.org/abs/1502.01852; Klambauer et al. 2017,
    https://arxiv.org/abs/1706.02515 (for any activation)
    """
    inputs = torch.linspace(-10, 10, POINTS, dtype=torch.float64)
    density = torch.exp(-inputs.square() / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # an activation may draw weights of its own
        outputs = activation.build().double()(inputs)
    return torch.trapezoid(density * outputs.square(), inputs).rsqrt().item()
