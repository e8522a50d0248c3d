"""The learning-rate schedules under study. All have the same peak rate and span the full budget."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from grid.config import STEP_PARTS

FINAL_SHARE = 0.01
"""Final rate of `step` and `exponential`, as a share of the peak rate."""


@dataclass(frozen=True)
class Horizon:
    """How long a training lasts, and its highest learning rate."""

    epochs: int
    steps_per_epoch: int
    peak_learning_rate: float

    @property
    def steps(self) -> int:
        """Number of steps in the full budget."""
        return self.epochs * self.steps_per_epoch


def step(optimizer: Optimizer, horizon: Horizon) -> LRScheduler:
    """Divide the rate by ten after each third of the budget."""
    return StepLR(optimizer, step_size=-(-horizon.steps // STEP_PARTS), gamma=FINAL_SHARE ** (1 / (STEP_PARTS - 1)))


def one_cycle(optimizer: Optimizer, horizon: Horizon) -> LRScheduler:
    """Warm up over 30 % of the budget, then anneal to nearly zero.

    Momentum stays fixed, so that the schedule means the same for optimizers without momentum.
    """
    return OneCycleLR(optimizer, max_lr=horizon.peak_learning_rate, total_steps=horizon.steps + 1, cycle_momentum=False)


SCHEDULES: dict[str, Callable[[Optimizer, Horizon], Any]] = {
    "constant": lambda optimizer, horizon: ConstantLR(optimizer, factor=1.0, total_iters=0),
    "step": step,
    "cosine": lambda optimizer, horizon: CosineAnnealingLR(optimizer, T_max=horizon.steps),
    "one_cycle": one_cycle,
    "exponential": lambda optimizer, horizon: ExponentialLR(optimizer, gamma=FINAL_SHARE ** (1 / horizon.steps)),
    "plateau": lambda optimizer, horizon: ReduceLROnPlateau(
        optimizer, factor=0.3, patience=max(1, horizon.epochs // 10)
    ),
}
"""Name -> factory. `plateau` updates the rate once per epoch, by the validation loss; all others once per step.

References:
    step: He et al. 2016, https://arxiv.org/abs/1512.03385 (section 3.4)
    cosine: Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983
    one_cycle: Smith & Topin 2018, https://arxiv.org/abs/1708.07120
    exponential: Li & Arora 2020, https://arxiv.org/abs/1910.07454
    plateau: torch.optim.lr_scheduler.ReduceLROnPlateau; Goodfellow et al. 2016, https://www.deeplearningbook.org, ch. 8
"""


class Schedule:
    """A schedule that updates the rate after each step or after each epoch, as its kind requires.

    Args:
        name: A name in `SCHEDULES`.
        optimizer: The optimizer whose learning rate it sets.
        horizon: Budget and peak rate.
    """

    def __init__(self, name: str, optimizer: Optimizer, horizon: Horizon):
        self._optimizer = optimizer
        self._scheduler = SCHEDULES[name](optimizer, horizon)
        self._by_loss = isinstance(self._scheduler, ReduceLROnPlateau)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Update the rate after a training step."""
        if not self._by_loss:
            self._scheduler.step()

    def after_epoch(self, val_loss: float) -> None:
        """Update the rate after an epoch with this validation loss."""
        if self._by_loss:
            self._scheduler.step(val_loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, for `load_state_dict`."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of another schedule of the same name and horizon."""
        self._scheduler.load_state_dict(state)
