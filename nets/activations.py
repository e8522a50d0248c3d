"""The activations under study: names, factories, and the gain of the initial weights in front of each."""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "prelu": nn.PReLU,
    "tanh": nn.Tanh,
}
"""Name -> factory, never an instance: one PReLU in all layers would share one slope.

References:
    relu: Nair & Hinton 2010, https://www.cs.toronto.edu/~fritz/absps/reluICML.pdf
    leaky_relu: Maas et al. 2013, https://ai.stanford.edu/~amaas/papers/relu_hybrid_icml2013_final.pdf
    elu: Clevert et al. 2016, https://arxiv.org/abs/1511.07289
    gelu: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415
    silu: Elfwing et al. 2018, https://arxiv.org/abs/1702.03118
    prelu: He et al. 2015, https://arxiv.org/abs/1502.01852
    tanh: LeCun et al. 1998, https://doi.org/10.1007/3-540-49430-8_2
"""

RISING = frozenset({"relu", "leaky_relu", "elu", "tanh"})
"""Activations that never fall: of several inputs, the largest gives the largest output."""

FALLING_THEN_RISING = frozenset({"gelu", "silu", "prelu"})
"""Activations that fall, if at all, before they rise: of several inputs, the largest or the smallest gives the largest
output. `prelu` is one of them, as it may learn a negative slope. An activation in neither set always works, and costs
more time in front of a pooling."""

POINTS = 20_001
"""Points of the trapezoidal rule over [-10, 10]; gives the gains to eight digits."""


@cache
def gain(activation: str) -> float:
    """Return the factor by which the standard deviation 1/sqrt(fan_in) of a layer before `activation` is multiplied.

    It is 1/sqrt(E[f(z)^2]) for a standard normal z, which keeps the second moment of the features at 1 from layer to
    layer for any activation: sqrt(2) for relu, as in He et al.

    Reference: He et al. 2015, https://arxiv.org/abs/1502.01852; Klambauer et al. 2017,
    https://arxiv.org/abs/1706.02515 (for any activation)
    """
    inputs = torch.linspace(-10, 10, POINTS, dtype=torch.float64)
    density = torch.exp(-inputs.square() / 2) / math.sqrt(2 * math.pi)
    with torch.no_grad():
        outputs = ACTIVATIONS[activation]().double()(inputs)
    return torch.trapezoid(density * outputs.square(), inputs).rsqrt().item()
