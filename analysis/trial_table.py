"""The table of an experiment's trials, a row for each, and what is to be said of those that it lacks.

Knows the contract in docs/store.md, but not MLflow: runs are what its client returns.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf, nan, prod
from typing import Any

import pandas as pd

from grid.config import idle_settings, know_alike, varied
from grid.metrics import AS_VALIDATED_METRIC, FINAL_METRIC, RUNG_METRIC, TEST_METRICS, recorded_rungs
from grid.recorded import (
    ROUNDS,
    TWIN,
    RecordedTrial,
    Round,
    UnreadableError,
    describe_unreadable,
    drop_twins,
    read_trial,
)
from grid.wording import count

Rounds = Sequence[Round]
COLUMNS = {
    "run_id": "str",
    "trial_key": "str",
    "cell_key": "str",
    "seed": "int64",
    "lr_scale": "float64",
    "epochs": "int64",
    "status": "str",
    "control": "bool",
    "control_chance": "float64",
    "stopped_at_epoch": "float64",
    "stop_epoch": "float64",
    "epochs_run": "int64",
    "final_val_accuracy": "float64",
    "best_val_accuracy": "float64",
    "val_balanced_accuracy": "float64",
    "epoch_seconds": "float64",
    "val_correct": "str",
    "command": "str",
    "resumed_by": "str",
    "before_unfinished": "bool",
}
"""Columns of every table of trials beside the factors, with their types; NaN marks a missing value.

`control`: whether the trial is an unstopped control; `control_chance`: the chance with which it was drawn to be one, or
not, in all draws together; `stop_epoch`: the rung at which ASHA stopped it or, if it is a control, would have;
`final_val_accuracy`: of the weights at the end of the full budget, completed trials only; `val_balanced_accuracy`: the
same as a mean over classes, where they differ in size; `val_correct`: base64 of `EpochReport.val_correct`; `command`:
the one that started it; `resumed_by`: those that trained on, joined by commas; `before_unfinished`: whether it started
before each trial that has not ended.
"""


def tabulate(
    runs: Iterable[Any], noun: str, rounds: Rounds | None, factors: Sequence[str] | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs that have ended and are readable as a table, and a sentence on each kind of the others.

    Args:
        runs: Of one kind, with all that the store says of them.
        noun: What they are: `trial`, `finalist` or `refit`.
        rounds: Of controls that were drawn later; None if they are unknown.
        factors: Of the grid; None for those of every grid, and the settings that differ between these runs.

    Returns:
        `COLUMNS`, the factors in front of the seed (empty where a setting does not matter), and
        `val_accuracy_at_<epoch>` for each rung; of finalists also `TEST_METRICS`.
    """
    runs = list(runs)
    read, unreadable = _read(runs)
    started = {run.info.run_id: run.info.start_time for run in runs}
    first_unfinished = min((started[trial.run_id] for trial in read if not trial.status), default=inf)
    ended = [trial for trial in read if trial.status]
    counting, twins = drop_twins(ended)
    configs = know_alike([trial.config for trial in counting.values()])
    counting = {
        key: replace(trial, config=config) for (key, trial), config in zip(counting.items(), configs, strict=True)
    }
    rungs = [f"{RUNG_METRIC}{epoch}" for epoch in recorded_rungs({name for each in ended for name in each.metrics})]
    extra = rungs if noun == "trial" else [*rungs, *TEST_METRICS]
    rows = [
        {**_row(trial, rounds), "before_unfinished": started[trial.run_id] < first_unfinished}
        for _, trial in sorted(counting.items())
    ]
    factors = varied([trial.config for trial in counting.values()]) if factors is None else factors
    names = list(COLUMNS)
    names[names.index("seed") : names.index("seed")] = factors
    types = COLUMNS | dict.fromkeys(factors, "str") | dict.fromkeys(extra, "float64")
    table = pd.DataFrame(rows, columns=[*names, *extra]).astype(types)
    table, strays = _drop_strays(table)
    left_out = {"not ended yet": len(read) - len(ended), TWIN: len(twins)}
    notes = [f"{count(number, noun)} left out: {why}" for why, number in left_out.items() if number]
    return table, notes + describe_unreadable(unreadable, noun) + strays


def lost_finalists(finalists: pd.DataFrame, noun: str) -> list[str]:
    """Return notes on trainings of finalists, or refits, that have no accuracy; no table of cells shows them."""
    trainings = finalists["status"].value_counts()
    cells = finalists.groupby("status")["cell_key"].nunique()
    return [
        f"{count(int(trainings[status]), 'training')} of {count(int(cells[status]), noun)} {status}: "
        "their means are over the remaining seeds"
        for status in ("diverged", "failed")
        if status in trainings
    ]


def unfinished_rounds(rounds: Rounds | None, trials: pd.DataFrame) -> list[str]:
    """Return a note on controls that were drawn and have not been trained to the end."""
    if rounds is None:
        return [f"{ROUNDS} is damaged, so the chances of controls are unknown"]
    drawn = {key for each in rounds for key in each.drawn}
    left = int(trials.loc[trials["status"] == "stopped", "trial_key"].isin(drawn).sum())
    note = f"{count(left, 'control')} of --more-controls not trained to the end yet: run grid.run again"
    return [note] if left else []


