import math
from base64 import b64encode
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.estimates.cells import rank_cells
from analysis.rank import format_ranking, main
from analysis.store import Experiment
from grid.config import FACTORS
from grid.parts import LEVELS

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}


def trial(accuracy: float, status: str = "completed", epochs_run: int = 9, **changes: object) -> dict[str, object]:
    """Return a trial that ended with an accuracy after better epochs, as a row of the store."""
    row = {
        **CELL,
        "seed": 0,
        "lr_scale": 1.0,
        "status": status,
        "epochs": 9,
        "epochs_run": epochs_run,
        "stop_epoch": epochs_run if status == "stopped" else np.nan,
        "best_val_accuracy": (1 + accuracy) / 2,
        "final_val_accuracy": accuracy if status == "completed" else np.nan,
        "val_correct": "",
        "val_accuracy_at_1": accuracy / 2,
        "val_accuracy_at_3": accuracy / 1.5 if epochs_run >= 3 else np.nan,
    }
    return row | changes


def finalists(accuracies: dict[str, list[float]], test_accuracy: float = np.nan, **changes: object) -> pd.DataFrame:
    tests = {"test_accuracy": test_accuracy, "test_accuracy_as_validated": test_accuracy, "test_images": 400.0}
    return pd.DataFrame(
        trial(accuracy, activation=activation, seed=seed, **tests | changes)
        for activation, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
    )


def experiment(trials: list[dict[str, object]], val_images: int | None = None, **tables: pd.DataFrame) -> Experiment:
    manifest = {"data": {"val_images": val_images}} if val_images else {}
    confirmed = tables.get("finalists", pd.DataFrame())
    return Experiment("sqlite://", "some grid", "", pd.DataFrame(trials), confirmed, manifest, ("a note",))


def text_of(found: Experiment, top: int = 10) -> str:
    return format_ranking(rank_cells(found.trials, found.finalists, val_images=found.val_images), found, top)


def test_a_cell_is_the_mean_of_its_seeds_with_their_spread() -> None:
    (cell,) = rank_cells(pd.DataFrame([trial(0.7, seed=0), trial(0.8, seed=1)])).to_dict("records")
    assert (cell["val_accuracy"], cell["seeds"], cell["tier"]) == (pytest.approx(0.75), 2, "completed")
    assert cell["spread"] == pytest.approx(np.std([0.7, 0.8], ddof=1))


def test_the_weights_at_the_end_are_ranked_not_the_best_epoch() -> None:
    cells = rank_cells(pd.DataFrame([trial(0.7, best_val_accuracy=0.9), trial(0.8, activation="gelu")]))
    assert list(cells["activation"]) == ["gelu", "relu"]
    assert list(cells["val_accuracy"]) == [0.8, 0.7]


def test_replicates_that_ended_otherwise_are_counted() -> None:
    ends = [trial(0.7), trial(0.8, seed=1), trial(0.4, "stopped", 1, seed=2), trial(np.nan, "diverged", 2, seed=3)]
    (cell,) = rank_cells(pd.DataFrame(ends)).to_dict("records")
    assert (cell["seeds"], cell["stopped"], cell["diverged"], cell["epochs_run"]) == (2, 1, 1, 9)
    assert cell["val_accuracy"] == pytest.approx(0.75)


def right(*wrong: int, images: int = 100) -> str:
    """Return what a store has of a net that got all images but some right."""
    return b64encode(np.packbits(~np.isin(np.arange(images), wrong)).tobytes()).decode()


def compared(first: list[str], second: list[str], val_images: int | None = 100) -> dict[str, float]:
    """Return how far the second of two finalists, of 90% and 88%, is behind the first."""
    table = finalists({"relu": [0.90, 0.90, 0.90], "gelu": [0.87, 0.88, 0.89]}).assign(val_correct=[*first, *second])
    cells = rank_cells(pd.DataFrame([trial(0.9)]), table, val_images=val_images)
    assert cells.loc[cells["activation"] == "relu", "behind"].isna().all()
    return (
        cells.loc[cells["activation"] == "gelu", ["behind", "behind_seed_half", "behind_image_half"]].iloc[0].to_dict()
    )


