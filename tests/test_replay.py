"""Replays on real learning curves: is what the commands print true of them?"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from analysis.estimates.final_effects import measure_final_effects
from benchmarks.replay.__main__ import main
from benchmarks.replay.__main__ import run as run_replays
from benchmarks.replay.curves import EPOCHS, PATH, VAL_IMAGES, describe, export, load_curves
from benchmarks.replay.draws import Table, draw_at_random, draw_controls, replay
from benchmarks.replay.estimators import ESTIMATORS, compare, root_mean_square, truth
from benchmarks.replay.examine import SETTINGS, Setting, examine, prepare
from benchmarks.replay.summary import summarise
from grid.config import FACTORS, InputError, TrialConfig
from grid.metrics import EpochReport
from grid.plan.asha import DEFAULT_RULE, NO_STOPPING, StoppingRule
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from grid.wording import count

DRAWS = 12


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLP's half of the curves, on which a replay takes half as long."""
    comment, header, *rows = PATH.read_text().splitlines()
    path = tmp_path_factory.mktemp("curves") / "mlp.csv"
    path.write_text("\n".join([comment, header, *(row for row in rows if row.startswith("mlp,"))]) + "\n")
    return path


@pytest.fixture(scope="module")
def table(mlp: Path) -> Table:
    return prepare(mlp)[0]


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    (setting,) = SETTINGS["default"]
    return pd.concat([examine((setting, draw), PATH, 1) for draw in range(DRAWS)], ignore_index=True)


