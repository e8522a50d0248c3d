"""The cost of a grid before it runs: epochs under ASHA by simulation, seconds by a short calibration."""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import studentized_range

from grid.config import TrialConfig
from grid.data.dataset import DataShape
from grid.plan.asha import DEFAULT_RULE, Asha, StoppingRule
from grid.train.hardware import one_thread
from grid.train.trial import DeviceData, Trial, random_data

SIMULATIONS = 20
TIMES = (1, 2, 4)
"""Multiples of the number of controls for which the width of the effects is forecast."""
CALIBRATED_PER_MODEL = 4
"""Number of trials of each model to time."""
CALIBRATION_IMAGES = 1280

Calibration = tuple[dict[str, float], float]
"""Seconds per training image for each model, and the largest spread among them (standard deviation / mean)."""


@dataclass(frozen=True)
class EndSpread:
    """How much the ends of training vary; standard deviations of an accuracy, as fractions."""

    around_levels: float
    """Around what the levels and their pairs explain."""
    around_forecast: float
    """Around what the rungs predict of stopped trials."""
    source: str
    """Where these are from, to end a sentence with."""


ASSUMED = EndSpread(0.01, 0.01, "if ends vary by 1 point around their levels and around their forecast (assumed)")


@dataclass(frozen=True)
class Forecast:
    """Expected cost of a grid."""

    epochs: float
    """Expected epochs of all trials under ASHA."""
    full_epochs: int
    """Epochs if no trial were stopped."""
    seconds: float
    """Expected wall time."""
    spread: float
    """Standard deviation of the timed trials of a model, as a share of their mean."""


def expected_epochs(
    trials: Sequence[TrialConfig], controls: Collection[str], rule: StoppingRule = DEFAULT_RULE, seed: int = 0
) -> dict[str, float]:
    """Return the epochs that the trials of each model are expected to take under ASHA.

    The order of the trials is random and ASHA compares ranks only, so any distribution without ties gives the same
    expectation. Ranks are assumed not to change from rung to rung.

    Args:
        trials: In the order in which they start.
        controls: Keys of the unstopped controls, the trials that are exempt from stopping.
        rule: Which trials are stopped.
        seed: Seed of the simulation.
    """
    rng = random.Random(seed)  # noqa: S311  (a simulation)
    epochs: dict[str, float] = defaultdict(float)
    for _ in range(SIMULATIONS):
        asha = Asha.of(rule, trials[0].epochs)
        for trial in trials:
            epochs[trial.model] += _simulate(trial, asha, rng.random(), trial.trial_key in controls) / SIMULATIONS
    return dict(epochs)


def calibrate(trials: Sequence[TrialConfig], shape: DataShape) -> Calibration:
    """Time a few trials of each model on random pixels.

    Args:
        trials: The first few of each model are timed, their order being random.
        shape: Of the data that they train on.

    Returns:
        Seconds per training image for each model, and the largest spread among them (standard deviation / mean).
    """
    data = random_data(CALIBRATION_IMAGES, shape.image, shape.classes, trials[0].device)
    by_model: dict[str, list[float]] = defaultdict(list)
    with one_thread():
        for trial in trials:
            if len(by_model[trial.model]) < CALIBRATED_PER_MODEL:
                by_model[trial.model].append(_seconds_per_image(trial, data))
    spreads = [statistics.pstdev(times) / statistics.mean(times) for times in by_model.values()]
    return {model: statistics.mean(times) for model, times in by_model.items()}, max(spreads)


def forecast(
    trials: Sequence[TrialConfig],
    controls: Collection[str],
    rule: StoppingRule,
    *,
    seconds_per_image: Mapping[str, float],
    spread: float,
    train_images: int,
    slots: float,
) -> Forecast:
    """Return the expected cost of a grid.

    Args:
        trials: In the order in which they start.
        controls: Keys of the unstopped controls.
        rule: Which trials are stopped.
        seconds_per_image: By model, from `calibrate`.
        spread: From `calibrate`.
        train_images: Training images per epoch.
        slots: Trials that run at full speed at once: more trials than CPUs are no faster.
    """
    epochs = expected_epochs(trials, controls, rule)
    busy = sum(count * train_images * seconds_per_image[model] for model, count in epochs.items())
    return Forecast(
        epochs=sum(epochs.values()),
        full_epochs=sum(trial.epochs for trial in trials),
        seconds=busy / min(slots, len(trials)),
        spread=spread,
    )


@dataclass(frozen=True)
class Width:
    """How well effects at the end of training will be known with a number of controls."""

    controls: int
    half_width: float
    """Half the width of the 95% interval of a difference between two levels (Tukey's), as a fraction."""
    epochs: float
    """Expected epochs of all trials."""


def expected_widths(
    trials: Sequence[TrialConfig], controls: int, rule: StoppingRule, levels: int, spread: EndSpread = ASSUMED
) -> list[Width]:
    """Forecast how well the levels of a factor can be compared, for `TIMES` as many controls.

    Args:
        trials: In the order in which they start.
        controls: Number of unstopped controls, above 0.
        rule: Which trials are stopped.
        levels: Of the factor.
        spread: How much the ends vary.

    Reference: the variance of double sampling and Tukey's quantile, see `analysis.estimates.two_phase`.
    """
    stopped = 1 - rule.factor ** -len(rule.rungs(trials[0].epochs))
    widths = []
    for number in dict.fromkeys(min(times * controls, len(trials)) for times in TIMES):
        half_width = _half_width(number, len(trials), stopped, levels, spread)
        keys = {trial.trial_key for trial in trials[:number]}  # their order is random
        widths.append(Width(number, half_width, sum(expected_epochs(trials, keys, rule).values())))
    return widths


def _half_width(controls: int, trials: int, stopped: float, levels: int, spread: EndSpread) -> float:
    """Return half the width of the interval of a difference, of which one trial in `levels / 2` carries weight."""
    chance = controls / trials
    noise = spread.around_levels**2
    sampling = spread.around_forecast**2 * stopped * (1 - chance) / chance
    drawn, left = (max(number * 2 / levels - 1, 1) for number in (stopped * controls, trials))
    degrees = (noise + sampling) ** 2 / (noise**2 / left + sampling**2 / drawn)  # Satterthwaite
    quantile = float(studentized_range.ppf(0.95, levels, degrees)) / math.sqrt(2)
    return quantile * math.sqrt(2 * levels / trials * (noise + sampling))


def _simulate(trial: TrialConfig, asha: Asha, value: float, control: bool) -> int:
    for epoch in asha.rungs:
        group = asha.rule.group_of(trial.cell)
        if not asha.decide(trial.trial_key, group=group, epoch=epoch, value=value, control=control):
            return epoch
    return trial.epochs


def _seconds_per_image(config: TrialConfig, data: DeviceData) -> float:
    trial = Trial(config, data)
    trial.run_epoch()  # a warm-up: the first epoch allocates memory, and on a GPU compiles kernels
    return trial.run_epoch().epoch_seconds / CALIBRATION_IMAGES
