"""From a request to the trials that it means, and whether they can be compared with those that the store has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grid.config import InputError, TrialConfig
from grid.plan.packing import Packing
from grid.plan.request import Request
from grid.plan.space import ORDER_SEED, Cell, cross, draw_controls, expand, settings_of
from grid.train.hardware import numeric_settings
from grid.train.optimizers import OPTIMIZERS

MEANINGS = {
    "data_fingerprint": "other images or another split",
    "numerics_version": "code that yields other numbers",
}
"""What differs, where the name of a setting does not tell."""


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


def make_plan(request: Request, *, packing: Packing, fingerprint: str, begun: Mapping[str, bool] | None = None) -> Plan:
    """Expand a request into trials.

    Args:
        request: What was asked for.
        packing: Where it is trained.
        fingerprint: Of the data.
        begun: Keys of the trials that have begun in an earlier run, and whether they are controls.

    Raises:
        InputError: No cell is left.
    """
    cells, excluded = cross(request.levels)
    shared = {
        **numeric_settings(packing.device, request.precision, packing.bfloat16),
        "epochs": str(request.epochs),
        "data": request.data,
        "data_fingerprint": fingerprint,
    }

    def configure(cell: Cell, seed: int, lr_scale: float) -> TrialConfig:
        rate = OPTIMIZERS[cell["optimizer"]].base_learning_rate * lr_scale
        varying = {"seed": str(seed), "lr_scale": repr(lr_scale), "learning_rate": repr(rate)}
        return TrialConfig.from_params({**shared, **cell, **varying})

    trials = expand(cells, seeds=request.seeds, lr_scales=request.lr_scales, order_seed=ORDER_SEED, configure=configure)
    return Plan(cells, excluded, trials, draw_controls(trials, request.controls, ORDER_SEED, begun))


def check_comparable(planned: Sequence[TrialConfig], recorded: Sequence[TrialConfig], experiment: str) -> None:
    """Refuse to put trials into an experiment whose trials were trained otherwise.

    Args:
        planned: Trials of the plan.
        recorded: Trials that the experiment holds.
        experiment: Its name.

    Raises:
        InputError: They differ in what all trials of an experiment must have in common.
    """
    if not recorded:
        return
    had, asked = _in_common(recorded), _in_common(planned)
    differences = [
        f"{MEANINGS.get(name, name)} ({had[name]}, now {value})"
        for name, value in asked.items()
        if name in had and had[name] != value
    ]
    if differences:
        raise InputError(
            f"experiment '{experiment}' was trained with other settings: {'; '.join(differences)}; "
            "ask for the same, or pick another --experiment"
        )


def _in_common(trials: Sequence[TrialConfig]) -> dict[str, str]:
    rates = {f"base rate of {trial.optimizer}": f"{trial.learning_rate / trial.lr_scale:.6g}" for trial in trials}
    return {**settings_of(trials[0]), **rates}
