"""From a request to its trials, and whether they can be compared with those in the store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from grid.config import InputError, TrialConfig
from grid.parts.registry import ADDED
from grid.plan.asha import DEFAULT_RULE, StoppingRule
from grid.plan.controls import draw_controls
from grid.plan.packing import Packing
from grid.plan.request import Request
from grid.plan.space import ORDER_SEED, Cell, cross, expand, shared_settings
from grid.train.hardware import numeric_settings
from grid.train.techniques.optimizers import base_learning_rate

MEANINGS = {
    "data_fingerprint": "other images or another split",
    "numerics_version": "code that yields other numbers",
}
"""Setting -> what it means that two values differ, if the name of the setting does not say so."""


@dataclass(frozen=True)
class Plan:
    """The trials to train."""

    cells: list[Cell]
    excluded: dict[str, int]
    """Reason -> number of cells that it removed."""
    trials: list[TrialConfig]
    """In the order in which they start."""
    controls: frozenset[str]
    """Keys of the unstopped controls, the trials that are exempt from stopping."""
    control_chance: float | None = None
    """With which a trial that begins now was drawn to be one; None if it was not by chance."""
    rounds_before: int = 0
    """Rounds of `--more-controls` that were drawn before a trial that begins now; they could not draw it."""
    rule: StoppingRule = DEFAULT_RULE
    """Which of the other trials are stopped."""


def make_plan(
    request: Request,
    *,
    packing: Packing,
    fingerprint: str,
    train_images: int,
    begun: Mapping[str, bool] | None = None,
) -> Plan:
    """Expand a request into trials.

    Args:
        request: The user's request.
        packing: The machines that train.
        fingerprint: Fingerprint of the data.
        train_images: How many there are.
        begun: Keys of the trials that began in an earlier run, and whether they are controls.

    Raises:
        InputError: No cell is left.
    """
    cells, excluded = cross(request.levels)
    configure = _configuration(request, packing, fingerprint)
    trials = expand(
        cells,
        seeds=request.seeds,
        lr_scales=request.lr_scales,
        order_seed=ORDER_SEED,
        configure=configure,
        first=request.first,
    )
    controls = draw_controls(trials, request.controls, ORDER_SEED, begun)
    steps = min(max(1, train_images // trial.batch_size) for trial in trials)
    rule = request.rule.for_steps(request.epochs, steps)
    return Plan(cells, excluded, trials, controls.keys, controls.chance, rule=rule)


def first_and_last_of_each_model(request: Request, packing: Packing) -> list[TrialConfig]:
    """Return the trials of the first and the last cell of each net that a request names."""
    configure = _configuration(request, packing, fingerprint="")
    cells = cross(request.levels)[0]
    lasts = {cell["model"]: cell for cell in cells}
    firsts = {cell["model"]: cell for cell in reversed(cells)}
    return [configure(cell, 0, 1.0) for model in firsts for cell in (firsts[model], lasts[model])]


def _configuration(request: Request, packing: Packing, fingerprint: str) -> Callable[[Cell, int, float], TrialConfig]:
    """Return what makes a trial of a cell, a seed and a learning-rate scale."""
    shared = {
        **numeric_settings(packing.device, request.precision, packing.bfloat16),
        **request.settings,
        "epochs": str(request.epochs),
        "data": request.data,
        "data_fingerprint": fingerprint,
    }

    def configure(cell: Cell, seed: int, lr_scale: float) -> TrialConfig:
        rate = base_learning_rate(cell) * lr_scale
        varying = {"seed": str(seed), "lr_scale": repr(lr_scale), "learning_rate": repr(rate)}
        return TrialConfig.from_params({**shared, **cell, **varying})

    return configure


def check_comparable(planned: Sequence[TrialConfig], recorded: Sequence[TrialConfig], experiment: str) -> None:
    """Refuse trials that can't be compared with those of an experiment.

    Args:
        planned: Trials of the plan.
        recorded: Trials that the experiment holds.
        experiment: Its name.

    Raises:
        InputError: They differ in a setting that all trials of an experiment must share.
    """
    if not recorded:
        return
    before, now = _shared_settings(recorded), _shared_settings(planned)
    differences = [
        f"{MEANINGS.get(name, name)} ({before[name]}, now {value})"
        for name, value in now.items()
        if name in before and before[name] != value and ADDED.get(name) != "factor"  # it may be added later
    ]
    if differences:
        raise InputError(
            f"experiment '{experiment}' was trained with other settings: {'; '.join(differences)}; "
            "ask for the same, or pick another --experiment"
        )


def _shared_settings(trials: Sequence[TrialConfig]) -> dict[str, str]:
    rates = {f"base rate of {trial.optimizer}": f"{trial.learning_rate / trial.lr_scale:.6g}" for trial in trials}
    return {**shared_settings(trials), **rates}
