"""The optimizers under study and their base learning rates."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from grid.config import TrialConfig


@dataclass(frozen=True)
class OptimizerSpec:
    """One row of `OPTIMIZERS`."""

    build: Callable[..., Optimizer]
    """Called with the parameters, `lr` and the options."""
    base_learning_rate: float
    """Learning rate at `lr_scale` 1."""
    fused: bool
    """Whether torch has a fused kernel for it, which updates all weights at once."""
    options: Callable[[TrialConfig], Mapping[str, Any]] = lambda config: {}
    """What a configuration sets of it, beside the learning rate."""


def _betas(config: TrialConfig) -> dict[str, Any]:
    return {"betas": (config.beta1, config.beta2)}


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec(SGD, 0.05, fused=True, options=lambda config: {"momentum": config.momentum}),
    "adam": OptimizerSpec(Adam, 2e-3, fused=True, options=_betas),
    "rmsprop": OptimizerSpec(RMSprop, 1e-3, fused=False, options=lambda config: {"alpha": config.rmsprop_decay}),
    "asgd": OptimizerSpec(ASGD, 0.5, fused=False, options=lambda config: {"lambd": 0.0}),
    "adagrad": OptimizerSpec(Adagrad, 2e-2, fused=True),
    "adamw": OptimizerSpec(
        AdamW, 2e-3, fused=True, options=lambda config: _betas(config) | {"weight_decay": config.weight_decay}
    ),
    "nadam": OptimizerSpec(NAdam, 2e-3, fused=False, options=_betas),
}
"""Name -> factory, base learning rate, and what a configuration sets of it.

The base rates were measured by `python -m benchmarks.base_rates` on real images (the table is in LOG.md). `adamw`
decays weights separately from the loss. `asgd` has torch's decay term turned off, as decay is what the factor
`regularization` varies; it follows a schedule one step late, as torch's own does.

References:
    sgd: Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html (momentum)
    adam: Kingma & Ba 2015, https://arxiv.org/abs/1412.6980
    rmsprop: Tieleman & Hinton 2012, https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf
    asgd: Polyak & Juditsky 1992, https://doi.org/10.1137/0330046
    adagrad: Duchi et al. 2011, https://jmlr.org/papers/v12/duchi11a.html
    adamw: Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101
    nadam: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
"""


def base_learning_rate(cell: Mapping[str, str]) -> float:
    """Return the peak learning rate of a cell at `lr_scale` 1."""
    return OPTIMIZERS[cell["optimizer"]].base_learning_rate


def build_optimizer(config: TrialConfig, parameters: Iterable[nn.Parameter], *, average_from_step: int) -> Optimizer:
    """Build the optimizer of a configuration.

    Args:
        config: Names it, its peak learning rate and its settings, and whether to use a fused kernel if there is one.
        parameters: The parameters to update.
        average_from_step: Step at which `asgd` begins to average; torch's default, a million, would never be reached.
    """
    spec = OPTIMIZERS[config.optimizer]
    fused = {"fused": True} if config.fused and spec.fused else {}
    optimizer = spec.build(parameters, lr=config.learning_rate, **spec.options(config), **fused)
    for group in optimizer.param_groups:
        if "t0" in group:
            group["t0"] = average_from_step
    return optimizer
