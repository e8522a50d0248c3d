from itertools import islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.rank import bootstrap_interval, format_ranking, main, rank_cells
from analysis.store import Experiment
from grid.config import FACTORS, LEVELS

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}


def trial(accuracy: float, status: str = "completed", epochs_run: int = 9, **changes: object) -> dict[str, object]:
    row = {
        **CELL,
        "seed": 0,
        "lr_scale": 1.0,
        "status": status,
        "epochs": 9,
        "epochs_run": epochs_run,
        "best_val_accuracy": accuracy,
        "val_accuracy_at_1": accuracy / 2,
        "val_accuracy_at_3": accuracy / 1.5,
    }
    return row | changes


def finalists(accuracies: dict[str, list[float]], test_accuracy: float = float("nan")) -> pd.DataFrame:
    return pd.DataFrame(
        trial(accuracy, activation=activation, seed=seed, test_accuracy=test_accuracy)
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


def test_finalists_come_first_and_are_not_repeated() -> None:
    trials = pd.DataFrame([trial(0.9), trial(0.8, activation="gelu"), trial(0.5, "stopped", 1, activation="elu")])
    cells = rank_cells(trials, finalists({"gelu": [0.7, 0.72]}, test_accuracy=0.65))
    assert list(zip(cells["activation"], cells["tier"], strict=True)) == [
        ("gelu", "finalist"),
        ("relu", "completed"),
        ("elu", "stopped"),
    ]
    assert list(cells["test_accuracy"].dropna()) == [0.65]


def test_the_interval_of_a_finalist_is_the_bootstrap_interval_of_its_seeds() -> None:
    cells = rank_cells(pd.DataFrame([trial(0.9)]), finalists({"gelu": [0.70, 0.72, 0.74]}))
    assert (cells["low"][0], cells["high"][0]) == bootstrap_interval([0.70, 0.72, 0.74])
    assert cells["low"][0] < 0.72 < cells["high"][0]


def test_finalists_whose_paired_difference_is_within_the_noise_share_a_group() -> None:
    base = np.array([0.70, 0.80, 0.75, 0.72, 0.78])
    noise = np.array([0.010, -0.012, 0.008, -0.009, 0.004])
    accuracies = {"gelu": base, "relu": base - 0.02, "elu": base - 0.02 + noise, "tanh": base - 0.06}
    cells = rank_cells(
        pd.DataFrame([trial(0.9)]), finalists({name: list(values) for name, values in accuracies.items()})
    )
    groups = dict(zip(cells["activation"], cells["group"], strict=True))
    assert groups == {"gelu": 1, "relu": 2, "elu": 2, "tanh": 3}


def test_finalists_are_ordered_by_validation_accuracy_not_by_test_accuracy() -> None:
    confirmed = finalists({"gelu": [0.7, 0.7], "relu": [0.6, 0.6]})
    confirmed["test_accuracy"] = [0.1, 0.1, 0.9, 0.9]
    assert list(rank_cells(pd.DataFrame([trial(0.5)]), confirmed)["activation"][:2]) == ["gelu", "relu"]


def test_a_single_seed_has_the_standard_error_of_a_share_of_images() -> None:
    (cell,) = rank_cells(pd.DataFrame([trial(0.8)]), val_images=1600).to_dict("records")
    assert cell["high"] - cell["low"] == pytest.approx(2 * stats.norm.ppf(0.975) * 0.01)


def test_cells_within_the_error_of_the_best_are_tied_with_it() -> None:
    trials = [
        trial(0.8, activation=name) | {"best_val_accuracy": 0.8 - step}
        for name, step in zip(("relu", "elu", "gelu"), (0, 0.02, 0.05), strict=True)
    ]
    assert list(rank_cells(pd.DataFrame(trials), val_images=1600)["group"]) == [1, 1, 2]


def test_cells_of_different_epochs_are_never_tied() -> None:
    trials = [trial(0.8), trial(0.8, "stopped", 3, activation="gelu"), trial(0.8, "stopped", 1, activation="elu")]
    cells = rank_cells(pd.DataFrame(trials), val_images=100)
    assert list(cells["epochs_run"]) == [9, 3, 1]
    assert list(cells["group"]) == [1, 1, 1]


def test_the_spread_between_seeds_is_pooled_over_the_cells() -> None:
    trials = [trial(0.5 + 0.01 * seed, seed=seed) for seed in (-1, 0, 1)] + [trial(0.6, activation="gelu")]
    cells = rank_cells(pd.DataFrame(trials), val_images=100).set_index("activation")
    half = (cells["high"] - cells["low"]) / 2
    assert half["gelu"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.01)
    assert half["relu"] == pytest.approx(half["gelu"] / np.sqrt(3))


def test_without_a_count_of_images_ties_are_unknown() -> None:
    assert rank_cells(pd.DataFrame([trial(0.8), trial(0.8, activation="gelu")]))["group"].isna().all()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_bootstrap_of_few_normal_values_covers_their_mean(count: int) -> None:
    draws = np.random.default_rng(0).normal(size=(300, count))
    covered = np.mean([low < 0 < high for low, high in map(bootstrap_interval, draws)])
    assert 0.92 <= covered <= 0.985


def equal_cells(count: int, seeds: int, rng: np.random.Generator) -> pd.DataFrame:
    named = ("lr_schedule", "activation", "optimizer", "regularization")
    crossed = islice(product(*(LEVELS[factor] for factor in named)), count)
    return pd.DataFrame(
        trial(rng.normal(0.8, 0.005), seed=seed, **dict(zip(named, cell, strict=True)))
        for cell in crossed
        for seed in range(seeds)
    )


@pytest.mark.parametrize(("count", "seeds"), [(6, 2), (40, 2), (100, 1)])
def test_equal_cells_are_usually_tied(count: int, seeds: int) -> None:
    rng = np.random.default_rng(0)
    images = 6400  # 0.8 of them have a standard error of 0.005
    split = [rank_cells(equal_cells(count, seeds, rng), val_images=images)["group"].max() > 1 for _ in range(25)]
    assert sum(split) <= 4


@pytest.mark.parametrize("seeds", [2, 5])
def test_equal_finalists_are_usually_tied(seeds: int) -> None:
    rng, unranked = np.random.default_rng(0), pd.DataFrame([trial(0.5, "diverged")])
    split = [
        rank_cells(unranked, equal_cells(6, seeds, rng).assign(test_accuracy=0.8))["group"].max() > 1 for _ in range(40)
    ]
    assert sum(split) <= 5


def test_one_value_has_no_interval_and_equal_values_have_an_empty_one() -> None:
    assert np.isnan(bootstrap_interval([0.5])).all()
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_a_table_of_usual_cells_has_at_most_80_columns() -> None:
    found = experiment([trial(0.5, batch_norm="on", dropout="on", regularization="l2")], 4465)
    assert max(map(len, text_of(found).splitlines())) <= 80


def test_diverged_trials_are_counted_but_not_ranked() -> None:
    text = text_of(experiment([trial(0.9, "diverged", 3), trial(0.5, activation="gelu")]))
    assert "1 of 1 cell shown; 2 trials: 1 completed, 1 diverged" in text
    assert "relu" not in text


def test_a_grid_whose_trials_all_diverged_says_what_to_do() -> None:
    text = text_of(experiment([trial(float("nan"), "diverged", 1)]))
    assert "no trial has an accuracy: all diverged or failed" in text


def test_a_single_seed_is_shown_with_its_sampling_error() -> None:
    text = text_of(experiment([trial(0.8), trial(0.8, activation="gelu")], 1600))
    assert "one seed per cell: the best 2 are tied (a)" in text
    assert "1,600 images (standard error 1.00 points)" in text


def test_the_best_cells_of_each_model_are_shown() -> None:
    text = text_of(experiment([trial(0.8), trial(0.7, model="cnn")]))
    assert [line for line in text.splitlines() if line.startswith("best ")] == ["best mlp", "best cnn"]


def test_notes_of_the_store_come_last() -> None:
    assert text_of(experiment([trial(0.8)])).endswith("a note")


def test_finalists_are_shown_with_their_test_accuracy() -> None:
    text = text_of(experiment([trial(0.8)], finalists=finalists({"gelu": [0.7, 0.72]}, test_accuracy=0.654)))
    assert "65.40%" in next(line for line in text.splitlines() if "gelu" in line)


@pytest.mark.parametrize(("group", "letters"), [(1, "a"), (26, "z"), (27, "aa"), (53, "ba")])
def test_groups_are_shown_as_letters(group: int, letters: str) -> None:
    cells = rank_cells(pd.DataFrame([trial(0.5)])).assign(group=float(group))
    assert format_ranking(cells, experiment([trial(0.5)]), 1).splitlines()[2].split()[1] == letters


def test_a_missing_store_is_reported_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.rank: can't open the store")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_top_is_reported_in_one_line_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--experiment", "x", "--top", "0"]) == 2
    assert capsys.readouterr().err == "analysis.rank: --top must be 1 or more, got 0\n"
