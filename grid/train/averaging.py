"""Evaluation with averaged weights, which `asgd` (averaged SGD) is evaluated with once it has begun to average."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer


@contextmanager
def averaged_weights(net: nn.Module, optimizer: Optimizer, batches: Iterable[Tensor]) -> Iterator[None]:
    """Replace the weights of `net` by the optimizer's averages within the context; only `asgd` has any.

    Batch norm statistics depend on the weights, so they are estimated again. Everything is restored afterwards.

    Args:
        net: Net in evaluation mode.
        optimizer: The optimizer that trains it.
        batches: Scaled training images from which the batch norm statistics are estimated.

    Reference: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; for the statistics, Izmailov et al. 2018,
    https://arxiv.org/abs/1803.05407 (section 3.2)
    """
    pairs = _averages(optimizer)
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


def _averages(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    begins_at = optimizer.param_groups[0].get("t0")
    return [
        (parameter, state["ax"])
        for parameter, state in optimizer.state.items()
        if begins_at is not None and state["step"] > begins_at
    ]


@torch.no_grad()
def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
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