def not_started(manifest: Mapping[str, Any], trials: int) -> list[str]:
    """Return a note on the trials of the plan that have not started, and what follows from their order.

    Args:
        manifest: `grid.json`, as far as it can be read.
        trials: That have started.
    """
    planned, first = manifest.get("trials"), manifest.get("first")
    if type(planned) is not int or planned <= trials:
        return []
    left = f"{planned - trials:,} of {count(planned, 'trial')} not started yet"
    if not isinstance(first, list) or not first:
        return [f"{left}: their order is random, so those that have started are a random sample"]
    names = " and ".join(_name_levels(each) for each in first if isinstance(each, Mapping))
    return [
        f"{left}, as cells with {names} come first; until all have ended, effects rest on three or more factors not "
        "acting together"
    ]


def _name_levels(levels: Mapping[str, Any]) -> str:
    return ", ".join(f"{factor}={'/'.join(map(str, names))}" for factor, names in levels.items())


def unknown_chances(trials: pd.DataFrame) -> list[str]:
    """Return a note on chances of being a control that some trials have and others lack; see `Sample.seen_chances`."""
    probed = trials.loc[trials["stop_epoch"].notna(), "control_chance"]
    unknown = int(probed.isna().sum())
    if not unknown or trials["control_chance"].isna().all():
        return []
    return [f"{count(unknown, 'trial')} without a known chance of being a control: all chances count as equal"]


def _drop_strays(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Drop the accuracies at epochs that are no rung, as most trials that trained so long have none there."""
    strays = []
    for epoch in recorded_rungs(table.columns):
        known = table[f"{RUNG_METRIC}{epoch}"].notna()
        reached = (table["epochs_run"] >= epoch) & table["status"].isin(["completed", "stopped"])
        if 2 * known.sum() < reached.sum():
            strays.append((f"{RUNG_METRIC}{epoch}", int(known.sum())))
    notes = [f"metric {name} of {count(number, 'trial')} ignored: it is not a rung" for name, number in strays]
    return table.drop(columns=[name for name, _ in strays]), notes


def _read(runs: Iterable[Any]) -> tuple[list[RecordedTrial], Mapping[str, list[str]]]:
    """Return the runs that are trials, and why the others are not -> their ids."""
    read, unreadable = [], defaultdict(list)
    for run in runs:
        try:
            read.append(read_trial(run.info.run_id, run.data.tags, run.data.params, run.data.metrics))
        except UnreadableError as reason:
            unreadable[str(reason)].append(run.info.run_id)
    return read, unreadable


def _row(trial: RecordedTrial, rounds: Rounds | None) -> dict[str, Any]:
    config, metrics, stop_epoch = trial.config, trial.metrics, trial.stop_epoch
    recorded = {*TEST_METRICS, *(f"{RUNG_METRIC}{epoch}" for epoch in recorded_rungs(metrics))}
    return {
        "run_id": trial.run_id,
        "trial_key": trial.trial_key,
        "cell_key": config.cell_key,
        **config.cell,
        **dict.fromkeys(idle_settings(config.cell), ""),
        "seed": config.seed,
        "lr_scale": config.lr_scale,
        "epochs": config.epochs,
        "status": trial.status,
        "control": trial.control,
        "control_chance": _combine_chances(trial, rounds),
        "stopped_at_epoch": nan if trial.stopped_at is None else float(trial.stopped_at),
        "stop_epoch": nan if stop_epoch is None else float(stop_epoch),
        "epochs_run": trial.epochs_run,
        "final_val_accuracy": _final(trial.status, metrics),
        "best_val_accuracy": metrics.get("best_val_accuracy", nan),
        "val_balanced_accuracy": metrics.get("val_balanced_accuracy", nan) if trial.status == "completed" else nan,
        "epoch_seconds": metrics.get("epoch_seconds", nan),
        "val_correct": trial.tags.get("val_correct", ""),
        "command": trial.tags.get("command", ""),
        "resumed_by": trial.tags.get("resumed_by", ""),
        AS_VALIDATED_METRIC: metrics.get("test_accuracy", nan),
        **{name: value for name, value in metrics.items() if name in recorded},
    }


def _final(status: str, metrics: Mapping[str, float]) -> float:
    """Return the accuracy at the end of the budget: in older stores the last value, which MLflow keeps."""
    return metrics.get(FINAL_METRIC, metrics.get("val_accuracy", nan)) if status == "completed" else nan


def _combine_chances(trial: RecordedTrial, rounds: Rounds | None) -> float:
    """Return the chance that a trial is a control in the end; one that ASHA stops has a chance in each later round."""
    own, before = trial.control_chance, trial.rounds_before
    if own is None or trial.stop_epoch is None:
        return nan if own is None else own
    drawn_later = trial.stopped_at is not None and trial.would_stop_at is not None
    if rounds is None or before > len(rounds):
        return nan
    if drawn_later and not any(trial.trial_key in each.drawn for each in rounds):
        return nan
    return 1 - (1 - own) * prod(1 - len(each.drawn) / each.among for each in rounds[before:])
