import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.config import FACTORS, InputError
from grid.metrics import STATUSES
from grid.parts import LEVELS
from grid.ranking import RankedCell, TrialSummary, rank_cells
from grid.wording import explain_spared

CELL = {factor: LEVELS[factor][0] for factor in FACTORS}


def summary(accuracy: float | None, status: str = "completed", epochs_run: int = 9, **changes: object) -> TrialSummary:
    """Return a trial that ended with an accuracy, after better epochs, and had other accuracies at its rungs."""
    rungs = {} if accuracy is None else {1: accuracy / 2, 3: accuracy / 1.5}
    settings: dict[str, object] = {
        "cell": CELL | {name: str(changes.pop(name)) for name in list(changes) if name in FACTORS},
        "seed": 0,
        "lr_scale": 1.0,
        "epochs": 9,
        "best_val_accuracy": accuracy and (1 + accuracy) / 2,
        "final_val_accuracy": accuracy if status == "completed" else None,
        "stop_epoch": epochs_run if status == "stopped" else None,
        "rung_accuracies": {epoch: value for epoch, value in rungs.items() if epoch <= epochs_run},
    }
    return TrialSummary(status=status, epochs_run=epochs_run, **(settings | changes))  # type: ignore[arg-type]


def stopped(accuracy: float, epoch: int = 1, **changes: object) -> TrialSummary:
    """Return a trial with an accuracy at the rung at which it was stopped, and at those before."""
    rungs = {rung: accuracy * rung / epoch for rung in (1, 3) if rung <= epoch}
    return summary(accuracy, "stopped", epoch, **({"rung_accuracies": rungs} | changes))


def spared(at_rung: float, end: float | None, **changes: object) -> TrialSummary:
    """Return a control that ASHA would have stopped after the first epoch."""
    status = "diverged" if end is None else "completed"
    known = {"rung_accuracies": {1: at_rung, 3: 0.99}, "final_val_accuracy": end, "stop_epoch": 1}
    return summary(0.99, status, 9 if end else 5, **(known | changes))


def rank(*summaries: TrialSummary) -> list[RankedCell]:
    return rank_cells(summaries)


def order(*summaries: TrialSummary) -> list[str]:
    return [cell.cell["activation"] for cell in rank(*summaries)]


example_ends = st.one_of(
    st.builds(summary, st.floats(0, 1), st.sampled_from(STATUSES)),
    st.builds(stopped, st.floats(0, 1), st.sampled_from([1, 3])),
    st.builds(spared, st.floats(0, 1), st.none() | st.floats(0, 1)),
)
example_keys = st.tuples(st.sampled_from(LEVELS["activation"]), st.integers(0, 2), st.sampled_from([0.5, 1.0]))


@st.composite
def example_summaries(draw: st.DrawFn) -> list[TrialSummary]:
    ends = draw(st.dictionaries(example_keys, example_ends))
    return [
        TrialSummary(
            **vars(end) | {"cell": CELL | {"activation": activation}, "seed": seed, "lr_scale": scale}  # type: ignore[arg-type]
        )
        for (activation, seed, scale), end in ends.items()
    ]


@given(example_summaries())
def test_no_cell_with_fewer_epochs_ranks_above_one_with_more(summaries: list[TrialSummary]) -> None:
    epochs = [cell.epochs_run for cell in rank_cells(summaries)]
    assert epochs == sorted(epochs, reverse=True)


@given(example_summaries())
def test_a_ranked_cell_has_an_accuracy_of_at_least_half_of_its_ended_replicates(summaries: list[TrialSummary]) -> None:
    ranked = {cell.cell["activation"]: cell for cell in rank_cells(summaries)}
    assert all(2 * len(cell.accuracies) >= len(cell.scores) + cell.stopped for cell in ranked.values())
    for activation in {summary.cell["activation"] for summary in summaries} - set(ranked):
        of_cell = [each for each in summaries if each.cell["activation"] == activation and each.status != "failed"]
        for scale in {each.lr_scale for each in of_cell}:
            replicates = [each for each in of_cell if each.lr_scale == scale]
            assert 2 * sum(each.diverged for each in replicates) > len(replicates)


