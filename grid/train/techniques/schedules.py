"""The built-in learning-rate schedules. All have the same peak rate and span the full budget."""

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

from grid.config import STEP_PARTS, TrialConfig
from grid.parts.registry import find


def constant(config: TrialConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Keep the rate."""
    return ConstantLR(optimizer, factor=1.0, total_iters=0)


def step(config: TrialConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Lower the rate after each third of the budget, by default to a tenth."""
    gamma = config.final_share ** (1 / (STEP_PARTS - 1))
    return StepLR(optimizer, step_size=-(-steps // STEP_PARTS), gamma=gamma)


def cosine(config: TrialConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Lower the rate to zero, slowly at both ends."""
    return CosineAnnealingLR(optimizer, T_max=steps)


def one_cycle(config: TrialConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Warm up over a part of the budget, then anneal to nearly zero.

    Momentum stays fixed, so that the schedule means the same for optimizers without momentum.
    """
    return OneCycleLR(
        optimizer,
        max_lr=config.learning_rate,
        total_steps=steps + 1,
        pct_start=config.warmup_share,
        cycle_momentum=False,
    )


def exponential(config: TrialConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Lower the rate by the same factor after each step."""
    return ExponentialLR(optimizer, gamma=config.final_share ** (1 / steps))


def plateau(config: TrialConfig, optimizer: Optimizer, steps: int) -> ReduceLROnPlateau:
    """Lower the rate whenever the validation loss has not fallen for a while."""
    patience = max(1, int(config.epochs * config.plateau_patience))
    return ReduceLROnPlateau(optimizer, factor=config.plateau_factor, patience=patience)


class Schedule:
    """A schedule that updates the rate after each step or after each epoch, as its kind requires.

    Args:
        config: Names it, its budget, its peak rate and its settings.
        optimizer: The optimizer whose learning rate it sets.
        steps: In the full budget.
    """

    def __init__(self, config: TrialConfig, optimizer: Optimizer, steps: int):
        self._optimizer = optimizer
        self._scheduler = find("lr_schedule", config.lr_schedule)(config, optimizer, steps)
        self._by_loss = isinstance(self._scheduler, ReduceLROnPlateau)
        if not self._by_loss and not isinstance(self._scheduler, LRScheduler):
            kind = type(self._scheduler).__name__
            raise TypeError(f"lr_schedule {config.lr_schedule} returned {kind}; return an LRScheduler of torch")

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
        """Resume from the state of another schedule of the same configuration."""
        self._scheduler.load_state_dict(state)
