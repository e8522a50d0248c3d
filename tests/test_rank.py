from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.rank import format_ranking, main, rank_cells
from grid.config import FACTORS, LEVELS, STATUSES, InputError

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


def rank(*rows: dict[str, object]) -> pd.DataFrame:
    return rank_cells(pd.DataFrame(rows))


rows = st.lists(
    st.builds(
        trial,
        st.floats(0, 1),
        st.sampled_from(STATUSES),
        st.sampled_from([1, 3, 9]),
        activation=st.sampled_from(LEVELS["activation"]),
        seed=st.integers(0, 2),
        lr_scale=st.sampled_from([0.5, 1.0]),
    ),
    min_size=1,
)


@given(rows)
def test_no_cell_with_fewer_epochs_ranks_above_one_with_more(some: list[dict[str, object]]) -> None:
    cells = rank(*some)
    assert cells["epochs_run"].is_monotonic_decreasing
    assert list(cells["rank"]) == list(range(1, len(cells) + 1))


@given(rows)
def test_every_cell_with_an_accuracy_is_ranked_once(some: list[dict[str, object]]) -> None:
    ranked = {row["activation"] for row in some if row["status"] in ("completed", "stopped")}
    assert sorted(rank(*some)["activation"]) == sorted(ranked)


def test_a_cell_is_the_mean_of_its_seeds() -> None:
    (cell,) = rank(trial(0.7, seed=0), trial(0.8, seed=1)).to_dict("records")
    assert (cell["val_accuracy"], cell["seeds"]) == (pytest.approx(0.75), 2)
    assert cell["spread"] == pytest.approx(0.0707, abs=1e-4)


def test_the_best_learning_rate_scale_counts_for_each_seed() -> None:
    (cell,) = rank(trial(0.7, lr_scale=1.0), trial(0.8, lr_scale=0.5)).to_dict("records")
    assert (cell["val_accuracy"], cell["seeds"]) == (0.8, 1)


def test_a_longer_training_counts_more_than_a_lucky_short_one() -> None:
    (cell,) = rank(trial(0.9, "stopped", 1, lr_scale=1.0), trial(0.8, lr_scale=0.5)).to_dict("records")
    assert (cell["val_accuracy"], cell["epochs_run"]) == (0.8, 9)


def test_a_cell_with_a_stopped_seed_ranks_below_one_without() -> None:
    cells = rank(trial(0.9, seed=0), trial(0.9, "stopped", 3, seed=1), trial(0.5, activation="gelu"))
    assert list(cells["activation"]) == ["gelu", "relu"]


def test_replicates_are_averaged_at_the_epoch_that_all_have_reached() -> None:
    (cell,) = rank(
        trial(0.9, seed=0, val_accuracy_at_1=0.3), trial(0.5, "stopped", 1, seed=1, val_accuracy_at_1=0.5)
    ).to_dict("records")
    assert (cell["epochs_run"], cell["seeds"], cell["val_accuracy"]) == (1, 2, pytest.approx(0.4))


def test_budgets_are_not_mixed() -> None:
    with pytest.raises(InputError, match="^trials of 3 and 9 epochs can't be ranked together$"):
        rank(trial(0.5), trial(0.6, epochs=3, epochs_run=3))


def test_the_usual_table_is_narrow() -> None:
    some = pd.DataFrame([trial(0.5, batch_norm="on", dropout="on", regularization="l2")])
    assert max(map(len, format_ranking(rank_cells(some), some, 10).splitlines()[:2])) <= 80


def test_a_diverged_cell_has_no_rank_but_is_counted() -> None:
    some = pd.DataFrame([trial(0.9, "diverged", 3), trial(0.5, activation="gelu")])
    text = format_ranking(rank_cells(some), some, 10)
    assert "1 of 1 cells shown; 2 trials: 1 completed, 1 diverged" in text
    assert "relu" not in text


def test_a_grid_that_all_diverged_says_what_to_do() -> None:
    some = pd.DataFrame([trial(float("nan"), "diverged", 1)])
    assert "no trial reached an accuracy: all diverged or failed" in format_ranking(rank_cells(some), some, 10)


def test_one_seed_is_said_to_tell_nothing_of_the_spread() -> None:
    some = pd.DataFrame([trial(0.5)])
    assert "one seed per cell: the spread between runs is unknown" in format_ranking(rank_cells(some), some, 10)


def test_a_store_that_is_not_there_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "x", "--store", f"sqlite:///{tmp_path}/no.db"]) == 2
    assert capsys.readouterr().err.startswith("analysis.rank: can't open the store")
    assert list(tmp_path.iterdir()) == []
