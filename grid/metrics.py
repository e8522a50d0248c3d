"""What a trial reports after each epoch, how it ends, and the names under which MLflow stores both.

Standard library only. A metric is one field of `EpochReport`; its value comes from `grid.train.trial.Trial.run_epoch`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch yielded. Every field of type `float` is a metric; NaN means that there is no value."""

    epoch: int
    """From 1."""
    diverged: bool = False
    """Whether a loss was not finite; no epoch follows."""
    train_loss: float = math.nan
    """Mean cross-entropy in nats over the epoch's training batches, without penalties."""
    train_accuracy: float = math.nan
    """Share of training images classified correctly during training (dropout on), in [0, 1]; NaN if diverged."""
    val_loss: float = math.nan
    """Mean cross-entropy in nats on the validation images; NaN if diverged."""
    val_accuracy: float = math.nan
    """Share of validation images classified correctly, in [0, 1]; NaN if diverged."""
    val_balanced_accuracy: float = math.nan
    """Mean over the classes of the share of their validation images that are classified correctly, in [0, 1]; NaN if
    diverged, and where all classes have as many validation images, as it is `val_accuracy` there."""
    learning_rate: float = math.nan
    """Learning rate of the epoch's last step."""
    epoch_seconds: float = math.nan
    """Wall time of training and validation."""
    samples_per_second: float = math.nan
    """Training images per second of training time, validation excluded."""
    val_correct: bytes = b""
    """After the full budget: which validation images were classified correctly, 8 in a byte, the first in its highest
    bit; empty before."""

    machine: Mapping[str, str] = field(default_factory=dict)
    """What it was trained on: tags of a run, by name."""

    @property
    def metrics(self) -> dict[str, float]:
        """The finite values by their names in `EPOCH_METRICS`."""
        values = {name: getattr(self, name) for name in EPOCH_METRICS}
        return {name: value for name, value in values.items() if math.isfinite(value)}


EPOCH_METRICS = tuple(field.name for field in fields(EpochReport) if field.type is float)
"""What every trial reports after every epoch: names of MLflow metrics, whose step is the epoch."""

RUNG_METRIC = "val_accuracy_at_"
"""Followed by the epoch of a rung: the metric that holds the accuracy there, without history."""

FINAL_METRIC = "final_val_accuracy"
"""Validation accuracy of the weights at the end of the full budget, without history: what is ranked."""

AS_VALIDATED_METRIC = "test_accuracy_as_validated"
"""Test accuracy with each class weighted by its share of the validation images: what stands beside validation
accuracies."""

TEST_METRICS = (
    *("test_accuracy", AS_VALIDATED_METRIC, "test_balanced_accuracy", "test_loss", "test_images"),
    *("parameters", "inference_ms_per_image"),
)
"""Metrics that only runs of `kind=confirm` have, once they are tested."""

FEWEST_PAIRS_LEFT = 5
"""Trials that two experiments must have in common beyond one for each level, to be compared."""

STATUSES = ("completed", "stopped", "diverged", "failed")
"""How a trial ends: full budget, stopped by ASHA, loss not finite, error."""

FINAL_STATUSES = ("completed", "stopped", "diverged")
"""Statuses of trials that are not run again."""


def recorded_rungs(names: Iterable[str]) -> list[int]:
    """Return the epochs of the rung metrics among the names, rising."""
    suffixes = (name.removeprefix(RUNG_METRIC) for name in names if name.startswith(RUNG_METRIC))
    return sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())
