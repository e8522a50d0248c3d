"""Evaluation with averaged weights: those that a factor keeps, or else those of `asgd` once it has begun to average."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from grid.train.actions import Use

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Weights of a net, each with its average."""


class Averages:
    """Averages of the weights of a net, which a factor changes after every step.

    Args:
        weights: Of the net that is trained.
    """

    def __init__(self, weights: Sequence[nn.Parameter]):
        self._weights = weights
        self._values = [weight.detach().clone() for weight in weights]
        self._steps = 0

    @property
    def pairs(self) -> Pairs:
        """The weights, each with its average."""
        return list(zip(self._weights, self._values, strict=True))

    @torch.no_grad()
    def update(self, change: Callable[[Sequence[Tensor], Sequence[Tensor], int], None]) -> None:
        """Have a function of the averages, the weights and the number of steps change the averages."""
        self._steps += 1
        change(self._values, [weight.detach() for weight in self._weights], self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Return live tensors, and the number of steps."""
        return {"values": self._values, "steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of other averages of the same net."""
        self._steps = state["steps"]
        for value, saved in zip(self._values, state["values"], strict=True):
            value.copy_(saved)


def update_ema(averages: Sequence[Tensor], weights: Sequence[Tensor], step: int, use: Use) -> None:
    """Move exponential averages towards the weights, at first faster than the setting `ema_decay` says.

    The decay is (1 + step) / (10 + step) as long as that is less, so that the initial weights are soon forgotten.

    Reference: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780; for the beginning, `num_updates` of
    TensorFlow's https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """
    decay = min(float(use.config.setting("ema_decay")), (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)  # one kernel for all weights


@contextmanager
def averaged_weights(net: nn.Module, pairs: Pairs, batches: Iterable[Tensor]) -> Iterator[None]:
    """Replace the weights of `net` by their averages within the context.

    Batch norm statistics depend on the weights, so they are estimated again. Everything is restored afterwards.

    Args:
        net: Net in evaluation mode.
        pairs: The weights, each with its average; if there are none, nothing is done.
        batches: Scaled training images from which the batch norm statistics are estimated.

    Reference: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; for the statistics, Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407 (section 3.2)
    """
    if not pairs:
        yield
        return
    kept = [(buffer, buffer.clone()) for buffer in net.buffers()]
    _exchange(pairs)
    try:
        _estimate_norms(net, batches)
        yield
    finally:
        _exchange(pairs)
        for buffer, value in kept:
            buffer.copy_(value)


def averages_of(optimizer: Optimizer) -> Pairs:
    """Return the weights with the averages that their optimizer keeps; only `asgd` keeps any."""
    begins_at = optimizer.param_groups[0].get("t0")
    return [
        (parameter, state["ax"])
        for parameter, state in optimizer.state.items()
        if begins_at is not None and state["step"] > begins_at
    ]


@torch.no_grad()
def _exchange(pairs: Pairs) -> None:
    for parameter, average in pairs:
        kept = parameter.clone()
        parameter.copy_(average)
        average.copy_(kept)


@torch.no_grad()
def _estimate_norms(net: nn.Module, batches: Iterable[Tensor]) -> None:
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average over the batches
        norm.train()
    try:
        for images in batches:
            net(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
