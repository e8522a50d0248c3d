"""A metric's values epoch by epoch, which are kept: MLflow returns them slowly."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.store import Experiment, answering
from grid.recorded import first_values
from grid.store_client import waiting_for
from grid.store_uri import slug

HISTORY_THREADS = 4


def read_curves(experiment: Experiment, run_ids: Iterable[str], metric: str = "val_accuracy") -> pd.DataFrame:
    """Return a metric's values epoch by epoch.

    MLflow returns the history of one run at a time, which is slow, so histories are cached as parquet in the user's
    cache folder; a run is read again only after it has trained further.

    Args:
        experiment: From `read_experiment`.
        run_ids: Of trials or finalists of the experiment.
        metric: One of `grid.metrics.EPOCH_METRICS`.

    Returns:
        `run_id`, `epoch` (from 1) and a column named after the metric, sorted by run and epoch.

    Raises:
        InputError: The store does not answer.
    """
    both = pd.concat([experiment.trials[["run_id", "epochs_run"]], experiment.finalists[["run_id", "epochs_run"]]])
    wanted = both[both["run_id"].isin(set(run_ids))].set_index("run_id")["epochs_run"]
    path = _cache_folder() / f"{slug(experiment.uri, experiment.name)}-{metric}.parquet"
    kept = _read_cache(path, metric)
    kept = kept[kept["run_id"].map(both.set_index("run_id")["epochs_run"]) == kept["epochs_run"]]
    missing = sorted(set(wanted.index) - set(kept["run_id"]))
    if missing:
        with answering(experiment.uri) as client, ThreadPoolExecutor(HISTORY_THREADS) as threads:
            answers = threads.map(lambda run_id: client.get_metric_history(run_id, metric), missing)
            histories = [_wait_for_next(answers, experiment.uri) for _ in missing]
        rows = [
            (run_id, int(wanted[run_id]), epoch, value)
            for run_id, history in zip(missing, histories, strict=True)
            for epoch, value in first_values(history).items()
            if 1 <= epoch <= wanted[run_id]
        ]
        kept = pd.concat([kept, pd.DataFrame(rows, columns=kept.columns).astype(kept.dtypes)], ignore_index=True)
        _write_cache(path, kept)
    chosen = kept[kept["run_id"].isin(wanted.index)]
    return chosen.sort_values(["run_id", "epoch"], ignore_index=True)[["run_id", "epoch", metric]]


def _wait_for_next(answers: Iterator[Any], uri: str) -> Any:
    with waiting_for(uri):
        return next(answers)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "factorial-grid"


def _read_cache(path: Path, metric: str) -> pd.DataFrame:
    types = {"run_id": "str", "epochs_run": "int64", "epoch": "int64", metric: "float64"}
    try:
        return pd.read_parquet(path)[list(types)].astype(types)
    except (OSError, KeyError, ValueError):  # pyarrow raises ValueError for a damaged file
        return pd.DataFrame(columns=list(types)).astype(types)


def _write_cache(path: Path, curves: pd.DataFrame) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # without a writable cache the answer is the same, only later
        path.parent.mkdir(parents=True, exist_ok=True)
        curves.to_parquet(unfinished, index=False)
        unfinished.replace(path)