def run(table: Table, rule: StoppingRule = DEFAULT_RULE, controls: int = 60, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return replay(table, rule, *draw_controls(table.cells, controls, rng), rng)


def test_the_table_is_whole_and_small() -> None:
    curves = load_curves()
    assert PATH.stat().st_size < 1_000_000
    assert curves.groupby("model")["seed"].value_counts().groupby("model").nunique().eq(1).all()
    assert not curves.duplicated([*FACTORS, "seed"]).any()
    values = curves[[str(epoch) for epoch in range(1, EPOCHS + 1)]]
    assert ((values > 0.01) & (values < 1) | values.isna()).all(axis=None)


def test_the_table_has_every_cell_of_the_full_grid() -> None:
    for part in prepare(PATH):
        assert len(part.cells) == len(part.cells.drop_duplicates()) == 1920
        assert part.cells.equals(prepare(PATH)[0].cells)


def test_seeds_of_a_cell_differ(mlp: Path) -> None:
    first, second = (part.accuracies[:, -1] for part in prepare(mlp)[:2])
    assert 0.002 < np.nanstd(first - second) / np.sqrt(2) < 0.03


def with_cnn(curves: pd.DataFrame, seeds: int) -> pd.DataFrame:
    """Return the MLP's curves, and those of its first seeds once more as a CNN's, all images of a class better."""
    columns = [str(epoch) for epoch in range(1, EPOCHS + 1)]
    others = curves[curves["seed"] < seeds].assign(model="cnn")
    others[columns] += 1 / 47
    return pd.concat([curves, others], ignore_index=True)


@pytest.mark.parametrize(("seeds", "expected"), [(1, [(0, 0), (1, 0)]), (2, [(0, 0), (1, 1)])])
def test_models_may_have_different_numbers_of_seeds(
    seeds: int, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    curves = load_curves().query("model == 'mlp'")
    path = tmp_path / "curves.csv"
    columns = [str(epoch) for epoch in range(1, EPOCHS + 1)]
    both = with_cnn(curves, seeds)
    both.assign(**{name: (both[name] * VAL_IMAGES).round().astype(int) for name in columns}).to_csv(path, index=False)
    tables = prepare(path)
    assert [len(table.cells) for table in tables] == [1920] * len(expected)
    ends = {seed: rows["9"].to_numpy() for seed, rows in curves.groupby("seed")}
    for table, (mlp, cnn) in zip(tables, expected, strict=True):
        is_cnn = (table.cells["model"] == "cnn").to_numpy()
        assert table.accuracies[~is_cnn, -1] == pytest.approx(ends[mlp])
        assert table.accuracies[is_cnn, -1] == pytest.approx(ends[cnn] + 1 / 47, abs=1 / VAL_IMAGES)
    assert describe(both) == f"mlp: 960 cells x 2 seeds, cnn: 960 cells x {count(seeds, 'seed')}"


def test_curves_of_an_experiment_are_written_without_seeds_that_are_still_in_training(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({"grid.json": b'{"data": {"val_images": %d}, "commit": "ab"}' % VAL_IMAGES}, {})
    trained = [("mlp", "sgd", 0), ("mlp", "adam", 0), ("mlp", "adam", 1), ("mlp", "sgd", 1)]
    for model, optimizer, seed in [*trained, ("cnn", "adam", 0), ("cnn", "sgd", 0), ("cnn", "sgd", 1)]:
        config = TrialConfig(learning_rate=0.1, epochs=EPOCHS, model=model, optimizer=optimizer, seed=seed)
        diverged = (model, optimizer) == ("cnn", "adam")
        play_curve(recorder, config, [1000 + 10 * epoch + seed for epoch in range(1, 2 if diverged else EPOCHS + 1)])
    assert recorder.close(finished=True)
    path = tmp_path / "curves.csv"
    assert export(store.uri, "some grid", path) == 6
    curves = load_curves(path)
    written = curves["model"] + " " + curves["optimizer"] + " " + curves["seed"].astype(str)
    assert written.tolist() == ["mlp sgd 0", "mlp adam 0", "cnn sgd 0", "cnn adam 0", "mlp sgd 1", "mlp adam 1"]
    assert (curves[["1", "9"]] * VAL_IMAGES).round().values.tolist()[-1] == [1011, 1091]
    assert np.isnan(curves.loc[3, "2"])


def play_curve(recorder: Recorder, config: TrialConfig, correct: list[int]) -> None:
    """Record a training of which so many validation images are right after each epoch; it diverges after the last."""
    recorder.started(config, control=False)
    for epoch, right in enumerate(correct, start=1):
        recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=right / VAL_IMAGES), is_rung=False)
    status = "completed" if len(correct) == config.epochs else "diverged"
    recorder.ended(config, status, epochs_run=len(correct), best_val_accuracy=max(correct) / VAL_IMAGES)


def test_a_grid_that_was_stopped_is_no_table_of_curves(finished_store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stopped or failed trials; train it with --no-stopping"):
        export(finished_store.uri, "finished", tmp_path / "curves.csv")


@pytest.mark.slow
def test_processes_change_no_number() -> None:
    settings = [Setting("3%", DEFAULT_RULE, 0.03)]
    one, two = (run_replays(PATH, settings, draws=2, seed=3, jobs=jobs) for jobs in (1, 2))
    pd.testing.assert_frame_equal(one, two)


def test_without_stopping_every_end_is_seen_and_effects_are_differences_of_means(table: Table) -> None:
    trials = run(table, NO_STOPPING, controls=0)
    assert (trials["epochs_run"] == EPOCHS).all()
    means = trials.groupby("optimizer")["final_val_accuracy"].mean()
    effects = measure_final_effects(trials).levels.query("factor == 'optimizer'").set_index("level")["effect"]
    pd.testing.assert_series_equal(effects.sort_index(), (means - means.mean()).sort_index(), check_names=False)


def test_stopping_saves_epochs_and_spares_the_controls(table: Table) -> None:
    trials = run(table)
    assert trials["epochs_run"].sum() < 0.4 * EPOCHS * len(trials)
    assert trials["control"].sum() == 60
    assert (trials.loc[trials["control"], "status"] != "stopped").all()
    assert trials.loc[trials["status"] == "stopped", "final_val_accuracy"].isna().all()


def test_more_controls_are_drawn_among_the_stopped_with_the_chance_that_a_store_records(table: Table) -> None:
    before = run(table)
    trials = replay(table, DEFAULT_RULE, *controls_of(table, 60), later=50)
    drawn = trials["control"] & ~before["control"]
    stopped = before["status"] == "stopped"
    assert drawn.sum() == 50
    assert stopped[drawn].all()
    assert (trials.loc[drawn, "final_val_accuracy"] == table.accuracies[drawn, -1]).all()
    assert trials.loc[drawn, "stop_epoch"].equals(before.loc[drawn, "stop_epoch"])
    assert trials.loc[~drawn, "status"].equals(before.loc[~drawn, "status"])
    own = before["control_chance"].iloc[0]
    expected = 1 - (1 - own) * (1 - 50 / stopped.sum())
    assert trials["control_chance"].unique() == pytest.approx([expected])


def controls_of(table: Table, wanted: int) -> tuple[NDArray[np.bool_], float, np.random.Generator]:
    """Return what `run` draws with its first seed."""
    rng = np.random.default_rng(0)
    return *draw_controls(table.cells, wanted, rng), rng


def test_controls_at_random_are_as_many_as_wanted(table: Table) -> None:
    controls, chance = draw_at_random(table.cells, 60, np.random.default_rng(0))
    assert (controls.sum(), chance) == (60, 60 / len(table.cells))
    again, _ = draw_at_random(table.cells, 60, np.random.default_rng(1))
    assert (controls & again).sum() < 20


def test_the_effects_at_the_end_are_found_without_bias_and_with_honest_intervals(found: pd.DataFrame) -> None:
    ours = summarise(found).set_index("estimator").loc["ours"]
    assert abs(ours["bias"]) < 0.15
    assert ours["covered"] >= 0.93
    assert ours["worst"] >= 0.8
    assert ours["pairs"] >= 0.93


def test_ours_errs_less_than_completed_trials_or_controls_alone(found: pd.DataFrame) -> None:
    error = summarise(found).set_index("estimator")["error"]
    assert error["ours"] < error["controls only"]
    assert error["ours"] < 0.75 * error["completed only"]


def test_any_number_of_controls_yields_intervals_that_change_smoothly(table: Table) -> None:
    widths = []
    for controls in range(40, 121, 13):
        levels = measure_final_effects(run(table, controls=controls, seed=controls)).levels
        widths.append(float((levels["high"] - levels["low"]).mean()))
    assert max(widths) < 3 * min(widths)
    assert np.isfinite(widths).all()


@pytest.mark.parametrize("within", [("model",), ("model", "lr_schedule"), ()])
def test_every_rule_leaves_the_effects_unbiased(table: Table, within: tuple[str, ...]) -> None:
    true = truth(run(table, NO_STOPPING, controls=0))
    rule = StoppingRule(within=within, factor=2)
    errors = [compare(ESTIMATORS["ours"](run(table, rule, 100, seed)), true) for seed in range(5)]
    main_effects = pd.concat(errors).query("other_factor == ''")
    assert root_mean_square(main_effects["error"]) < 0.003


def test_the_command_prints_all_tables_in_80_columns(mlp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draws", "1", "--curves", str(mlp)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("3%       ours") for line in lines)
    assert any(line.startswith("model x schedule; rungs 2, 6; best 1/3") for line in lines)
    assert any(line.startswith("D-optimal, then as many more") for line in lines)
    shares = next(line.split() for line in lines if line.startswith("batch_norm"))
    assert float(shares[1].rstrip("%")) == pytest.approx(float(shares[2].rstrip("%")), abs=20)