@given(example_summaries(), st.randoms())
def test_the_order_of_arrival_does_not_matter(summaries: list[TrialSummary], random: object) -> None:
    shuffled = list(summaries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    as_pairs = [[(cell.cell, cell.mean, cell.lr_scale) for cell in rank_cells(some)] for some in (summaries, shuffled)]
    assert as_pairs[0] == as_pairs[1]


def test_a_cell_is_the_mean_of_its_seeds() -> None:
    (cell,) = rank(summary(0.7, seed=0), summary(0.8, seed=1))
    assert cell.accuracies == {0: 0.7, 1: 0.8}
    assert cell.mean == pytest.approx(0.75)


def test_the_end_is_ranked_not_the_best_epoch() -> None:
    lucky = summary(0.6, best_val_accuracy=0.9)
    assert order(lucky, summary(0.7, best_val_accuracy=0.7, activation="gelu")) == ["gelu", "relu"]


def test_at_a_rung_its_own_value_is_ranked_not_the_best_so_far() -> None:
    (cell,) = rank(summary(0.5, "stopped", 3, best_val_accuracy=0.9, rung_accuracies={1: 0.9, 3: 0.5}))
    assert cell.mean == 0.5


def test_a_scale_is_chosen_for_all_seeds_together() -> None:
    by_scale = {0.5: (0.9, 0.5), 1.0: (0.75, 0.75)}
    trials = [
        summary(value, seed=seed, lr_scale=scale) for scale in by_scale for seed, value in enumerate(by_scale[scale])
    ]
    (cell,) = rank(*trials)
    assert (cell.lr_scale, cell.mean, len(cell.accuracies)) == (1.0, 0.75, 2)


def test_a_longer_training_counts_more_than_a_lucky_short_one() -> None:
    (cell,) = rank(stopped(0.9, lr_scale=1.0), summary(0.8, lr_scale=0.5))
    assert (cell.mean, cell.epochs_run, cell.lr_scale) == (0.8, 9, 0.5)


def test_one_stopped_seed_of_three_does_not_bury_a_good_cell() -> None:
    good = [summary(0.90, seed=0), summary(0.91, seed=1), stopped(0.4, seed=2)]
    poor = [summary(0.5, seed=seed, activation="gelu") for seed in range(3)]
    assert order(*good, *poor) == ["relu", "gelu"]
    cell = rank(*good)[0]
    assert (cell.epochs_run, cell.mean, cell.stopped) == (9, pytest.approx(0.905), 1)


def test_a_cell_most_of_whose_seeds_diverged_is_below_one_with_a_stopped_seed() -> None:
    lucky = [summary(0.95, seed=0), *(summary(None, "diverged", 2, seed=seed) for seed in (1, 2))]
    good = [summary(0.90, seed=0), summary(0.91, seed=1), stopped(0.4, seed=2)]
    assert order(*lucky, *(TrialSummary(**vars(each) | {"cell": CELL | {"activation": "gelu"}}) for each in good)) == [
        "gelu"
    ]


def test_a_diverged_seed_counts_as_zero_in_the_order_and_not_in_the_mean() -> None:
    fragile = [summary(0.9, seed=0), summary(0.9, seed=1), summary(None, "diverged", 2, seed=2)]
    sound = [summary(0.7, seed=seed, activation="gelu") for seed in range(3)]
    first, second = rank(*fragile, *sound)
    assert (first.cell["activation"], second.cell["activation"]) == ("gelu", "relu")
    assert (second.mean, second.score, second.diverged) == (pytest.approx(0.9), pytest.approx(0.6), (2,))


def test_replicates_are_averaged_at_one_epoch() -> None:
    trials = [summary(0.9, seed=0, rung_accuracies={1: 0.3, 3: 0.4}), stopped(0.5, seed=1), stopped(0.6, seed=2)]
    (cell,) = rank(*trials)
    assert (cell.epochs_run, cell.mean) == (1, pytest.approx((0.3 + 0.5 + 0.6) / 3))


def test_a_control_counts_as_stopped_where_asha_would_have_stopped_it() -> None:
    """It never ranks above a cell that was really stopped by what it did in later epochs."""
    assert order(spared(0.3, 0.1), stopped(0.4, activation="gelu")) == ["gelu", "relu"]
    (cell,) = rank(spared(0.3, 0.8))
    assert (cell.epochs_run, cell.accuracies, cell.spared) == (1, {0: 0.3}, {0: 0.8})


def test_a_control_that_passed_every_rung_is_ranked_by_its_end() -> None:
    (cell,) = rank(summary(0.8))
    assert (cell.epochs_run, cell.spared) == (9, {})


def test_a_spared_control_that_diverges_later_counts_as_stopped() -> None:
    (cell,) = rank(spared(0.3, None))
    assert (cell.epochs_run, cell.accuracies, cell.diverged) == (1, {0: 0.3}, ())
    assert math.isnan(cell.spared_mean)


def test_a_control_that_diverges_at_the_rung_that_stops_it_has_diverged() -> None:
    assert rank(summary(None, "diverged", 1, stop_epoch=1)) == []


def test_the_mark_of_a_control_is_explained_with_how_it_ended() -> None:
    text = " ".join(lines := explain_spared([(3, 0.712), (8, math.nan)]))
    assert text.startswith("*: with an unstopped control, which counts as stopped at the rung")
    assert text.endswith("ended so: rank 3 71.20%, rank 8 diverged")
    assert max(map(len, lines)) <= 80
    assert explain_spared([]) == []


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_trial_without_a_final_accuracy_has_no_rank(status: str) -> None:
    assert rank(summary(0.9, status)) == []
    assert rank(summary(None, status)) == []


def test_a_failed_replicate_has_no_part() -> None:
    (cell,) = rank(summary(0.8), summary(None, "failed", 0, seed=1), summary(None, "failed", 0, seed=2))
    assert (cell.mean, cell.score) == (0.8, 0.8)


def test_budgets_are_not_mixed() -> None:
    with pytest.raises(InputError, match="^trials of 3 and 9 epochs can't be ranked together$"):
        rank(summary(0.5), summary(0.6, epochs=3, epochs_run=3))
