import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.config import FACTORS, LEVELS, InputError
from grid.metrics import RANKED_STATUSES, STATUSES
from grid.ranking import RankedCell, TrialSummary, rank_cells

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}


def summary(accuracy: float | None, status: str = "completed", epochs_run: int = 9, **changes: object) -> TrialSummary:
    settings: dict[str, object] = {
        "cell": CELL | {name: str(changes.pop(name)) for name in list(changes) if name in FACTORS},
        "seed": 0,
        "lr_scale": 1.0,
        "epochs": 9,
        "rung_accuracies": {1: (accuracy or 0) / 2, 3: (accuracy or 0) / 1.5},
    }
    return TrialSummary(status=status, epochs_run=epochs_run, best_val_accuracy=accuracy, **(settings | changes))  # type: ignore[arg-type]


def rank(*summaries: TrialSummary) -> list[RankedCell]:
    return rank_cells(summaries)


example_summaries = st.lists(
    st.builds(
        summary,
        st.floats(0, 1),
        st.sampled_from(STATUSES),
        st.sampled_from([1, 3, 9]),
        activation=st.sampled_from(LEVELS["activation"]),
        seed=st.integers(0, 2),
        lr_scale=st.sampled_from([0.5, 1.0]),
    )
)


@given(example_summaries)
def test_no_cell_with_fewer_epochs_ranks_above_one_with_more(summaries: list[TrialSummary]) -> None:
    epochs = [cell.epochs_run for cell in rank_cells(summaries)]
    assert epochs == sorted(epochs, reverse=True)


@given(example_summaries)
def test_every_cell_with_an_accuracy_is_ranked_once(summaries: list[TrialSummary]) -> None:
    ranked = {summary.cell["activation"] for summary in summaries if summary.status in RANKED_STATUSES}
    assert sorted(cell.cell["activation"] for cell in rank_cells(summaries)) == sorted(ranked)


@given(example_summaries, st.randoms())
def test_the_order_of_arrival_does_not_matter(summaries: list[TrialSummary], random: object) -> None:
    shuffled = list(summaries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    as_pairs = [[(cell.cell, cell.mean) for cell in rank_cells(some)] for some in (summaries, shuffled)]
    assert as_pairs[0] == as_pairs[1]


def test_a_cell_is_the_mean_of_its_seeds() -> None:
    (cell,) = rank(summary(0.7, seed=0), summary(0.8, seed=1))
    assert cell.accuracies == {0: 0.7, 1: 0.8}
    assert cell.mean == pytest.approx(0.75)


def test_the_best_learning_rate_scale_counts_for_each_seed() -> None:
    (cell,) = rank(summary(0.7, lr_scale=1.0), summary(0.8, lr_scale=0.5))
    assert (cell.mean, cell.lr_scale, len(cell.accuracies)) == (0.8, 0.5, 1)


def test_a_longer_training_counts_more_than_a_lucky_short_one() -> None:
    (cell,) = rank(summary(0.9, "stopped", 1, lr_scale=1.0), summary(0.8, lr_scale=0.5))
    assert (cell.mean, cell.epochs_run) == (0.8, 9)


def test_a_cell_with_a_stopped_seed_ranks_below_one_without() -> None:
    cells = rank(summary(0.9, seed=0), summary(0.9, "stopped", 3, seed=1), summary(0.5, activation="gelu"))
    assert [cell.cell["activation"] for cell in cells] == ["gelu", "relu"]


def test_replicates_are_averaged_at_the_epoch_that_all_have_reached() -> None:
    (cell,) = rank(summary(0.9, seed=0, rung_accuracies={1: 0.3}), summary(0.5, "stopped", 1, seed=1))
    assert cell.epochs_run == 1
    assert cell.mean == pytest.approx((0.3 + 0.5) / 2)


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_trial_without_a_final_accuracy_has_no_rank(status: str) -> None:
    assert rank(summary(0.9, status)) == []
    assert rank(summary(None, status)) == []


def test_budgets_are_not_mixed() -> None:
    with pytest.raises(InputError, match="^trials of 3 and 9 epochs can't be ranked together$"):
        rank(summary(0.5), summary(0.6, epochs=3, epochs_run=3))
