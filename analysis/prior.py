"""Finds an earlier grid in the store, from which a dry run can tell how well the effects of a new one will be known."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from analysis.estimates.final_effects import measure_spread, with_verdicts
from analysis.store import read_experiment, read_manifests
from grid.config import InputError

MOST = 20
"""Experiments of the store that are looked at, the latest first."""


@dataclass(frozen=True)
class Prior:
    """How much the ends of training vary in an earlier grid; standard deviations of an accuracy, as fractions."""

    experiment: str
    around_levels: float
    around_forecast: float
    """See `analysis.estimates.final_effects.measure_spread`."""


def find_prior(store: str, *, data: str, per_class: int | None, epochs: int, models: set[str]) -> Prior | None:
    """Return what the latest grid shows of the same data, budget and models; None if no such grid has ended.

    Args:
        store: MLflow tracking URI.
        data: Name of the data set.
        per_class: Training images per class; None for all.
        epochs: Full budget.
        models: All that will be trained; an earlier grid may have others as well.
    """
    try:
        alike = [name for name, manifest in read_manifests(store, MOST) if _is_alike(manifest, data, per_class, epochs)]
    except InputError:  # nothing is stored yet
        return None
    for name in alike:
        try:
            experiment = read_experiment(store, name)
            trials = with_verdicts(experiment)
            trials = trials[trials["model"].isin(models) & (trials["epochs"] == epochs)]
            if set(trials["model"]) != models:
                continue
            spread = measure_spread(trials)
        except InputError:  # it has too few ends
            continue
        if all(map(isfinite, spread)):
            return Prior(name, *spread)
    return None


def _is_alike(manifest: Mapping[str, Any], data: str, per_class: int | None, epochs: int) -> bool:
    described, settings = manifest.get("data"), manifest.get("settings")
    if not isinstance(described, Mapping) or not isinstance(settings, Mapping):
        return False
    return (described.get("name"), described.get("per_class"), settings.get("epochs")) == (data, per_class, str(epochs))
