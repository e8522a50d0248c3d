"""The penalties under study: terms of the loss on weights, never on biases or normalisation.

A penalty adds its gradient after the backward pass of the cross-entropy, which is mathematically the same as a term of
the loss, without a graph over all weights at every step.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

Weights = Sequence[nn.Parameter]


@torch.no_grad()
def add_l1(weights: Weights, strength: float) -> None:
    """Add the gradient of strength x sum of |w|."""
    for weight in weights:
        assert weight.grad is not None  # noqa: S101  (called after a backward pass)
        weight.grad.add_(weight.sign(), alpha=strength)


@torch.no_grad()
def add_l2(weights: Weights, strength: float) -> None:
    """Add the gradient of strength x sum of w^2 / 2; under plain SGD this is weight decay of that strength."""
    for weight in weights:
        assert weight.grad is not None  # noqa: S101  (called after a backward pass)
        weight.grad.add_(weight, alpha=strength)


def add_elastic(weights: Weights, l1_strength: float, l2_strength: float) -> None:
    """Add the gradients of both penalties."""
    add_l1(weights, l1_strength)
    add_l2(weights, l2_strength)


PENALTIES: dict[str, Callable[[Weights, float, float], None]] = {
    "none": lambda weights, l1_strength, l2_strength: None,
    "l1": lambda weights, l1_strength, l2_strength: add_l1(weights, l1_strength),
    "l2": lambda weights, l1_strength, l2_strength: add_l2(weights, l2_strength),
    "elastic": add_elastic,
}
"""Name -> function that adds the penalty's gradient to those of the weights, given the strengths of L1 and of L2.

References:
    l1: Tibshirani 1996, https://doi.org/10.1111/j.2517-6161.1996.tb02080.x
    l2: Krogh & Hertz 1991, https://papers.nips.cc/paper/563-a-simple-weight-decay-can-improve-generalization
    elastic: Zou & Hastie 2005, https://doi.org/10.1111/j.1467-9868.2005.00503.x
"""


def penalised_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear and convolution layers of `net`."""
    layers = (module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return [parameter for layer in layers for name, parameter in layer.named_parameters() if name == "weight"]
