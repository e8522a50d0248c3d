"""The only reader of MLflow: an experiment becomes a table with a row per trial.

It relies on the contract in docs/store.md alone, so that it also reads a store that another program wrote by that
contract. Runs that can't be used are counted and reported.
"""

import atexit
import gc
import json
import logging
import os
import shutil
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from math import nan, prod
from pathlib import Path
from typing import Any

from grid.store_uri import (
    artifact_folder,
    check_store_uri,
    client_uri,
    experiment_names,
    find_experiment,
    missing_experiment,
    mlflow_settings,
    slug,
    sqlite_path,
    sqlite_tables,
    store_problem,
    waiting_for,
)

os.environ.update(mlflow_settings(writes=False))

import mlflow.db
import mlflow.exceptions
import pandas as pd
from alembic.util import CommandError
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from grid.config import FACTORS, InputError
from grid.masking import mask
from grid.metrics import AS_VALIDATED_METRIC, FINAL_METRIC, RUNG_METRIC, TEST_METRICS, rung_epochs
from grid.recorded import (
    PARENT_TAG,
    TWIN,
    RecordedTrial,
    Round,
    UnreadableError,
    describe_unreadable,
    first_values,
    parse_rounds,
    read_trial,
)
from grid.wording import count, first_line

ROUNDS = "more_controls.json"
Rounds = Sequence[Round]
LARGEST = 10**9
"""Number that a manifest may name; nothing that it counts is larger."""
PAGE_SIZE = 5000
SERVER_PAGE_SIZE = 1000
"""Of a server: it has a limited time for an answer."""
HISTORY_THREADS = 4
BUSY_SECONDS = 20.0
"""How long a locked sqlite file is waited for, as MLflow does."""
NEEDS_WRITING = ("readonly database", "unable to open database file", "out-of-date database schema")
"""In errors of a store that has to be recovered, or given the tables of this version of MLflow, before it is read."""
UNREACHABLE = (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError, ImportError)
COLUMNS = {
    "run_id": "str",
    "trial_key": "str",
    "cell_key": "str",
    **dict.fromkeys(FACTORS, "str"),
    "seed": "int64",
    "lr_scale": "float64",
    "epochs": "int64",
    "status": "str",
    "control": "bool",
    "control_chance": "float64",
    "drawn_later": "bool",
    "stopped_at_epoch": "float64",
    "stop_epoch": "float64",
    "epochs_run": "int64",
    "final_val_accuracy": "float64",
    "best_val_accuracy": "float64",
    "epoch_seconds": "float64",
    "val_correct": "str",
    "command": "str",
    "resumed_by": "str",
}
"""Columns of every table of trials, with their types; NaN marks a missing value.

`control`: whether the trial is an unstopped control; `control_chance`: the chance with which it was drawn to be one, or
not, in all draws together; `drawn_later`: whether a round of `--more-controls` drew it; `stop_epoch`: the rung at which
ASHA stopped it or, if it is a control, would have; `final_val_accuracy`: of the weights at the end of the full budget,
completed trials only; `val_correct`: base64 of `EpochReport.val_correct`; `command`: the one that started
it; `resumed_by`: those that trained on, joined by commas.
"""


@dataclass(frozen=True)
class Experiment:
    """One experiment, as read from the store."""

    uri: str
    name: str
    parent_id: str
    """The run with tag `kind=grid`; empty if there is none."""
    trials: pd.DataFrame
    """A row per ended trial: `COLUMNS` and `val_accuracy_at_<epoch>` (float) for each rung, in rising order."""
    finalists: pd.DataFrame
    """A row per ended training of a finalist: `COLUMNS` and `TEST_METRICS` (NaN before the test)."""
    manifest: Mapping[str, Any]
    """`grid.json`; empty if there is none."""
    notes: tuple[str, ...]
    """One sentence for each kind of run that the tables leave out."""

    def described(self, part: str) -> Mapping[str, Any]:
        """Return an object in the manifest; empty if it is missing or not an object."""
        found = self.manifest.get(part)
        return found if isinstance(found, Mapping) else {}

    @property
    def val_images(self) -> int | None:
        """Number of validation images; None if the store does not say."""
        return _whole(self.described("data").get("val_images"), at_least=1)

    @property
    def classes(self) -> int | None:
        """Number of classes of the data set; None if the store does not say."""
        names = self.described("data").get("classes")
        return len(names) if isinstance(names, list) and names else None

    @property
    def rung_factor(self) -> int | None:
        """One trial in this many continues at a rung, 1 for no stopping; None if the store does not say."""
        return _whole(self.described("rungs").get("factor"), at_least=1)

    @property
    def compared_within(self) -> tuple[str, ...] | None:
        """Factors whose levels trials share with those that ASHA compares them with; None if the store does not say."""
        text = self.described("rungs").get("compared_within")
        factors = tuple(filter(None, text.split(","))) if isinstance(text, str) else None
        return factors if factors is not None and set(factors) <= set(FACTORS) else None