def test_finalists_are_compared_on_the_same_seeds_and_the_same_images() -> None:
    shared, more = [*range(10)], [*range(10), 50, 51]
    found = compared([right(*shared)] * 3, [right(*more, 52), right(*more), right(*more[:-1])])
    apart = np.zeros(100)
    apart[[50, 51, 52]] = 1, 2 / 3, 1 / 3
    assert found["behind"] == pytest.approx(apart.mean())
    assert found["behind_image_half"] == pytest.approx(1.96 * apart.std(ddof=1) / 10, rel=1e-4)
    paired_error = np.std([0.03, 0.02, 0.01], ddof=1) / math.sqrt(3)
    assert found["behind_seed_half"] == pytest.approx(stats.t.ppf(0.975, 2) * paired_error)


def test_with_one_seed_other_images_change_a_difference_as_mcnemar_has_it() -> None:
    first, second = set(range(10)), {*range(8), 20, 21, 22, 23}
    table = finalists({"relu": [0.90], "gelu": [0.88]}).assign(val_correct=[right(*first), right(*second)])
    cells = rank_cells(pd.DataFrame([trial(0.9)]), table, val_images=100)
    only_first, only_second = len(second - first), len(first - second)
    variance = (only_first + only_second - (only_first - only_second) ** 2 / 100) / 99
    assert cells["behind_image_half"].dropna().tolist() == [pytest.approx(1.96 * math.sqrt(variance) / 10, rel=1e-4)]


def test_equal_images_right_leave_nothing_to_other_images() -> None:
    assert compared([right(1, 2)] * 3, [right(1, 2)] * 3)["behind_image_half"] == 0


@pytest.mark.parametrize("strange", ["", "not base64!", right(images=50), "é"])
def test_without_knowing_which_images_were_right_only_seeds_are_compared(strange: str) -> None:
    found = compared([right()] * 3, [right(), right(), strange])
    assert math.isnan(found["behind_image_half"])
    assert found["behind_seed_half"] > 0
    assert math.isnan(compared([right()] * 3, [right()] * 3, val_images=None)["behind_image_half"])


def test_the_text_says_how_far_finalists_are_behind_on_the_same_images() -> None:
    table = finalists({"relu": [0.90, 0.90, 0.90], "gelu": [0.87, 0.88, 0.89]})
    table["val_correct"] = [right(*range(10))] * 3 + [right(*range(number)) for number in (13, 12, 11)]
    lines = text_of(experiment([trial(0.9)], 100, finalists=table)).splitlines()
    place = lines.index("behind the first, on the same seeds and images")
    assert lines[place + 1 : place + 3] == ["rank points +- seed +- images", "   2   2.00    2.48      2.43"]


def test_finalists_come_first_and_are_not_repeated() -> None:
    trials = pd.DataFrame([trial(0.9), trial(0.8, activation="gelu"), trial(0.5, "stopped", 1, activation="elu")])
    cells = rank_cells(trials, finalists({"gelu": [0.7, 0.72]}, test_accuracy=0.65))
    assert list(zip(cells["rank"], cells["activation"], cells["tier"], strict=True)) == [
        (1, "gelu", "finalist"),
        (2, "relu", "completed"),
        (3, "elu", "stopped"),
    ]
    assert list(cells["test_accuracy"].dropna()) == [0.65]


def test_finalists_are_tied_among_themselves_and_cells_with_the_best_of_the_grid() -> None:
    names = ("gelu", "elu", "relu", "tanh")
    trials = [trial(accuracy, activation=name) for name, accuracy in zip(names, (0.8, 0.79, 0.785, 0.5), strict=True)]
    confirmed = finalists({"gelu": [0.70, 0.71, 0.72], "elu": [0.60, 0.62, 0.61]})
    cells = rank_cells(pd.DataFrame(trials), confirmed, val_images=1600).set_index("activation")
    assert dict(cells["tied"]) == {"gelu": True, "elu": False, "relu": True, "tanh": False}
    assert cells["tied"].dtype == bool


def test_cells_of_different_epochs_are_never_tied() -> None:
    trials = [trial(0.8), trial(0.8, "stopped", 3, activation="gelu"), trial(0.8, "stopped", 1, activation="elu")]
    cells = rank_cells(pd.DataFrame(trials), val_images=100)
    assert list(cells["epochs_run"]) == [9, 3, 1]
    assert list(cells["tied"]) == [True, False, False]


def test_finalists_are_ordered_by_validation_accuracy_not_by_test_accuracy() -> None:
    confirmed = finalists({"gelu": [0.7, 0.7], "relu": [0.6, 0.6]})
    confirmed["test_accuracy"] = [0.1, 0.1, 0.9, 0.9]
    assert list(rank_cells(pd.DataFrame([trial(0.5)]), confirmed)["activation"][:2]) == ["gelu", "relu"]


