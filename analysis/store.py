"""The only MLflow reader: one experiment becomes one table with a row per trial.

Relies on the factor params, `seed`, `lr_scale`, `epochs`, the tags and metrics of `grid.record`, and on nothing else:
a store that another program wrote by this contract reads as well.
"""

import logging
import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow.exceptions
import pandas as pd
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from grid.config import FACTORS, STATUSES, InputError, first_line
from grid.store_uri import mask

PAGE_SIZE = 5000


def read_trials(uri: str, experiment: str) -> pd.DataFrame:
    """Read the trials of an experiment that have ended.

    Returns:
        A row per trial, with the factors, `seed` (int), `lr_scale` (float), `epochs` (int, the full budget), `status`,
        `control` (bool), `epochs_run` (int), `best_val_accuracy` (float, NaN if the first epoch diverged), one
        `val_accuracy_at_<epoch>` (float) per rung, and `trial_key`, `cell_key`, `run_id`.

    Raises:
        InputError: The store does not answer, or has no such experiment or no trial in it that has ended.
    """
    runs = _search(uri, experiment)
    if runs.empty:
        raise InputError(f"experiment '{experiment}' in {uri} has no trial yet; run python -m grid.run first")
    columns = {f"params.{name}": name for name in (*FACTORS, "seed", "lr_scale", "epochs")}
    columns |= {f"tags.{name}": name for name in ("trial_key", "cell_key", "status", "control")}
    columns |= {name: name.removeprefix("metrics.") for name in _metric_columns(runs)}
    trials = runs.rename(columns=columns)[["run_id", *columns.values()]]
    trials = trials[trials["status"].isin(STATUSES)].reset_index(drop=True)
    if trials.empty:
        raise InputError(f"no trial of experiment '{experiment}' in {uri} has ended yet; wait for one")
    return trials.assign(control=trials["control"] == "true").astype(
        {"seed": int, "lr_scale": float, "epochs": int, "epochs_run": int}
    )


def _metric_columns(runs: pd.DataFrame) -> list[str]:
    rungs = [name for name in runs.columns if name.startswith("metrics.val_accuracy_at_")]
    return [
        "metrics.epochs_run",
        "metrics.best_val_accuracy",
        *sorted(rungs, key=lambda name: int(name.split("_")[-1])),
    ]


def _search(uri: str, experiment: str) -> pd.DataFrame:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            names = sorted(other.name for other in client.search_experiments())
            raise InputError(f"no experiment '{experiment}' in {uri}; it has {', '.join(names)}")
        rows, token = [], None
        while token != "":
            page = client.search_runs(
                [found.experiment_id], "tags.kind = 'trial'", max_results=PAGE_SIZE, page_token=token
            )
            rows += [_row(run.info.run_id, run.data) for run in page]
            token = page.token or ""
    except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise InputError(f"can't read the store {mask(uri)}: {first_line(error)}; pass another --store") from error
    return pd.DataFrame(rows)


def _row(run_id: str, data: object) -> dict[str, object]:
    missing = {"tags.status": "", "metrics.epochs_run": 0.0, "metrics.best_val_accuracy": float("nan")}
    row: dict[str, object] = {"run_id": run_id, **missing}
    for kind in ("params", "tags", "metrics"):
        row |= {f"{kind}.{name}": value for name, value in getattr(data, kind).items()}
    return row