def read_experiment(uri: str | None, name: str) -> Experiment:
    """Read an experiment with one (paged) search.

    Args:
        uri: MLflow tracking URI; None for the `default_store_uri`. It may be read-only: nothing is written to it.
        name: Of the experiment.

    Raises:
        InputError: The store does not answer or has no such experiment, or none of its trials has ended.
    """
    uri = check_store_uri(uri, read_only=True)
    with _answering(uri) as client:
        experiment_id = _find(client, uri, name)
        runs = list(_search(client, uri, experiment_id, ViewType.ACTIVE_ONLY))
        deleted = sum(1 for _ in _search(client, uri, experiment_id, ViewType.DELETED_ONLY))
    by_kind = _by_kind(runs)
    if not by_kind["trial"]:
        raise InputError(f"experiment '{name}' in {mask(uri)} has no trial yet; run python -m grid.run first")
    parent_id, notes = _choose_parent(by_kind["grid"], by_kind["trial"])
    manifest, problem = _parse_manifest(read_artifact(uri, parent_id, "grid.json") or b"{}")
    notes += [problem] if problem else []
    rounds = _parse_rounds(read_artifact(uri, parent_id, ROUNDS) or b"[]")
    trials, left_out = _tabulate(by_kind["trial"], "trial", rounds)
    if trials.empty:
        reasons = "; ".join(left_out)
        raise InputError(f"no trial of experiment '{name}' in {mask(uri)} has ended yet ({reasons}); wait for one")
    finalists, left_out_finalists = _tabulate(by_kind["confirm"], "finalist", ())
    foreign = len(by_kind[""])
    notes = [
        *left_out,
        *left_out_finalists,
        *_lost_finalists(finalists),
        *([f"{count(foreign, 'run')} left out: no tag kind=trial, kind=confirm or kind=grid"] if foreign else []),
        *([f"{count(deleted, 'run')} left out: deleted"] if deleted else []),
        *notes,
        *_unfinished_rounds(rounds, trials),
        *_unknown_chances(trials),
    ]
    return Experiment(uri, name, parent_id, trials, finalists, manifest, tuple(notes))


