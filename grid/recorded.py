"""What a run of the store says of a trial, read and checked in one way by the driver and by `analysis`.

Anybody may edit a store by hand, in MLflow's page say. A run that contradicts itself is not guessed at: it is left out,
with the reason. Standard library only.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Protocol

from grid.config import DEFAULTS, FACTORS, NUMERICS_VERSION, InputError, TrialConfig
from grid.metrics import FINAL_METRIC, FINAL_STATUSES, RUNG_METRIC, STATUSES, TEST_METRICS, recorded_rungs
from grid.wording import count

CONFIRM, REFIT = FINALIST_KINDS = ("confirm", "refit")
"""Kinds of runs of `grid.confirm`: of the finalists, and of the best of them on most validation images as well."""
FIRST_FINALIST_SEED = 1000
"""Seeds of finalists start here, and those of a grid are below: no finalist profits from the luck that made it one."""
ACCURACIES = (FINAL_METRIC, "best_val_accuracy", *(name for name in TEST_METRICS if "accuracy" in name))
REQUIRED = (*FACTORS, "seed", "lr_scale", "epochs")
"""Parameters without which a run is no trial."""
TWIN = "another run of the same trial counts"
PARENT_TAG = "mlflow.parentRunId"
MANIFEST = "grid.json"
"""Artifact of the parent run: what the last `grid.run` planned."""
ROUNDS = "more_controls.json"
"""Artifact of the parent run: see `parse_rounds`."""
GRID_SECONDS = "grid_seconds"
"""Tag of the parent run: in how many seconds trials have been trained, by all commands. Older stores: of the trials."""
COMMAND_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


class UnreadableError(ValueError):
    """A run that can't be read as a trial; its text is the reason, the same for all runs with that fault."""


@dataclass(frozen=True)
class RecordedTrial:
    """A run whose record agrees with itself."""

    run_id: str
    trial_key: str
    config: TrialConfig
    status: str
    """One of `STATUSES`; empty while it has not ended."""
    control: bool
    control_chance: float | None
    """With which it was drawn to be a control when it began; None if the store does not say."""
    rounds_before: int
    """Rounds of `--more-controls` that were drawn before it began."""
    stopped_at: int | None
    """Rung at which ASHA stopped it."""
    would_stop_at: int | None
    """Rung at which ASHA would have stopped it, were it not a control."""
    epochs_run: int
    """0 while it has not ended."""
    metrics: Mapping[str, float]
    """Last value of each."""
    tags: Mapping[str, str]
    complete: bool
    """Whether no parameter of this version of the code is missing; true for other versions, which had other ones."""

    @property
    def stop_epoch(self) -> int | None:
        """Rung at which ASHA stopped it or, if it is a control, would have."""
        return self.stopped_at if self.would_stop_at is None else self.would_stop_at

    @property
    def precedence(self) -> tuple[bool, bool, int, str]:
        """Of several runs of a trial the highest counts: one that ended without an error, or that trained longest."""
        return self.status in FINAL_STATUSES, bool(self.status), self.epochs_run, self.run_id


def command_path(command_id: str) -> str:
    """Return the artifact of the parent run that holds the record of a command."""
    return f"commands/{command_id}.json"


def parts_path(digest: str, name: str) -> str:
    """Return the artifact of the parent run that holds the text of a parts file."""
    return f"parts/{digest}/{name}"


def is_parent(tags: Mapping[str, str]) -> bool:
    """Return whether a run is the parent of trials; a trial whose kind was changed has a parent itself."""
    return tags.get("kind") == "grid" and PARENT_TAG not in tags


def choose_parent(parents: Sequence[str], named: Iterable[str]) -> str:
    """Return which parent counts: the one that most trials name, of these the oldest; empty if there is none.

    Args:
        parents: Ids, oldest first.
        named: Id that each trial names; not asked for unless there are several parents.
    """
    if len(parents) < 2:
        return next(iter(parents), "")
    times = Counter(named)
    return max(parents, key=lambda run_id: times[run_id])


def drop_twins(trials: Iterable[RecordedTrial]) -> tuple[dict[str, RecordedTrial], list[str]]:
    """Return by key, of several runs of a trial, that which counts, and the ids of the others."""
    counting: dict[str, RecordedTrial] = {}
    others = []
    for trial in trials:
        twin = counting.get(trial.trial_key, trial)
        counting[trial.trial_key] = max(trial, twin, key=lambda each: each.precedence)
        if twin is not trial:
            others.append(min(trial, twin, key=lambda each: each.precedence).run_id)
    return counting, others


