"""The penalties under study: terms of the loss on weights, never on biases or normalisation."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

Penalty = Callable[[Sequence[Tensor]], Tensor]


def l1(weights: Sequence[Tensor], strength: float) -> Tensor:
    """Return strength x sum of |w|, a scalar."""
    return strength * torch.stack([weight.abs().sum() for weight in weights]).sum()


def l2(weights: Sequence[Tensor], strength: float) -> Tensor:
    """Return strength x sum of w^2 / 2, a scalar; under plain SGD this is weight decay of that strength."""
    return strength / 2 * torch.stack([weight.square().sum() for weight in weights]).sum()


def elastic(weights: Sequence[Tensor], l1_strength: float, l2_strength: float) -> Tensor:
    """Return the sum of both penalties, a scalar."""
    return l1(weights, l1_strength) + l2(weights, l2_strength)


PENALTIES: dict[str, Callable[[float, float], Penalty | None]] = {
    "none": lambda l1_strength, l2_strength: None,
    "l1": lambda l1_strength, l2_strength: partial(l1, strength=l1_strength),
    "l2": lambda l1_strength, l2_strength: partial(l2, strength=l2_strength),
    "elastic": lambda l1_strength, l2_strength: partial(elastic, l1_strength=l1_strength, l2_strength=l2_strength),
}
"""Name -> penalty of these strengths.

References:
    l1: Tibshirani 1996, https://doi.org/10.1111/j.2517-6161.1996.tb02080.x
    l2: Krogh & Hertz 1991, https://papers.nips.cc/paper/563-a-simple-weight-decay-can-improve-generalization
    elastic: Zou & Hastie 2005, https://doi.org/10.1111/j.1467-9868.2005.00503.x
"""


def penalised_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear and convolution layers of `net`."""
    layers = (module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for name, parameter in layer.named_parameters() if name == "weight"]
