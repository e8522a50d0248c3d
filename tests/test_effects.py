import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.effects import CSV_COLUMNS, describe, format_final_effects, format_rung_effects, main, tabulate
from analysis.estimates.final_effects import measure_final_effects
from analysis.estimates.rung_effects import measure_rung_effects
from analysis.store import Experiment, read_experiment
from grid.config import FACTORS, TrialConfig
from grid.metrics import EpochReport
from grid.record.recorder import Recorder
from grid.record.spool import Spool
from grid.record.store import Store
from tests.stopped_grids import make_grid


def stopped(number: int = 30, sizes: dict[str, int] | None = None) -> pd.DataFrame:
    grid = make_grid(sizes)
    return grid.stopped_early(grid.draw_exactly(number, np.random.default_rng(0)))


def diverged(trials: pd.DataFrame, rows: slice) -> pd.DataFrame:
    trials = trials.copy()
    trials.loc[rows, "status"] = "diverged"
    trials.loc[rows, ["final_val_accuracy", "val_accuracy_at_1", "val_accuracy_at_3"]] = np.nan
    return trials


def difference_lines(text: str) -> list[str]:
    """Return the lines on the largest difference of each factor."""
    return text.split("verdict\n")[1].split("\n\n")[0].splitlines()


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    "trials",
    [
        stopped(),
        diverged(stopped(40, dict.fromkeys(FACTORS, 2)), slice(0, 20)),
        make_grid({"model": 2, "optimizer": 4}, seeds=3).never_stopped(),
        stopped().assign(regularization="elastic", activation=stopped()["activation"].replace("relu", "leaky_relu_2")),
    ],
    ids=["stopped", "diverged", "never stopped", "long names"],
)
def test_the_text_is_at_most_80_columns_wide(trials: pd.DataFrame) -> None:
    for text in (
        format_final_effects(measure_final_effects(trials, classes=47)),
        format_rung_effects(measure_rung_effects(trials)),
    ):
        assert max(map(len, text.splitlines())) <= 80


def test_the_text_has_the_largest_difference_of_each_factor_and_every_level() -> None:
    effects = measure_final_effects(stopped())
    text = words(format_final_effects(effects))
    assert text.startswith(
        f"validation accuracy at the end (9 epochs), mean {effects.grand_mean:.2%} from all 96 trial"
    )
    for row in effects.differences.drop_duplicates("factor").to_dict("records"):
        start = f"{row['factor']} {row['level']} over {row['other_level']} {100 * row['difference']:.2f} "
        assert f"{start}{100 * row['low']:+.2f} to {100 * row['high']:+.2f} " in text
    for row in effects.levels.to_dict("records"):
        assert f"{row['factor']}={row['level']} {row['trials']} {row['mean']:.2%} {100 * row['effect']:+.2f}" in text


def test_the_text_says_what_is_sure_and_bounds_what_is_not() -> None:
    effects = measure_final_effects(stopped())
    lines = {line.split()[0]: line for line in difference_lines(format_final_effects(effects))}
    largest = effects.differences.drop_duplicates("factor").set_index("factor")
    assert set(largest["sure"]) == {True, False}
    for factor, row in largest.iterrows():
        bound = 100 * effects.differences.query("factor == @factor")["high"].max()
        assert lines[str(factor)].endswith("sure" if row["sure"] else f"at most {bound:.2f}")


def test_sure_factors_come_first_the_largest_difference_above_the_others() -> None:
    effects = measure_final_effects(stopped())
    lines = [line.split() for line in difference_lines(format_final_effects(effects))]
    ranks = [(line[-1] != "sure", -float(line[4])) for line in lines]
    assert ranks == sorted(ranks)


def test_the_text_says_what_the_effects_rest_on() -> None:
    effects = measure_final_effects(stopped())
    text = words(format_final_effects(effects))
    assert f"{effects.seen} seen at the end, among them 30 unstopped controls that ASHA would have stopped" in text
    assert f"{effects.stopped} were stopped, and their ends are estimated" in text
    never = words(format_final_effects(measure_final_effects(make_grid().never_stopped())))
    assert "from 96 trials, none of them stopped" in never


def test_pairs_that_stand_out_are_named_the_strongest_first() -> None:
    grid = make_grid(seeds=2, noise=0.01)
    pair = (grid.cells["activation"] == "elu") & (grid.cells["optimizer"] == "adam")
    planted = replace(grid, final=grid.final + 0.08 * pair.to_numpy())
    text = format_final_effects(measure_final_effects(planted.never_stopped()))
    lines = text.split("pairs that stand out")[1].splitlines()
    assert lines[1].startswith("activation=elu, optimizer=adam ")
    assert 3 < float(lines[1].split()[2]) < 6


def test_that_no_pair_stands_out_is_a_result() -> None:
    effects = measure_final_effects(stopped())
    plain = replace(effects, interactions=effects.interactions.assign(stands_out=False))
    assert f"\nof {len(effects.interactions)} pairs of levels none stands out\n" in format_final_effects(plain)


def test_the_text_of_a_rung_has_every_level_and_the_largest_terms() -> None:
    trials = diverged(stopped(40, dict.fromkeys(FACTORS, 2)), slice(3, 3))
    effects = measure_rung_effects(trials)
    text = format_rung_effects(effects)
    assert all(f"\n{row.factor}={row.level} " in text for row in effects.levels.itertuples())
    assert [line.split("  ")[0] in text for line in effects.variance["term"][:7]] == [True] * 7
    assert "\n15 more interactions " in text


