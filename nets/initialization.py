"""The rules by which initial weights are drawn, all uniformly: names, and how far from zero each rule goes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nets.activations import Activation, gain

SHORT = 0.2
"""Standard deviation of weights in front of a norm, as a share of sqrt(1 / fan_in)."""


@dataclass(frozen=True)
class Surroundings:
    """What a rule knows of a layer."""

    fan_in: int
    """Inputs of each of its units."""
    activation: Activation | None
    """What follows; None behind the last layer."""
    norm: bool
    """Whether a norm stands between the layer and its activation."""


@dataclass(frozen=True)
class Ranges:
    """Largest absolute values of what is drawn."""

    weight: float
    bias: float


def he(layer: Surroundings) -> Ranges:
    """Keep the second moment of the features at 1 from layer to layer, with or without a norm; biases are zero."""
    factor = 1.0 if layer.activation is None else gain(layer.activation)
    return Ranges(factor * math.sqrt(3 / layer.fan_in), 0.0)


def torch_default(layer: Surroundings) -> Ranges:
    """Do what torch's own layers do: a standard deviation of sqrt(1 / 3 / fan_in), and biases as large as weights."""
    return Ranges(1 / math.sqrt(layer.fan_in), 1 / math.sqrt(layer.fan_in))


def norm_aware(layer: Surroundings) -> Ranges:
    """Draw short weights in front of a norm, as torch does in the last layer, and by fan-in elsewhere.

    A norm takes out the length of the weights in front of it, so that length only decides how far a step turns them.
    Weights that start short soon grow to the length that suits the learning rate; long ones turn too slowly. Without a
    norm a standard deviation of sqrt(1 / fan_in) carries the signal through ten layers, and learns better than `he`.
    """
    if layer.activation is None:
        return torch_default(layer)
    spread = math.sqrt(3 / layer.fan_in)
    return Ranges(SHORT * spread, 0.0) if layer.norm else Ranges(spread, 1 / math.sqrt(layer.fan_in))


INITIALIZATIONS: dict[str, Callable[[Surroundings], Ranges]] = {
    "norm_aware": norm_aware,
    "he": he,
    "torch": torch_default,
}
"""Name -> rule. `python -m benchmarks.base_rates --initialization he torch norm_aware` compares them (LOG.md).

References:
    norm_aware: Arora et al. 2019, https://arxiv.org/abs/1812.03981 (the length of weights in front of a norm); LeCun et
        al. 1998, https://doi.org/10.1007/3-540-49430-8_2 (fan-in)
    he: He et al. 2015, https://arxiv.org/abs/1502.01852
    torch: torch.nn.Linear.reset_parameters, https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
"""


def draw(
    layer: nn.Linear | nn.Conv2d, rule: str, *, activation: Activation | None, norm: bool, weights: torch.Generator
) -> None:
    """Draw the weights of a layer, and its biases if it has some.

    Biases are drawn even if it has none, so that nets with and without a norm start from the same draws.

    Args:
        layer: The layer to fill.
        rule: A name in `INITIALIZATIONS`.
        activation: What follows; None behind the last layer.
        norm: Whether a norm stands between the layer and its activation.
        weights: Draws the values; on the CPU.
    """
    ranges = INITIALIZATIONS[rule](Surroundings(layer.weight[0].numel(), activation, norm))
    biases = torch.empty(len(layer.weight)) if layer.bias is None else layer.bias
    with torch.no_grad():
        layer.weight.uniform_(-ranges.weight, ranges.weight, generator=weights)
        biases.uniform_(-ranges.bias, ranges.bias, generator=weights)
