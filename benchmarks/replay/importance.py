"""How important each factor is at the end of training: by effects, and by what Optuna says of the completed trials.

Importance is a share of 1: by effects, of the mean squares of all main effects; fANOVA's is one of variance as well.
PED-ANOVA answers another question, what it takes to be among the best tenth, so each method is also compared with what
it says itself of the same grid if nothing is stopped.

References:
    fANOVA: Hutter, Hoos and Leyton-Brown 2014, https://proceedings.mlr.press/v32/hutter14.html
    PED-ANOVA: Watanabe, Bansal and Hutter 2023, https://arxiv.org/abs/2304.10255
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec

import pandas as pd
from scipy import stats

from benchmarks.replay.estimators import completed_only, ours
from grid.config import FACTORS

TRUTH = "truth"
NEEDED = ("optuna", "sklearn")
"""Packages that Optuna's methods need and this project does not."""
HINT = 'pip install -e ".[bench]"'


def of_effects(effects: pd.DataFrame) -> "pd.Series[float]":
    """Return the share of each factor in the mean squares of the main effects.

    Args:
        effects: `factor`, `other_factor` (empty for a main effect) and `effect`.
    """
    main = effects[effects["other_factor"] == ""]
    squares = (main["effect"] ** 2).groupby(main["factor"]).mean()
    return squares.reindex(_varied(main["factor"])) / squares.sum()


def _by_fanova(trials: pd.DataFrame) -> "pd.Series[float]":
    return _by_optuna(trials, "FanovaImportanceEvaluator", seed=0)


def _by_ped_anova(trials: pd.DataFrame) -> "pd.Series[float]":
    return _by_optuna(trials, "PedAnovaImportanceEvaluator")


METHODS: Mapping[str, Callable[[pd.DataFrame], "pd.Series[float]"]] = {
    "ours": lambda trials: of_effects(ours(trials)),
    "least squares": lambda trials: of_effects(completed_only(trials)),
    "fANOVA": _by_fanova,
    "PED-ANOVA": _by_ped_anova,
}
OF_OPTUNA = ("fANOVA", "PED-ANOVA")


def installed_methods() -> list[str]:
    """Return the methods that can be asked here."""
    return [name for name in METHODS if name not in OF_OPTUNA or not missing_packages()]


def missing_packages() -> list[str]:
    """Return the packages that Optuna's methods need and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def compare_importances(
    found: "pd.Series[float]", true: "pd.Series[float]", own: "pd.Series[float]"
) -> Iterator[tuple[str, float]]:
    """Yield how well a method orders the factors.

    Args:
        found: What it says of a grid that was stopped.
        true: By the effects in the same grid if nothing is stopped.
        own: What the method says of that grid.
    """
    yield "order", float(stats.spearmanr(found, true[found.index]).statistic)
    yield "own order", float(stats.spearmanr(found, own[found.index]).statistic)
    yield "first", float(found.idxmax() == true.idxmax())


def _varied(names: "pd.Series[str]") -> list[str]:
    return [factor for factor in FACTORS if factor in set(names)]


def _by_optuna(trials: pd.DataFrame, evaluator: str, **options: int) -> "pd.Series[float]":
    """Ask Optuna about the completed trials; it leaves stopped ones out as well."""
    optuna = import_module("optuna")  # not needed by anything else here
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    done = trials[trials["status"] == "completed"]
    varied = [factor for factor in FACTORS if done[factor].nunique() > 1]
    levels = {name: optuna.distributions.CategoricalDistribution(sorted(set(done[name]))) for name in varied}
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(params=params, distributions=levels, value=value)
            for params, value in zip(done[varied].to_dict("records"), done["final_val_accuracy"], strict=True)
        ]
    )
    method = getattr(optuna.importance, evaluator)(**options)
    shares = optuna.importance.get_param_importances(study, evaluator=method)
    return pd.Series({name: float(shares[name]) for name in varied})