def read_manifests(uri: str | None, limit: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and manifests of a store's experiments, the latest first.

    Args:
        uri: As for `read_experiment`.
        limit: Experiments to look at, at most.

    Raises:
        InputError: The store does not answer.
    """
    uri = check_store_uri(uri, must_exist=True)
    with _answering(uri) as client:
        experiments = client.search_experiments(order_by=["creation_time DESC"], max_results=limit)
        for experiment in experiments:
            parents = client.search_runs([experiment.experiment_id], "tags.kind = 'grid'", max_results=1)
            content = read_artifact(uri, parents[0].info.run_id, "grid.json") if parents else None
            yield experiment.name, _parse_manifest(content or b"{}")[0]


def _by_kind(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of each kind; a run with a parent is no parent, and those of unknown kinds are under no name."""
    by_kind: dict[str, list[Run]] = {"grid": [], "trial": [], "confirm": [], "": []}
    for run in runs:
        tags = run.data.tags
        kind = tags.get("kind", "")
        is_known = kind in by_kind and not (kind == "grid" and PARENT_TAG in tags)
        by_kind[kind if is_known else ""].append(run)
    return by_kind


def _choose_parent(parents: Sequence[Run], trials: Iterable[Run]) -> tuple[str, list[str]]:
    """Return the id of the run of kind `grid` that most trials name, empty if there is none; and what is wrong."""
    named = Counter(run.data.tags.get(PARENT_TAG, "") for run in trials)
    ids = [run.info.run_id for run in sorted(parents, key=lambda run: run.info.start_time)]
    notes = [f"{len(ids)} runs of kind grid: the one that most trials name counts"] if len(ids) > 1 else []
    missing = [run_id for run_id in named if run_id and run_id not in ids]
    notes += [
        f"the run of kind grid that {count(named[run_id], 'trial')} name is missing, with grid.json and {ROUNDS}: "
        f"restore run {run_id} in MLflow"
        for run_id in missing
    ]
    return max(ids, key=lambda run_id: named[run_id], default=""), notes


def _lost_finalists(finalists: pd.DataFrame) -> list[str]:
    """Return notes on finalists' trainings that have no accuracy; no table of cells shows them."""
    trainings = finalists["status"].value_counts()
    cells = finalists.groupby("status")["cell_key"].nunique()
    return [
        f"{count(int(trainings[status]), 'training')} of {count(int(cells[status]), 'finalist')} {status}: "
        "their means are over the remaining seeds"
        for status in ("diverged", "failed")
        if status in trainings
    ]


def _parse_manifest(content: bytes) -> tuple[Mapping[str, Any], str]:
    """Return the manifest and the reason why it could not be read, if any."""
    try:
        manifest = json.loads(content)
        json.dumps(manifest, ensure_ascii=False).encode()  # else half a surrogate pair could not be printed
    except (ValueError, RecursionError) as error:
        return {}, f"the manifest (grid.json) is damaged and was ignored: {first_line(error)}"
    if not isinstance(manifest, dict):
        return {}, "the manifest (grid.json) is not a JSON object and was ignored"
    return manifest, ""


def _parse_rounds(content: bytes) -> Rounds | None:
    """Return the rounds of controls that were drawn after the grid had ended; None if they can't be read."""
    try:
        return parse_rounds(content)
    except ValueError:
        return None


def _unfinished_rounds(rounds: Rounds | None, trials: pd.DataFrame) -> list[str]:
    """Return a note on controls that were drawn and have not been trained to the end."""
    if rounds is None:
        return [f"{ROUNDS} is damaged, so the chances of controls are unknown"]
    drawn = {key for each in rounds for key in each.drawn}
    left = int(trials.loc[trials["status"] == "stopped", "trial_key"].isin(drawn).sum())
    note = f"{count(left, 'control')} of --more-controls not trained to the end yet: run grid.run again"
    return [note] if left else []


def _unknown_chances(trials: pd.DataFrame) -> list[str]:
    """Return a note on chances of being a control that some trials have and others lack; see `Sample.seen_chances`."""
    probed = trials.loc[trials["stop_epoch"].notna(), "control_chance"]
    unknown = int(probed.isna().sum())
    if not unknown or trials["control_chance"].isna().all():
        return []
    return [f"{count(unknown, 'trial')} without a known chance of being a control: all chances count as equal"]


def _combine_chances(trial: RecordedTrial, rounds: Rounds | None) -> float:
    """Return the chance that a trial is a control in the end; one that ASHA stops has a chance in each later round."""
    own, before = trial.control_chance, trial.rounds_before
    if own is None or trial.stop_epoch is None:
        return nan if own is None else own
    drawn_later = trial.stopped_at is not None and trial.would_stop_at is not None
    if rounds is None or before > len(rounds) or (drawn_later and not _is_drawn(trial, rounds)):
        return nan
    return 1 - (1 - own) * prod(1 - len(each.drawn) / each.among for each in rounds[before:])


def _is_drawn(trial: RecordedTrial, rounds: Rounds) -> bool:
    return any(trial.trial_key in each.drawn for each in rounds)


def _whole(value: object, *, at_least: int) -> int | None:
    """Return a value if it is a whole number in range; another program may have written anything."""
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if at_least <= value <= LARGEST else None


def read_artifact(uri: str, run_id: str, path: str) -> bytes | None:
    """Return the content of a run's artifact; None if there is no such artifact.

    Raises:
        InputError: The store does not answer.
    """
    if not run_id:
        return None
    folder, _, _ = path.rpartition("/")
    with _answering(uri) as client, waiting_for(uri), tempfile.TemporaryDirectory() as target:
        here = artifact_folder(uri, client.get_run(run_id).info.artifact_uri)
        if here is not None:
            return (here / path).read_bytes() if (here / path).exists() else None
        if path not in (artifact.path for artifact in client.list_artifacts(run_id, folder or None)):
            return None
        return Path(client.download_artifacts(run_id, path, target)).read_bytes()


def read_commands(experiment: Experiment, command_ids: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Return the records of commands by their ids; empty if a record is missing or damaged.

    Raises:
        InputError: The store does not answer.
    """
    uri, parent_id = experiment.uri, experiment.parent_id
    contents = {name: read_artifact(uri, parent_id, f"commands/{name}.json") for name in command_ids}
    return {name: _parse_manifest(content or b"{}")[0] for name, content in contents.items()}


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
        with _answering(experiment.uri) as client, ThreadPoolExecutor(HISTORY_THREADS) as threads:
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


@contextmanager
def _answering(uri: str) -> Iterator[MlflowClient]:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it logs the tracebacks of what it also raises
    try:
        yield _open(uri)
    except (*UNREACHABLE, CommandError, sqlite3.Error) as error:
        raise InputError(f"can't read the store {mask(uri)}: {store_problem(error, uri)}") from error


def _open(uri: str) -> MlflowClient:
    """Return a client that changes nothing: of a sqlite file itself or, if it can't be read as it is, of a copy."""
    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(tracking_uri=uri)
    try:
        with waiting_for(uri):
            sqlite_tables(path, patience_seconds=BUSY_SECONDS)
        return MlflowClient(tracking_uri=client_uri(uri, read_only=True))
    except (*UNREACHABLE, sqlite3.Error) as error:
        if not any(symptom in str(error) for symptom in NEEDS_WRITING):
            raise
        with waiting_for(uri):
            return MlflowClient(tracking_uri=_copy(path, path.stat().st_mtime_ns))


@cache
def _copy(path: Path, changed: int) -> str:
    """Return the URI of a copy of a sqlite store, for the rest of the process; its tables are those of this MLflow.

    Args:
        path: Of the store.
        changed: When it was last changed; a copy is as old as that.
    """
    folder = tempfile.TemporaryDirectory(prefix="store-", suffix=f"-{changed}")
    atexit.register(folder.cleanup)
    for suffix in ("", "-journal", "-wal"):  # what sqlite needs to restore the last transaction
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{folder.name}/mlflow.db{suffix}")
    uri = f"sqlite:///{folder.name}/mlflow.db"
    mlflow.db.upgrade.main([uri], standalone_mode=False)
    return uri


def _find(client: MlflowClient, uri: str, name: str) -> str:
    with waiting_for(uri):
        found = find_experiment(client, uri, name)
    if found is None:
        raise missing_experiment(name, uri, experiment_names(client))
    if found.lifecycle_stage == "deleted":
        raise InputError(f"experiment '{name}' is deleted in {mask(uri)}; restore it or name another --experiment")
    return str(found.experiment_id)


def _search(client: MlflowClient, uri: str, experiment_id: str, view: int) -> Iterator[Run]:
    size = SERVER_PAGE_SIZE if uri.startswith("http") else PAGE_SIZE
    token = None
    while token != "":
        with _no_collection(), waiting_for(uri):
            page = client.search_runs([experiment_id], "", view, size, page_token=token)
        yield from page
        token = page.token or ""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause garbage collection: MLflow creates 45 objects per run, and scanning them takes most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _tabulate(runs: list[Run], noun: str, rounds: Rounds | None) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs that have ended and are readable as a table, and a sentence on each kind of the others."""
    read, unreadable = _read(runs)
    ended = [trial for trial in read if trial.status]
    counting = {trial.trial_key: trial for trial in sorted(ended, key=lambda trial: trial.precedence)}
    rungs = [f"{RUNG_METRIC}{epoch}" for epoch in rung_epochs({name for each in ended for name in each.metrics})]
    extra = rungs if noun == "trial" else [*rungs, *TEST_METRICS]
    rows = [_row(counting[key], rounds) for key in sorted(counting)]
    table = pd.DataFrame(rows, columns=[*COLUMNS, *extra]).astype(COLUMNS | dict.fromkeys(extra, "float64"))
    table, strays = _drop_strays(table)
    left_out = {"not ended yet": len(read) - len(ended), TWIN: len(ended) - len(counting)}
    notes = [f"{count(number, noun)} left out: {why}" for why, number in left_out.items() if number]
    return table, notes + describe_unreadable(unreadable, noun) + strays


def _drop_strays(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Drop the accuracies at epochs that are no rung, as most trials that trained so long have none there."""
    strays = []
    for epoch in rung_epochs(table.columns):
        known = table[f"{RUNG_METRIC}{epoch}"].notna()
        reached = (table["epochs_run"] >= epoch) & table["status"].isin(["completed", "stopped"])
        if 2 * known.sum() < reached.sum():
            strays.append((f"{RUNG_METRIC}{epoch}", int(known.sum())))
    notes = [f"metric {name} of {count(number, 'trial')} ignored: it is no rung" for name, number in strays]
    return table.drop(columns=[name for name, _ in strays]), notes


def _read(runs: Iterable[Run]) -> tuple[list[RecordedTrial], Mapping[str, list[str]]]:
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
    recorded = {*TEST_METRICS, *(f"{RUNG_METRIC}{epoch}" for epoch in rung_epochs(metrics))}
    return {
        "run_id": trial.run_id,
        "trial_key": trial.trial_key,
        "cell_key": config.cell_key,
        **config.cell,
        "seed": config.seed,
        "lr_scale": config.lr_scale,
        "epochs": config.epochs,
        "status": trial.status,
        "control": trial.control,
        "control_chance": _combine_chances(trial, rounds),
        "drawn_later": _is_drawn(trial, rounds or ()),
        "stopped_at_epoch": nan if trial.stopped_at is None else float(trial.stopped_at),
        "stop_epoch": nan if stop_epoch is None else float(stop_epoch),
        "epochs_run": trial.epochs_run,
        "final_val_accuracy": _final(trial.status, metrics),
        "best_val_accuracy": metrics.get("best_val_accuracy", nan),
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