def test_a_single_seed_has_an_interval_for_other_images_only() -> None:
    (cell,) = rank_cells(pd.DataFrame([trial(0.8)]), val_images=1600).to_dict("records")
    assert cell["image_half"] == pytest.approx(stats.norm.ppf(0.975) * 0.01)
    assert np.isnan(cell["seed_half"])
    assert (cell["low"], cell["high"]) == pytest.approx((0.8 - cell["image_half"], 0.8 + cell["image_half"]))


def test_the_interval_for_another_seed_is_students_with_a_spread_pooled_over_the_cells() -> None:
    trials = [trial(0.5 + 0.01 * seed, seed=seed) for seed in (-1, 0, 1)] + [trial(0.6, activation="gelu")]
    cells = rank_cells(pd.DataFrame(trials)).set_index("activation")
    assert cells["seed_half"]["gelu"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.01)
    assert cells["seed_half"]["relu"] == pytest.approx(cells["seed_half"]["gelu"] / np.sqrt(3))
    assert cells["image_half"].isna().all()
    assert list(cells["high"] - cells["val_accuracy"]) == pytest.approx(list(cells["seed_half"]))


def test_both_sources_of_error_add_up_as_variances() -> None:
    trials = [trial(0.8 + 0.01 * seed, seed=seed) for seed in (-1, 0, 1)]
    (cell,) = rank_cells(pd.DataFrame(trials), val_images=1600).to_dict("records")
    assert (cell["high"] - cell["low"]) / 2 == pytest.approx(math.hypot(cell["seed_half"], cell["image_half"]))


@pytest.mark.parametrize(("seeds", "seed_sd"), [(2, 0.01), (5, 0.003)])
def test_the_interval_covers_the_accuracy_over_all_seeds_and_images(seeds: int, seed_sd: float) -> None:
    """Of one cell among eight, on 1600 images that are drawn again with every grid."""
    rng, covered = np.random.default_rng(0), []
    names = list(LEVELS["activation"])[:4]
    for _ in range(150):
        luck = rng.normal(0, seed_sd, (4, seeds)) + rng.normal(0, 0.01, 4)[:, None]  # sqrt(0.8 * 0.2 / 1600)
        trials = [
            trial(0.8 + luck[i, j], activation=name, seed=j) for i, name in enumerate(names) for j in range(seeds)
        ]
        cell = rank_cells(pd.DataFrame(trials), val_images=1600).set_index("activation").loc[names[0]]
        covered.append(cell["low"] < 0.8 < cell["high"])
    assert np.mean(covered) >= 0.95 - 2 * 0.018


def test_the_test_accuracy_has_both_intervals() -> None:
    confirmed = finalists({"gelu": [0.7, 0.7, 0.7]}, test_accuracy=0.8)
    confirmed["test_accuracy_as_validated"] = [0.79, 0.80, 0.81]
    cell = rank_cells(pd.DataFrame([trial(0.9)]), confirmed).iloc[0]
    assert (cell["test_accuracy_as_validated"], cell["test_accuracy"]) == pytest.approx((0.8, 0.8))
    assert cell["test_seed_half"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3))
    assert cell["test_image_half"] == pytest.approx(stats.norm.ppf(0.975) * 0.02)


def test_beside_validation_stands_the_test_accuracy_with_the_same_weights() -> None:
    confirmed = finalists({"gelu": [0.7, 0.72]}, test_accuracy=0.9, test_accuracy_as_validated=0.654)
    text = text_of(experiment([trial(0.8)], finalists=confirmed))
    assert "65.40%" in next(line for line in text.splitlines() if "gelu" in line)
    assert "90.00%" not in text
    assert "test: each class weighted by its share of the validation images" in text


def test_a_table_with_one_seed_per_cell_has_at_most_80_columns() -> None:
    found = experiment([trial(0.5, batch_norm="on", dropout="on", regularization="l2")], 4465)
    assert max(map(len, text_of(found).splitlines())) <= 80


def test_the_table_names_both_intervals_and_shows_ties_and_seeds() -> None:
    trials = [trial(0.8 + 0.01 * seed, seed=seed) for seed in (-1, 0, 1)] + [trial(0.3, activation="gelu")]
    _, header, first, second, *_ = text_of(experiment(trials, 1600)).splitlines()
    assert header == "rank tie val acc +- seed +- images seeds epochs  cell"
    assert first == "   1 yes  80.00%    2.48      1.96     3    9/9  mlp constant relu sgd"
    assert second == "   2      30.00%    4.30      2.25     1    9/9  mlp constant gelu sgd"


