"""Trials of made-up accuracies, for tests of what early stopping cost."""

import math

import numpy as np
import pandas as pd

from analysis.stopping.figures import Audit, audit_stopping
from grid.config import FACTORS
from grid.parts import LEVELS

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}
NAN = math.nan


def trial(at_1: float, at_3: float = NAN, final: float = NAN, status: str = "", **changes: object) -> dict[str, object]:
    """Return a trial with a budget of 9; its status and epochs follow from the accuracies unless given."""
    epochs_run = 1 if math.isnan(at_3) else 3 if math.isnan(final) else 9
    accuracies = {"final_val_accuracy": final, "best_val_accuracy": np.fmax(np.fmax(at_1, at_3), final)}
    row = {**CELL, "seed": 0, "lr_scale": 1.0, "epochs": 9, "control": False, **accuracies}
    row |= {"status": status or ("completed" if epochs_run == 9 else "stopped"), "epochs_run": epochs_run}
    return row | {"val_accuracy_at_1": at_1, "val_accuracy_at_3": at_3} | changes


def control(*accuracies: float, status: str = "", **changes: object) -> dict[str, object]:
    return trial(*accuracies, status=status, control=True, **changes)


def recorded(row: dict[str, object], stop_epoch: float = NAN) -> dict[str, object]:
    """Return a trial as a store has it that records ASHA's verdicts."""
    return row | {"control_chance": 0.1, "stop_epoch": stop_epoch}


def audit(*rows: dict[str, object], **rule: object) -> Audit:
    return audit_stopping(pd.DataFrame(rows), **rule)  # type: ignore[arg-type]


def only(table: pd.DataFrame) -> dict[str, object]:
    (row,) = table.to_dict("records")
    return {str(name): value for name, value in row.items()}


def slow_start(rate: float = 0.0, trials: int = 60, other_rate: float = 0.5) -> pd.DataFrame:
    """Return trials of two schedules, of which these shares continue at epoch 1."""
    rates = {"one_cycle": rate, "cosine": other_rate}
    return pd.DataFrame(
        [
            trial(0.5, *(() if number >= round(share * trials) else (0.6, 0.7)), lr_schedule=schedule)
            for schedule, share in rates.items()
            for number in range(trials)
        ]
    )


# Nine trials, three of which continue at epoch 1 and, together with two controls there, two at epoch 3.
STOPPED = [trial(at) for at in (0.10, 0.11, 0.12, 0.13)]
CONTINUED = [trial(0.50, 0.60, 0.70), trial(0.51, 0.61, 0.72), trial(0.49, 0.55)]
LATE, POOR = control(0.20, 0.40, 0.71), control(0.09, 0.10, 0.11)
GRID = [*STOPPED, *CONTINUED, LATE, POOR]
