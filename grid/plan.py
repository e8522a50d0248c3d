"""From a request to the trials that it means."""

from dataclasses import dataclass

from grid.config import TrialConfig
from grid.hardware import numeric_settings
from grid.optimizers import OPTIMIZERS
from grid.request import Request
from grid.space import ORDER_SEED, Cell, cross, draw_controls, expand


@dataclass(frozen=True)
class Plan:
    """What is to be trained."""

    cells: list[Cell]
    excluded: dict[str, int]
    """Reason -> cells that it took out."""
    trials: list[TrialConfig]
    """In the order in which they start."""
    controls: frozenset[str]
    """Keys of the trials that are never stopped."""


def make_plan(request: Request, *, device: str, fingerprint: str) -> Plan:
    """Expand a request into trials.

    Args:
        request: What was asked for.
        device: Kind of device that trains: `cpu` or `cuda`.
        fingerprint: Of the data.

    Raises:
        InputError: No cell is left.
    """
    cells, excluded = cross(request.levels)
    shared = {
        **numeric_settings(device, request.precision),
        "epochs": str(request.epochs),
        "data": request.data,
        "data_fingerprint": fingerprint,
    }

    def configure(cell: Cell, seed: int, lr_scale: float) -> TrialConfig:
        rate = OPTIMIZERS[cell["optimizer"]].base_learning_rate * lr_scale
        varying = {"seed": str(seed), "lr_scale": repr(lr_scale), "learning_rate": repr(rate)}
        return TrialConfig.from_params({**shared, **cell, **varying})

    trials = expand(cells, seeds=request.seeds, lr_scales=request.lr_scales, order_seed=ORDER_SEED, configure=configure)
    return Plan(cells, excluded, trials, draw_controls(trials, request.controls, ORDER_SEED))
