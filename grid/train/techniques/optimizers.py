"""The optimizer of a configuration."""

from collections.abc import Iterable, Mapping
from inspect import signature

from torch import nn
from torch.optim import ASGD, Optimizer

from grid.config import TrialConfig
from grid.parts.registry import OptimizerSpec, find


def base_learning_rate(cell: Mapping[str, str]) -> float:
    """Return the peak learning rate of a cell at `lr_scale` 1."""
    spec: OptimizerSpec = find("optimizer", cell["optimizer"])
    return spec.base_learning_rate


GPU = "cuda"


def _counts_on_host(spec: OptimizerSpec, config: TrialConfig) -> bool:
    """Return whether an optimizer would count its steps on a GPU and read the count back for every tensor.

    That waits for the GPU each time. Optimizers of torch that take `capturable` compute with the count where it is.
    """
    return config.device == GPU and "capturable" in signature(spec.build.resolve()).parameters


def build_optimizer(config: TrialConfig, parameters: Iterable[nn.Parameter], *, average_from_step: int) -> Optimizer:
    """Build the optimizer of a configuration.

    Args:
        config: Names it, its peak learning rate and its settings, and whether to use a fused kernel if there is one.
        parameters: The parameters to update.
        average_from_step: Step at which `asgd` begins to average; torch's default, a million, would never be reached.
    """
    spec: OptimizerSpec = find("optimizer", config.optimizer)
    fused = {"fused": True} if config.fused and spec.fused else {}
    capturable = {"capturable": True} if _counts_on_host(spec, config) and not fused else {}
    optimizer: Optimizer = spec.build(
        parameters, lr=config.learning_rate, **spec.options(config), **fused, **capturable
    )
    if isinstance(optimizer, ASGD):
        for group in optimizer.param_groups:
            group["t0"] = average_from_step
    return optimizer
