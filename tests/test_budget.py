"""What a grid may take in all: over kills and several commands, with nothing lost, doubled or trained for nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.audit import audit
from grid.config import InputError
from grid.driver.watcher import spent_on
from grid.parts.registry import GRIDS
from grid.plan.budget import Budget, Spent
from grid.plan.space import cross, expand, has_levels, read_first
from grid.record.store import Store, StoredTrial
from grid.run import _parser, read_request
from tests.test_space import configure

LEVELS = GRIDS["smoke"].levels


@pytest.mark.parametrize(
    ("budget", "spent", "reached"),
    [
        (Budget(), Spent(1e9, 10**9), ""),
        (Budget(hours=1), Spent(3599, 10), ""),
        (Budget(hours=1), Spent(3600, 10), "--max-hours 1"),
        (Budget(cost=3, price_per_hour=2), Spent(5399, 10), ""),
        (Budget(cost=3, price_per_hour=2), Spent(5400, 10), "--max-cost 3"),
        (Budget(epochs=10), Spent(1e9, 9), ""),
        (Budget(epochs=10), Spent(0, 10), "--max-epochs 10"),
        (Budget(hours=9, epochs=10), Spent(3600, 11), "--max-epochs 10"),
    ],
)
def test_a_limit_is_reached_when_as_much_is_spent(budget: Budget, spent: Spent, reached: str) -> None:
    assert budget.exhausted(spent) == reached


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hours": 0}, "--max-hours must be finite and above 0, got 0"),
        ({"hours": math.nan}, "--max-hours must be finite and above 0, got nan"),
        ({"cost": -1.0, "price_per_hour": 1.0}, "--max-cost must be finite and above 0, got -1"),
        ({"epochs": 0}, "--max-epochs must be at least 1, got 0"),
        ({"cost": 1.0}, "--max-cost needs the price of the machine or cluster: pass --price-per-hour as well"),
        ({"price_per_hour": math.inf}, "--price-per-hour must be finite and above 0, got inf"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget(**values)
    assert str(caught.value) == reason


def test_a_budget_says_itself_and_what_is_spent_in_its_units() -> None:
    budget = Budget(hours=1.5, cost=3, price_per_hour=2, epochs=100)
    assert str(budget) == "at most 90 min, a cost of 3 at 2 per hour, 100 epochs in all"
    assert budget.describe(Spent(1800, 12)) == "30 min of training, 12 epochs, a cost of 1.00"


@pytest.mark.parametrize(("text", "seconds"), [("12.5", 12.5), ("", 0.0), ("x", 0.0), ("-1", 0.0), ("nan", 0.0)])
def test_what_somebody_has_edited_counts_as_nothing(text: str, seconds: float, store: Store) -> None:
    trial = StoredTrial("id", "", configure({"model": "mlp"}, 0, 1.0), {}, control=False, tags={"grid_seconds": text})
    assert spent_on([trial], 0.0).seconds == seconds
    store.client.set_tag(store.parent_id, "grid_seconds", text)
    assert store.grid_seconds() == seconds


def test_cells_that_are_first_come_before_all_others_and_both_parts_in_their_usual_order() -> None:
    cells, _ = cross(LEVELS)
    settings: dict[str, Any] = {"seeds": 2, "lr_scales": (1.0,), "order_seed": 0, "configure": configure}
    usual = expand(cells, **settings)
    first = read_first(LEVELS, [("dropout", ("on",)), ("model", ("cnn",))])
    changed = expand(cells, **settings, first=first)
    ahead = [trial for trial in usual if has_levels(trial.cell, first)]
    assert len(ahead) == 16
    assert changed == ahead + [trial for trial in usual if trial not in ahead]


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ([("momentum", ("1",))], "--first takes each factor of the grid once, got 'momentum'; choose from model, "),
        ([("model", ("mlp",)), ("model", ("cnn",))], "--first takes each factor of the grid once, got 'model'"),
        ([("dropout", ("maybe",))], "--first: the grid has no dropout=maybe; choose from off, on"),
    ],
)
def test_a_level_that_the_grid_lacks_can_not_be_first(wanted: list[tuple[str, tuple[str, ...]]], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        read_first(LEVELS, wanted)
    assert str(caught.value).startswith(reason)


def test_the_options_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--grid",
        "smoke",
        "--max-hours",
        "2",
        "--max-cost",
        "5",
        "--price-per-hour",
        "3",
        "--first",
        "dropout=on",
    ]
    request = read_request(_parser().parse_args(options))
    assert request.budget == Budget(2, 5, 3, None)
    assert request.first == {"dropout": ("on",)}


SECONDS = 5.0
HELD = [word for level in ("model=cnn", "activation=relu") for word in ("--only", level)]
GRID = ["--grid", "smoke", *HELD, "--per-class", "50", "--epochs", "4", "--no-stopping", "--address", "local"]
TRIALS = 8
EXPERIMENT = "smoke-glyphs-50-per-class-4-epochs-no-stopping"


def command(folder: Path, data: Path, *options: str) -> list[str]:
    place = ["--data-dir", str(data), "--no-report", "--concurrency", "2", *options]
    return [sys.executable, "-m", "grid.run", *GRID, *place]


def run(folder: Path, data: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(folder, data, *options), cwd=folder, env=environment(), capture_output=True, text=True, timeout=1800
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def open_store(folder: Path) -> Store:
    store = Store(f"sqlite:///{folder}/mlflow.db", EXPERIMENT)
    store.open()
    return store


def spent(store: Store) -> float:
    return store.grid_seconds() if store.parent_id else 0.0


@pytest.mark.slow
def test_a_budget_holds_over_a_kill_and_a_larger_one_finishes(glyphs_dir: Path, tmp_path: Path) -> None:
    budget = ["--max-hours", f"{SECONDS / 3600}"]
    with subprocess.Popen(
        command(tmp_path, glyphs_dir, *budget),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as driver:
        deadline = time.monotonic() + 600
        while not (tmp_path / "mlflow.db").exists() or not _has_run(tmp_path, SECONDS / 3):
            assert time.monotonic() < deadline
            assert driver.poll() is None
            time.sleep(0.5)
        os.killpg(driver.pid, signal.SIGKILL)
    ended = run(tmp_path, glyphs_dir, *budget)
    assert ended.returncode == 3, ended.stderr
    assert f"--max-hours {SECONDS / 3600:g} is reached (" in ended.stderr
    assert "; a larger --max-hours trains the " in ended.stderr
    store = open_store(tmp_path)
    before, epochs = spent(store), epoch_seconds(store)
    assert before >= SECONDS
    # In each of two slots an epoch that runs and, on a busy machine, one that begins before the driver says stop. (What
    # has passed may be more: there the workers may come up only when the budget is spent.)
    assert sum(epochs) <= 2 * SECONDS + 4 * max(epochs)
    again = run(tmp_path, glyphs_dir, *budget)  # nothing is left to spend
    assert (again.returncode, "is reached" in again.stderr) == (3, True)
    assert (spent(store), epoch_seconds(store)) == (before, epochs)
    finished = run(tmp_path, glyphs_dir, "--max-hours", "5")
    assert finished.returncode == 0, finished.stderr
    assert f"\n{TRIALS}/{TRIALS} done" in finished.stdout
    left = list(map(str, tmp_path.glob("storage/*/checkpoints/*")))
    found = audit(store.uri, tmp_path, store.experiment, [store.experiment], left)
    assert (found.trials, found.lost, found.doubled, found.orphans, found.different) == (TRIALS, 0, 0, 0, 0)


def epoch_seconds(store: Store) -> list[float]:
    """Return how long each recorded epoch of all trials took."""
    runs = sorted(trial.run_id for trial in store.trials().values())
    return [point.value for run in runs for point in store.client.get_metric_history(run, "epoch_seconds")]


def _has_run(folder: Path, seconds: float) -> bool:
    try:
        return spent(open_store(folder)) >= seconds
    except InputError:
        return False


@pytest.mark.slow
def test_what_runs_is_suspended_after_its_epoch_and_none_of_it_is_trained_again(
    glyphs_dir: Path, tmp_path: Path
) -> None:
    only = ["--only", "optimizer=sgd", "--first", "dropout=on"]
    store = Store(f"sqlite:///{tmp_path}/mlflow.db", EXPERIMENT)
    ended = run(tmp_path, glyphs_dir, *only, "--max-epochs", "5")
    assert ended.returncode == 3, ended.stderr
    assert "limit      at most 5 epochs in all; so far 0 s of training, 0 epochs" in ended.stdout
    store.open()
    trials = store.trials().values()
    epochs = sum(len(store.client.get_metric_history(trial.run_id, "epoch_seconds")) for trial in trials)
    assert 5 <= epochs <= 5 + 4  # see above
    assert [trial.config.cell["dropout"] for trial in trials].count("on") == 2
    assert "" in {trial.status for trial in trials} <= {"", "completed"}
    assert store.manifest()["first"] == [{"dropout": ["on"]}]
    finished = run(tmp_path, glyphs_dir, *only, "--max-epochs", "16")
    assert finished.returncode == 0, finished.stderr
    client, seen = store.client, Counter[int]()
    for trial in store.trials().values():
        assert trial.status == "completed"
        seen.update(each.step for each in client.get_metric_history(trial.run_id, "epoch_seconds"))
    assert seen == dict.fromkeys(range(1, 5), 4)  # each epoch of each trial once
    assert json.loads(store.artifact("grid.json") or b"{}")["trials"] == 4
