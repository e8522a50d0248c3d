"""The activations under study: a name, how to build one, and the gain its weights start with."""

import math
from collections.abc import Callable

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

EXACT_GAINS: dict[str, float] = {
    "tanh": 5 / 3,
    "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
    "prelu": math.sqrt(2 / (1 + 0.25**2)),
}
"""Gains with a closed form other than ReLU's; `torch.nn.init.calculate_gain` gives the same numbers."""


def gain(activation: str) -> float:
    """Return what the standard deviation 1/sqrt(fan_in) of a layer in front of `activation` is multiplied with.

    Rectifier-like units (relu, elu, gelu, silu, and any activation added later) take ReLU's sqrt(2): their second
    moment under a standard normal input is close to ReLU's half.

    Reference: He et al. 2015, https://arxiv.org/abs/1502.01852; Glorot & Bengio 2010,
    https://proceedings.mlr.press/v9/glorot10a.html
    """
    return EXACT_GAINS.get(activation, math.sqrt(2))
