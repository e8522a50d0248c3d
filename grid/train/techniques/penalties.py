"""The built-in penalties: terms of the loss on weights, never on biases or normalisation.

A penalty adds its gradient after the backward pass of the cross-entropy, which is mathematically the same as a term of
the loss, without a graph over all weights at every step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from grid.config import TrialConfig

Weights = Sequence[nn.Parameter]


def add_none(weights: Weights, config: TrialConfig) -> None:
    """Add nothing."""


@torch.no_grad()
def add_l1(weights: Weights, config: TrialConfig) -> None:
    """Add the gradient of `l1_strength` x sum of |w|."""
    used, gradients = _used(weights)
    torch._foreach_add_(gradients, torch._foreach_sign(used), alpha=config.l1_strength)


@torch.no_grad()
def add_l2(weights: Weights, config: TrialConfig) -> None:
    """Add the gradient of `l2_strength` x sum of w^2 / 2; under plain SGD this is weight decay of that strength."""
    used, gradients = _used(weights)
    torch._foreach_add_(gradients, used, alpha=config.l2_strength)


def add_elastic(weights: Weights, config: TrialConfig) -> None:
    """Add the gradients of both penalties."""
    add_l1(weights, config)
    add_l2(weights, config)


def _used(weights: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights that have a gradient, and these; a layer that the net does not use has none."""
    pairs = [(weight.detach(), weight.grad) for weight in weights if weight.grad is not None]
    return [weight for weight, _ in pairs], [gradient for _, gradient in pairs]


def penalised_weights(net: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear and convolution layers of `net` that are trained."""
    layers = (module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    weights = [parameter for layer in layers for name, parameter in layer.named_parameters() if name == "weight"]
    return [weight for weight in weights if weight.requires_grad]