def test_the_table_counts_replicates_that_ended_otherwise() -> None:
    ends = [trial(0.7), trial(0.8, seed=1), trial(0.4, "stopped", 1, seed=2), trial(np.nan, "diverged", 2, seed=3)]
    row = text_of(experiment(ends)).splitlines()[2]
    assert " 2/4 " in row
    assert row.endswith("mlp constant relu sgd (1 diverged)")


def test_a_control_that_counts_as_stopped_is_marked_and_its_end_told() -> None:
    control = trial(0.9, stop_epoch=1, val_accuracy_at_1=0.4, activation="gelu")
    really_stopped = trial(0.9, "stopped", 1, val_accuracy_at_1=0.5)
    lines = text_of(experiment([control, really_stopped])).splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["50.00%", "40.00%*"]
    assert lines[3].split()[2] == "1/9"
    assert "ended so: rank 2 90.00%" in " ".join(lines)


def test_diverged_trials_are_counted_but_not_ranked() -> None:
    text = text_of(experiment([trial(0.9, "diverged", 3), trial(0.5, activation="gelu")]))
    assert "1 of 1 cell shown; 2 trials: 1 completed, 1 diverged" in text
    assert "relu" not in text


def test_a_grid_whose_trials_all_diverged_says_what_to_do() -> None:
    text = text_of(experiment([trial(float("nan"), "diverged", 1)]))
    assert "no trial has an accuracy: all diverged or failed" in text


def test_single_seeds_are_shown_with_what_their_ties_leave_out() -> None:
    text = text_of(experiment([trial(0.8), trial(0.8, activation="gelu")], 1600))
    assert "one seed per cell: how another would differ is unknown" in text
    assert [line.split()[1] for line in text.splitlines()[2:4]] == ["yes", "yes"]


def test_without_a_count_of_images_ties_of_single_seeds_are_unknown() -> None:
    found = experiment([trial(0.8), trial(0.3, activation="gelu")])
    assert "ties are unknown" in text_of(found)
    assert "yes" not in text_of(found)
    assert rank_cells(found.trials)["low"].isna().all()


def test_the_best_cells_of_each_model_are_shown() -> None:
    text = text_of(experiment([trial(0.8), trial(0.7, model="cnn")]))
    assert [line for line in text.splitlines() if line.startswith("best ")] == ["best mlp", "best cnn"]


def test_notes_of_the_store_come_last() -> None:
    assert text_of(experiment([trial(0.8)])).endswith("a note")


def test_a_missing_store_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.rank: can't open the store")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_top_is_reported_in_one_line_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--experiment", "x", "--top", "0"])
    assert capsys.readouterr().err == "analysis.rank: argument --top: must be 1 or more, got 0; see --help\n"


def test_the_balanced_accuracy_is_of_the_ranked_scale_and_seeds_at_the_end_alone() -> None:
    trials = [
        trial(0.9, val_balanced_accuracy=0.88, seed=0),
        trial(0.8, val_balanced_accuracy=0.78, seed=1),
        trial(0.3, val_balanced_accuracy=0.20, lr_scale=3.0),
        trial(0.8, "completed", 9, stop_epoch=1.0, control=True, val_balanced_accuracy=0.79, activation="gelu"),
        trial(0.4, "stopped", 1, activation="elu"),
    ]
    cells = rank_cells(pd.DataFrame(trials)).set_index("activation")["val_balanced_accuracy"]
    assert cells["relu"] == pytest.approx(0.83)
    assert cells[["gelu", "elu"]].isna().all()  # that control counts as stopped after epoch 1


def test_where_classes_differ_in_size_both_accuracies_are_shown() -> None:
    confirmed = finalists({"relu": [0.9, 0.92]}, 0.91, val_balanced_accuracy=0.8, test_balanced_accuracy=0.7)
    text = text_of(experiment([trial(0.9, val_balanced_accuracy=0.75)], finalists=confirmed))
    assert "balanced" in text
    assert "80.00%" in text
    assert "70.00%" in text
    assert "balanced: mean over the classes, which differ in size" in text
    plain = text_of(experiment([trial(0.9)], finalists=finalists({"relu": [0.9]}, 0.91, test_balanced_accuracy=0.91)))
    assert "balanced" not in plain