def read_trial(
    run_id: str, tags: Mapping[str, str], params: Mapping[str, str], metrics: Mapping[str, float]
) -> RecordedTrial:
    """Return what a run of kind `trial` or `confirm` says; docs/store.md has the names.

    Raises:
        UnreadableError: It is no trial, or its record contradicts itself.
    """
    config, status = _config(params), _status(tags)
    epochs_run = _epochs_run(status, metrics, config)
    stopped_at = _epoch(tags, "stopped_at_epoch", config)
    trial = RecordedTrial(
        run_id=run_id,
        trial_key=_key(run_id, tags, params, config),
        config=config,
        status=status,
        control=_control(tags),
        control_chance=_chance(tags),
        rounds_before=_whole(tags, "controls_rounds_before") or 0,
        stopped_at=epochs_run if status == "stopped" and stopped_at is None else stopped_at,
        would_stop_at=_epoch(tags, "would_stop_at_epoch", config),
        epochs_run=epochs_run,
        metrics=_until(epochs_run, metrics) if status == "stopped" else metrics,
        tags=tags,
        complete=config.numerics_version != NUMERICS_VERSION or _has_all(params),
    )
    _check_seed(trial)
    _check_accuracies(trial)
    _check_verdict(trial)
    if trial.status in FINAL_STATUSES:
        _check_end(trial)
    return trial


@dataclass(frozen=True)
class Round:
    """Controls that were drawn at once, each of the stopped trials with the same chance."""

    among: int
    """Number of trials that were stopped and no controls yet."""
    drawn: tuple[str, ...]
    """Keys of the trials."""


def parse_rounds(content: bytes) -> tuple[Round, ...]:
    """Return the rounds of controls in `more_controls.json`.

    Raises:
        ValueError: It is damaged.
    """
    try:
        rounds = tuple(Round(each["among"], tuple(each["drawn"])) for each in json.loads(content))
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError("no list of rounds") from error
    for each in rounds:
        if type(each.among) is not int or not all(isinstance(key, str) for key in each.drawn):
            raise ValueError("a round has other types")
        if not 0 < len(each.drawn) <= each.among:
            raise ValueError("a round draws more trials than there are")
    return rounds


class Point(Protocol):
    """A value in the history of a metric, as MLflow returns it."""

    @property
    def step(self) -> int:
        """Epoch."""

    @property
    def value(self) -> float:
        """What was recorded."""

    @property
    def timestamp(self) -> int:
        """In milliseconds since 1970."""


def first_values(history: Iterable[Point]) -> dict[int, float]:
    """Return the finite value at each step: the first one, if somebody has added others later."""
    latest_first = sorted(history, key=lambda point: -point.timestamp)
    return {point.step: point.value for point in latest_first if isfinite(point.value)}


def read_grid_seconds(tags: Mapping[str, str]) -> float:
    """Return the seconds that `GRID_SECONDS` holds; 0 if it is missing or somebody has edited it."""
    try:
        seconds = float(tags.get(GRID_SECONDS, ""))
    except ValueError:
        return 0.0
    return seconds if isfinite(seconds) and seconds >= 0 else 0.0


def describe_unreadable(reasons: Mapping[str, Iterable[str]], noun: str) -> list[str]:
    """Return a sentence for each reason why runs are left out.

    Args:
        reasons: Why -> ids of the runs.
        noun: What they are.
    """
    known = {why: sorted(run_ids) for why, run_ids in reasons.items()}
    return [f"{count(len(run_ids), noun)} left out: {why} (run {run_ids[0]})" for why, run_ids in known.items()]


def _config(params: Mapping[str, str]) -> TrialConfig:
    if any(name not in params for name in REQUIRED):
        raise UnreadableError("parameters are not a trial's")
    try:
        return TrialConfig.from_params({"learning_rate": "1", **params})
    except InputError as error:
        raise UnreadableError("parameters are not a trial's") from error


def _key(run_id: str, tags: Mapping[str, str], params: Mapping[str, str], config: TrialConfig) -> str:
    """Return the key; it can be checked if this version of the code computed it from all parameters."""
    if config.numerics_version != NUMERICS_VERSION or not _has_all(params):
        return tags.get("trial_key") or run_id
    if tags.get("trial_key", config.trial_key) != config.trial_key:
        raise UnreadableError("tag trial_key is not the hash of its parameters")
    return config.trial_key


def _has_all(params: Mapping[str, str]) -> bool:
    known = params.keys() | DEFAULTS.keys() | {"own"}
    return all(field.name in known for field in fields(TrialConfig))


