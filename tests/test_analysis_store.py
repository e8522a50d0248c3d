from pathlib import Path

import pytest

from analysis.store import read_trials
from grid.config import FACTORS, InputError, TrialConfig
from grid.record import Recorder
from grid.spool import Spool
from grid.store import Store

CONFIG = TrialConfig(learning_rate=1e-3, epochs=9, seed=3, lr_scale=0.5)


def record(store: Store, folder: Path, status: str | None) -> None:
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({}, {})
    recorder.trial_started(CONFIG, control=True)
    recorder.epoch_ended(CONFIG, 1, {"val_accuracy": 0.25}, is_rung=True)
    if status:
        best = None if status == "failed" else 0.25
        recorder.trial_ended(CONFIG, status, epochs_run=1, best_val_accuracy=best)
    recorder.close(finished=True)


def test_a_trial_is_a_row_with_types(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "stopped")
    (row,) = read_trials(store.uri, "some grid").to_dict("records")
    assert {factor: row[factor] for factor in FACTORS} == CONFIG.cell
    assert (row["seed"], row["lr_scale"], row["epochs"], row["epochs_run"]) == (3, 0.5, 9, 1)
    assert (row["status"], row["control"], row["trial_key"]) == ("stopped", True, CONFIG.trial_key)
    assert (row["best_val_accuracy"], row["val_accuracy_at_1"]) == (0.25, 0.25)


def test_a_trial_without_an_accuracy_is_a_row_with_none(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, "failed")
    assert read_trials(store.uri, "some grid")["best_val_accuracy"].isna().all()


def test_an_empty_experiment_is_told(store: Store) -> None:
    with pytest.raises(
        InputError, match="^experiment 'some grid' in .* has no trial yet; run python -m grid.run first$"
    ):
        read_trials(store.uri, "some grid")


def test_an_experiment_whose_trials_still_run_is_told(store: Store, tmp_path: Path) -> None:
    record(store, tmp_path, None)
    with pytest.raises(InputError, match="^no trial of experiment 'some grid' in .* has ended yet"):
        read_trials(store.uri, "some grid")


def test_an_unknown_experiment_is_told_with_the_choices(store: Store) -> None:
    with pytest.raises(InputError, match=r"^no experiment 'other' in sqlite.*; it has Default, some grid"):
        read_trials(store.uri, "other")


def test_a_broken_database_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)
    with pytest.raises(InputError, match=r"^can't read the store sqlite:.*; pass another --store$"):
        read_trials(f"sqlite:///{tmp_path}/broken.db", "some grid")
