"""Two experiments compared: changes are found where there are some, and not where there are none."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.compare import compare, describe, differences, format_change, main
from analysis.estimates.change import POWER, change_at_end, change_at_rung, pair_trials
from analysis.store import Experiment, read_experiment
from benchmarks.planted.grids import Plan, plant
from grid.config import InputError, TrialConfig
from grid.driver.again import as_now, draw
from grid.plan.packing import Packing
from grid.record.store import StoredTrial
from grid.run import _parser, read_again
from grid.run import main as run_main

NOISE = 0.004
"""Standard deviation of what one training more or less of the same trial yields."""
ACCURACIES = ("val_accuracy_at_1", "val_accuracy_at_3", "final_val_accuracy")


def grid(rng: np.random.Generator, controls: int = 100) -> pd.DataFrame:
    return plant(Plan(controls=controls), rng).trials.assign(lr_scale=1.0)


def again(
    trials: pd.DataFrame, rng: np.random.Generator, noise: float = NOISE, level: str = "", shift: float = 0.0
) -> pd.DataFrame:
    """Return the same trials, trained once more; those with a level of the optimizer yield more."""
    moved = np.where(trials["optimizer"] == level, shift, 0.0)
    return trials.assign(
        **{name: trials[name] + moved + noise * rng.standard_normal(len(trials)) for name in ACCURACIES}
    )


def test_of_experiments_without_a_change_one_in_twenty_seems_to_have_one() -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        trials = grid(rng)
        change = change_at_end(pair_trials(trials, again(trials, rng)))
        alarms += change.moved or bool(change.levels["moved"].any())
    assert alarms / 200 < 0.08


def test_a_change_as_large_as_is_named_is_found_with_the_chance_that_is_named() -> None:
    rng = np.random.default_rng(0)
    level, found = "adam", 0
    for _ in range(120):
        trials = grid(rng)
        nothing = change_at_end(pair_trials(trials, again(trials, rng))).levels.set_index("level")
        shift = float(nothing.loc[level, "findable"])
        change = change_at_end(pair_trials(trials, again(trials, rng, level=level, shift=shift))).levels
        found += bool(change.set_index("level").loc[level, "moved"])
    assert POWER - 0.08 < found / 120 < POWER + 0.08


def test_survivors_do_not_count_at_the_end_even_if_the_other_experiment_has_nothing_else() -> None:
    trials = grid(np.random.default_rng(0))
    survivors = trials[(trials["status"] == "completed") & ~trials["control"]]
    assert len(survivors) > 10
    with pytest.raises(InputError, match="^they have no unstopped control in common$"):
        change_at_end(pair_trials(trials, survivors.assign(control=True)))


def test_pairs_are_of_the_same_levels_seed_and_scale_and_a_factor_that_one_lacks_has_its_default() -> None:
    rng = np.random.default_rng(0)
    trials = grid(rng)
    newer = pd.concat([trials.assign(mixup="off"), trials.assign(mixup="on")]).sample(frac=1, random_state=0)
    pairs = pair_trials(trials, newer)
    assert len(pairs) == len(trials)
    assert set(pairs["mixup"]) == {"off"}
    assert (pairs["final_val_accuracy_1"].fillna(0) == pairs["final_val_accuracy_2"].fillna(0)).all()


def test_identical_experiments_have_no_change_and_no_doubt() -> None:
    trials = grid(np.random.default_rng(0))
    change = change_at_rung(pair_trials(trials, trials))
    assert (change.epoch, change.pairs, change.identical) == (1, len(trials), len(trials))
    assert (change.mean, change.low, change.high, change.noise) == (0, 0, 0, 0)
    assert not change.moved
    assert not change.levels["moved"].any()


def test_only_controls_that_were_drawn_at_once_count_at_the_end() -> None:
    trials = grid(np.random.default_rng(0), controls=120)
    later = trials["control"] & (trials["model"] == "mlp")
    drawn_later = trials.assign(stopped_at_epoch=trials["stopped_at_epoch"].where(~later, 1.0))
    assert change_at_end(pair_trials(trials, drawn_later)).pairs == (trials["control"] & ~later).sum()


def test_too_few_pairs_and_other_budgets_are_said() -> None:
    trials = grid(np.random.default_rng(0))
    with pytest.raises(InputError, match="10 pairs are too few to compare 6 factors; 15 are needed"):
        change_at_end(pair_trials(trials, trials[trials["control"]].iloc[:10]))
    with pytest.raises(InputError, match=r"their budgets differ \(9 and 12 epochs\)"):
        change_at_end(pair_trials(trials, trials.assign(epochs=12)))


def experiment(trials: pd.DataFrame, name: str, manifest: Mapping[str, Any]) -> Experiment:
    return Experiment("sqlite:///x.db", name, "", trials, trials[:0], manifest, ())


def test_the_text_fits_80_columns_and_says_what_moved() -> None:
    rng = np.random.default_rng(0)
    trials = grid(rng)
    before = experiment(trials, "old", {"commit": "a", "versions": {"torch": "2.11"}, "settings": {"x": "1"}})
    after = experiment(
        again(trials, rng, level="sgd", shift=0.02), "new", {"commit": "b", "versions": {"torch": "2.14"}}
    )
    changes, problems = compare(before, after)
    assert (len(changes), problems) == (2, [])
    text = format_change(changes[0])
    assert max(map(len, text.splitlines())) <= 80
    assert "at the end, after 9 epochs: 100 pairs of trials, 0 of them identical" in text
    assert "\noptimizer=sgd " in text
    assert list(differences(before.manifest, after.manifest)) == [
        "commit: a, then b",
        "torch: 2.11, then 2.14",
        "x: 1, then not recorded",
    ]
    found = json.loads(json.dumps(describe(changes, problems, before, after)))
    assert found["changes"][0]["levels"][0].keys() == {*changes[0].levels}


def test_experiments_without_a_common_trial_are_refused() -> None:
    trials = grid(np.random.default_rng(0))
    with pytest.raises(InputError, match="'old' and 'new' have no trial in common: the same cell, seed and scale"):
        compare(experiment(trials, "old", {}), experiment(trials.assign(seed=7), "new", {}))


def stored(trials: pd.DataFrame) -> list[StoredTrial]:
    found = []
    for row in trials.to_dict("records"):
        cell = {name: row[name] for name in ("model", "activation", "optimizer", "batch_norm", "dropout")}
        config = TrialConfig.from_params({**cell, "learning_rate": "0.1", "epochs": "9", "seed": str(row["seed"])})
        tags = {} if pd.isna(row["stopped_at_epoch"]) else {"stopped_at_epoch": "1"}
        stop = None if pd.isna(row["stop_epoch"]) else int(row["stop_epoch"])
        metrics = {"epochs_run": float(row["epochs_run"])}
        found.append(
            StoredTrial("id", row["status"], config, metrics, control=row["control"], stop_epoch=stop, tags=tags)
        )
    return found


def test_a_part_is_drawn_among_the_controls_and_a_larger_one_contains_a_smaller_one() -> None:
    trials = stored(grid(np.random.default_rng(0)))
    epochs = sum(trial.metrics["epochs_run"] for trial in trials)
    few, how = draw(trials, 0.2)
    assert len(few) == round(0.2 * epochs / 9)
    assert how == f"{len(few)} trials of 100 that were trained to the end"
    assert all(trial.control for trial in few)
    assert draw(trials, 0.3)[0][: len(few)] == few
    assert len(draw(trials, 1.0)[0]) == 100


def test_a_part_that_is_too_small_is_refused_with_the_share_that_suffices() -> None:
    trials = stored(grid(np.random.default_rng(0)))
    with pytest.raises(
        InputError, match=r"^a share of 0.02 is \d trials, too few to .*; pass --share 0\.\d+$"
    ) as caught:
        draw(trials, 0.02)
    share = float(str(caught.value).rpartition(" ")[2])
    assert len(draw(trials, share + 0.001)[0]) < 30
    with pytest.raises(InputError, match="no unstopped control"):
        draw([replace(trial, control=False) for trial in trials], 0.5)


def test_a_trial_is_trained_as_this_code_does_on_these_images() -> None:
    old = TrialConfig(learning_rate=0.1, epochs=3, numerics_version="1", data_fingerprint="x", device="cuda")
    new = as_now(old, _Images("y"), Packing(1, 1.0, 0.0))  # type: ignore[arg-type]
    assert (new.data_fingerprint, new.device, new.cell_key) == ("y", "cpu", old.cell_key)
    assert new.numerics_version != "1"


class _Images:
    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--only", "model=mlp"], "--against repeats an experiment as it is; leave --only out"),
        (["--no-report"], "--against repeats an experiment as it is; leave --report out"),
        (["--experiment", " "], "--experiment must be 1 to 200 printable characters, not all of them spaces"),
        (["--concurrency", "0"], "--concurrency must be 1 to 100,000, got 0"),
        (["--max-epochs", "9"], "--against repeats an experiment as it is; leave --max-epochs out"),
        (["--share", "0"], "--share must be above 0 and at most 1, got 0"),
        (["--experiment", "old"], "--experiment and --against name the same; leave --experiment out"),
    ],
)
def test_what_does_not_go_with_a_repetition_is_refused(options: list[str], reason: str, store_uri: str) -> None:
    parser = _parser()
    with pytest.raises(InputError) as caught:
        read_again(parser, parser.parse_args(["--against", "old", "--store", store_uri, *options]))
    assert str(caught.value) == reason


@pytest.mark.slow
def test_a_part_of_a_real_grid_is_trained_once_more_and_nothing_has_changed(
    glyphs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = ["--data-dir", str(glyphs_dir), "--address", "local"]
    smoke = ["--grid", "smoke", "--only", "model=mlp", "--per-class", "10", "--epochs", "3", "--no-report"]
    assert run_main([*smoke, *place, "--controls", "1"]) == 0
    command = [sys.executable, "-m", "grid.run", "--against", "smoke-glyphs-10-per-class-3-epochs", "--share", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, *place], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "at the end, after 3 epochs: 16 pairs of trials, 16 of them identical" in done.stdout
    assert "no change found" in done.stdout
    other = [*command, *place, "--experiment", "other kernels"]
    kernels = {**environment, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert subprocess.run(other, env=kernels, capture_output=True, text=True, timeout=1800).returncode == 0
    capsys.readouterr()
    assert main(["smoke-glyphs-10-per-class-3-epochs", "other kernels", "--json"]) == 0
    (at_end, _) = json.loads(capsys.readouterr().out)["changes"]
    assert at_end["pairs"] == 16
    assert at_end["identical"] < 16
    assert read_experiment(None, "other kernels").manifest["against"]["share"] == 1