def _status(tags: Mapping[str, str]) -> str:
    status = tags.get("status", "")
    if status not in ("", *STATUSES):
        raise UnreadableError(f"tag status is none of {', '.join(STATUSES)}")
    return status


def _control(tags: Mapping[str, str]) -> bool:
    control = tags.get("control", "" if "control_chance" in tags else "false")
    if control not in ("true", "false"):
        raise UnreadableError("tag control is neither true nor false")
    return control == "true"


def _chance(tags: Mapping[str, str]) -> float | None:
    if "control_chance" not in tags:
        return None
    try:
        chance = float(tags["control_chance"])
    except ValueError:
        chance = math.nan
    if not 0 <= chance <= 1:
        raise UnreadableError("tag control_chance is not between 0 and 1")
    return chance


def _whole(tags: Mapping[str, str], name: str) -> int | None:
    text = tags.get(name)
    if text is None:
        return None
    if not (text.isdecimal() and len(text) < 10):
        raise UnreadableError(f"tag {name} is not a whole number")
    return int(text)


def _epoch(tags: Mapping[str, str], name: str, config: TrialConfig) -> int | None:
    epoch = _whole(tags, name)
    if epoch is not None and not 1 <= epoch <= config.epochs:
        raise UnreadableError(f"tag {name} is not an epoch of its budget")
    return epoch


def _epochs_run(status: str, metrics: Mapping[str, float], config: TrialConfig) -> int:
    """Return how many epochs were trained; a trial that completed trained all."""
    if not status:
        return 0
    known = metrics.get("epochs_run", config.epochs if status == "completed" else 0)
    if not (isfinite(known) and known == int(known) and 0 <= known <= config.epochs):
        raise UnreadableError("metric epochs_run is not a number of epochs within its budget")
    return int(known)


def _until(epochs_run: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics without the ends and rungs of a stopped trial that has begun to train on as a control."""
    later = {f"{RUNG_METRIC}{rung}" for rung in recorded_rungs(metrics) if rung > epochs_run} | {FINAL_METRIC}
    return {name: value for name, value in metrics.items() if name not in later}


def _check_seed(trial: RecordedTrial) -> None:
    is_finalist = trial.tags.get("kind") in FINALIST_KINDS
    if is_finalist != (trial.config.seed >= FIRST_FINALIST_SEED):
        rule = "from" if is_finalist else "below"
        raise UnreadableError(f"tag kind contradicts its seed, which is {rule} {FIRST_FINALIST_SEED} for this kind")


def _check_accuracies(trial: RecordedTrial) -> None:
    """Refuse accuracies that are none; MLflow keeps an infinite value as the largest number."""
    rungs = recorded_rungs(trial.metrics)
    names = [*ACCURACIES, *(f"{RUNG_METRIC}{rung}" for rung in rungs)]
    if any(not 0 <= trial.metrics.get(name, 0.0) <= 1 for name in names):
        raise UnreadableError("an accuracy is not between 0 and 1")
    last = trial.epochs_run if trial.status in FINAL_STATUSES else trial.config.epochs
    if any(rung > last for rung in rungs):
        raise UnreadableError(f"a metric {RUNG_METRIC}... is of an epoch that it did not train")


def _check_verdict(trial: RecordedTrial) -> None:
    """Check what ASHA decided: only a control trains past its rung, and what was drawn later has both tags."""
    stopped, would_stop = trial.stopped_at, trial.would_stop_at
    if would_stop is not None and (not trial.control or stopped not in (None, would_stop)):
        raise UnreadableError("tag would_stop_at_epoch contradicts other tags")
    if stopped is None or trial.status not in ("completed", "diverged"):
        return
    if not (trial.control and would_stop):
        raise UnreadableError("tag stopped_at_epoch contradicts other tags")


def _check_end(trial: RecordedTrial) -> None:
    """Check that a trial ended as its status says; one that failed may have been tried again."""
    contradiction = UnreadableError("tag status contradicts other tags or metrics")
    status, metrics, epochs_run = trial.status, trial.metrics, trial.epochs_run
    at_rung = f"{RUNG_METRIC}{epochs_run}" in metrics
    if trial.tags.get("error") or (trial.would_stop_at or 0) > epochs_run:
        raise contradiction
    if status == "completed" and epochs_run != trial.config.epochs:
        raise contradiction
    if status != "completed" and FINAL_METRIC in metrics:
        raise contradiction
    if status == "stopped" and (trial.stopped_at != epochs_run or epochs_run == trial.config.epochs or not at_rung):
        raise contradiction
    if status == "diverged" and at_rung:
        raise contradiction
