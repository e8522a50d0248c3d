"""The optimizers under study and their base learning rates."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import ASGD, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop


@dataclass(frozen=True)
class OptimizerSpec:
    """One row of `OPTIMIZERS`."""

    build: Callable[..., Optimizer]
    """Called with the parameters and `lr`."""
    base_learning_rate: float
    """Learning rate at `lr_scale` 1."""
    fused: bool
    """Whether torch has a fused kernel for it, which updates all weights at once."""


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "sgd": OptimizerSpec(partial(SGD, momentum=0.9), 0.05, fused=True),
    "adam": OptimizerSpec(Adam, 2e-3, fused=True),
    "rmsprop": OptimizerSpec(RMSprop, 1e-3, fused=False),
    "asgd": OptimizerSpec(partial(ASGD, lambd=0.0), 0.5, fused=False),
    "adagrad": OptimizerSpec(Adagrad, 2e-2, fused=True),
    "adamw": OptimizerSpec(partial(AdamW, weight_decay=1e-2), 2e-3, fused=True),
    "nadam": OptimizerSpec(NAdam, 2e-3, fused=False),
}
"""Name -> factory and base learning rate.

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


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, learning_rate: float, fused: bool, average_from_step: int
) -> Optimizer:
    """Build an optimizer of `OPTIMIZERS`.

    Args:
        name: A name in `OPTIMIZERS`.
        parameters: The parameters to update.
        learning_rate: Peak learning rate.
        fused: Use torch's fused kernel if the optimizer has one.
        average_from_step: Step at which `asgd` begins to average; torch's default, a million, would never be reached.
    """
    spec = OPTIMIZERS[name]
    optimizer = spec.build(parameters, lr=learning_rate, **({"fused": True} if fused and spec.fused else {}))
    for group in optimizer.param_groups:
        if "t0" in group:
            group["t0"] = average_from_step
    return optimizer