def test_the_table_has_levels_differences_and_pairs() -> None:
    effects = measure_final_effects(stopped())
    table = tabulate(effects)
    assert list(table) == CSV_COLUMNS == ["factor", "level", "other_factor", "other_level", "effect", "low", "high"]
    assert len(table) == len(effects.levels) + len(effects.differences) + len(effects.interactions)
    levels = table[table["other_factor"].isna()]
    assert levels["effect"].tolist() == effects.levels["effect"].tolist()
    same = table[table["other_factor"] == table["factor"]]
    assert same["effect"].tolist() == effects.differences["difference"].tolist()
    assert same["other_level"].tolist() == effects.differences["other_level"].tolist()
    crossed = table[table["other_factor"].notna() & (table["other_factor"] != table["factor"])]
    assert crossed["high"].tolist() == effects.interactions["high"].tolist()


def test_the_table_of_a_rung_has_no_differences() -> None:
    effects = measure_rung_effects(stopped())
    table = tabulate(effects)
    assert list(table) == CSV_COLUMNS
    assert (table["factor"] != table["other_factor"]).all()
    assert len(table) == len(effects.levels) + len(effects.interactions)


def test_json_has_the_same_numbers() -> None:
    experiment = Experiment("sqlite://", "mine", "", stopped(), pd.DataFrame(), {}, ("1 run left out: deleted",))
    effects = measure_final_effects(experiment.trials)
    found = json.loads(json.dumps(describe(effects, experiment), allow_nan=False))
    assert (found["experiment"], found["epoch"], found["at_the_end"]) == ("mine", 9, True)
    assert found["notes"] == [*effects.notes, "1 run left out: deleted"]
    again = pd.DataFrame(found["effects"])[CSV_COLUMNS]
    pd.testing.assert_frame_equal(again, tabulate(effects), check_dtype=False)


def fill(store: Store, folder: Path) -> None:
    """Record two optimizers with two seeds, whose order after the first epoch is not that at the end."""
    recorder = Recorder(store, Spool(folder / "spool.jsonl"))
    recorder.begin({}, {})
    for seed, (optimizer, accuracies) in product((0, 1), (("sgd", (0.2, 0.7)), ("adam", (0.4, 0.5)))):
        config = TrialConfig(optimizer=optimizer, seed=seed, learning_rate=1e-3, epochs=2)
        recorder.started(config, control=False)
        for epoch, accuracy in enumerate(accuracies, start=1):
            recorder.epoch_ended(config, EpochReport(epoch=epoch, val_accuracy=accuracy), is_rung=epoch == 1)
        recorder.ended(config, "completed", epochs_run=2, best_val_accuracy=max(accuracies))
    assert recorder.close(finished=True)


def test_the_command_answers_for_the_end_and_with_an_epoch_for_a_rung(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, tmp_path)
    where = ["--experiment", "some grid", "--store", store.uri]
    assert main(where) == 0
    assert "optimizer sgd over adam 20.00 +20.00 to +20.00 sure" in words(capsys.readouterr().out)
    assert main([*where, "--epoch", "2"]) == 0
    assert "sgd over adam" in words(capsys.readouterr().out)
    for rung in ("1", "first"):
        assert main([*where, "--epoch", rung]) == 0
        assert "optimizer=adam 2 40.00% +10.00 +10.00 to +10.00" in words(capsys.readouterr().out)
    assert main([*where, "--epoch", "3"]) == 2
    assert capsys.readouterr().err == "analysis.effects: epoch 3 is not a rung; choose from 1\n"
    with pytest.raises(SystemExit):
        main([*where, "--epoch", "last"])
    assert "--epoch: takes the epoch of a rung, or first, got 'last'; see --help\n" in capsys.readouterr().err


def test_the_command_writes_a_table_a_picture_and_json(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, tmp_path)
    where = ["--experiment", "some grid", "--store", store.uri]
    assert main([*where, "--csv", str(tmp_path / "x.csv"), "--svg", str(tmp_path / "x.svg"), "--json"]) == 0
    table = pd.read_csv(tmp_path / "x.csv")
    assert list(table) == CSV_COLUMNS
    assert table["effect"].tolist() == pytest.approx([0.1, -0.1, 0.2])
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    printed = json.loads(capsys.readouterr().out)
    assert [row["effect"] for row in printed["effects"]] == pytest.approx(table["effect"])
    assert printed["grand_mean"] == pytest.approx(0.6)


def test_the_text_of_a_finished_experiment_is_narrow(finished_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in ([], ["--epoch", "1"]):
        assert main(["--experiment", "finished", "--store", finished_store.uri, *epoch]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_effects_that_are_unknown_are_one_line(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(store, Spool(tmp_path / "spool.jsonl"))
    recorder.begin({}, {})
    for number, (optimizer, seed) in enumerate(product(("sgd", "adam"), range(4))):
        config = TrialConfig(optimizer=optimizer, seed=seed, learning_rate=1e-3, epochs=9)
        recorder.started(config, control=False)
        recorder.epoch_ended(config, EpochReport(epoch=1, val_accuracy=0.5 + number / 100), is_rung=True, stopped=True)
        recorder.ended(config, "stopped", epochs_run=1, best_val_accuracy=0.5)
    assert recorder.close(finished=True)
    assert main(["--experiment", "some grid", "--store", store.uri]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("analysis.effects: effects at the end are unknown: it was seen of 0 unstopped controls")


def test_a_missing_store_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.effects: can't open the store")
    assert list(tmp_path.iterdir()) == []


def test_the_store_holds_what_the_effects_need(finished_store: Store) -> None:
    trials = read_experiment(finished_store.uri, "finished").trials
    effects = measure_final_effects(trials)
    assert (effects.factors, effects.epochs) == (("model", "activation", "optimizer", "batch_norm"), 9)
    assert effects.probed == (trials["control"] & trials["stop_epoch"].notna() & trials["status"].eq("completed")).sum()
