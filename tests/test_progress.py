import io
import os
from collections import Counter
from pathlib import Path

import pytest

from grid.config import FACTORS
from grid.driver.progress import Progress, top_table
from grid.parts import LEVELS
from grid.parts.registry import GRIDS
from grid.ranking import TrialSummary
from grid.wording import format_seconds

MLP = {factor: LEVELS[factor][0] for factor in FACTORS}
CNN = {**MLP, "model": "cnn", "batch_norm": "on"}
WIDEST = {
    factor: max(("on",) if "on" in levels else levels, key=len) for factor, levels in GRIDS["full"].levels.items()
}
LONGEST = {factor: max(("on",) if "on" in levels else levels, key=len) for factor, levels in LEVELS.items()}


def progress(**changes: object) -> Progress:
    settings = {"total": 32, "expected_epochs": {"mlp": 10.0, "cnn": 20.0}, "concurrency": 2, "stream": io.StringIO()}
    return Progress(**(settings | changes))  # type: ignore[arg-type]


def summary(status: str, epochs_run: int, accuracy: float | None, **changes: object) -> TrialSummary:
    settings = {"cell": MLP, "seed": 0, "lr_scale": 1.0, "epochs": 9}
    settings |= (
        {"final_val_accuracy": accuracy} if status == "completed" else {"rung_accuracies": {epochs_run: accuracy}}
    )
    return TrialSummary(status=status, epochs_run=epochs_run, best_val_accuracy=accuracy, **(settings | changes))  # type: ignore[arg-type]


def test_a_notice_is_shown_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    state = progress()
    state.notice("a worker died: killed by the kernel for want of memory")
    assert "a worker died: killed by the kernel" in state.line(200)
    monkeypatch.setattr("grid.driver.progress.NOTICE_SECONDS", 0.0)
    assert "a worker died" not in state.line(200)


def test_the_line_counts_trials_by_status() -> None:
    state = progress(done=Counter(completed=3, stopped=5, diverged=1), running=2)
    state.epoch_ended(CNN, 1.0, 0.845)
    counts, rest = "9/32 done | 2 running | 5 stopped | 1 diverged", "time left unknown"
    assert state.line(200) == f"{counts} | {rest} | best 84.5% cnn constant relu sgd batch_norm"


def test_failed_trials_are_shown_when_there_are_some() -> None:
    assert "failed" not in progress().line(200)
    assert "1 failed" in progress(done=Counter(failed=1)).line(200)


@pytest.mark.parametrize("width", [40, 79])
def test_the_line_fits_the_terminal(width: int) -> None:
    state = progress()
    state.epoch_ended(LONGEST, 1.0, 0.845)
    assert len(state.line(width)) == width


def test_the_best_is_the_highest_ever_seen() -> None:
    state = progress()
    for accuracy in (0.5, 0.7, 0.6, None):
        state.epoch_ended(MLP, 1.0, accuracy)
    assert state.best == (0.7, "mlp constant relu sgd")


def test_the_time_left_weighs_each_model_by_its_own_pace() -> None:
    state = progress()
    state.epoch_ended(MLP, 1.0, 0.5)
    assert state.seconds_left() is None
    state.epoch_ended(CNN, 10.0, 0.5)
    assert state.seconds_left() == pytest.approx((9 * 1.0 + 19 * 10.0) / 2)


def test_a_file_gets_whole_lines_from_time_to_time() -> None:
    state = progress()
    state.show()
    state.show()
    state.show(last=True)
    assert isinstance(state.stream, io.StringIO)
    assert state.stream.getvalue() == f"{state.line(120)}\n" * 2


def test_the_table_ranks_full_budgets_above_higher_accuracies_of_fewer_epochs() -> None:
    longer = [summary("completed", 9, accuracy, cell=cell) for accuracy, cell in ((0.7, MLP), (0.8, CNN))]
    table = top_table([summary("stopped", 1, 0.99, cell=WIDEST), *longer])
    assert [line.split()[1] for line in table.splitlines()[1:4]] == ["80.00%", "70.00%", "99.00%"]


def test_an_accuracy_of_zero_is_an_accuracy() -> None:
    assert top_table([summary("completed", 9, 0.0)]).splitlines()[1].split()[1] == "0.00%"


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        state = progress(stream=stream)
        state.show(last=True)
        state.show(last=True)
        assert os.fstat(stream.fileno()).st_rdev == Path(os.devnull).stat().st_rdev


def test_diverged_and_failed_trials_have_no_rank_but_are_counted() -> None:
    table = top_table([summary("diverged", 2, 0.9, cell=CNN), summary("failed", 0, None), summary("completed", 9, 0.7)])
    assert table.splitlines()[1].split()[1] == "70.00%"
    assert table.splitlines()[-1] == "1 of 1 cell shown; 3 trials: 1 completed, 1 diverged, 1 failed"


def test_an_empty_table_says_so() -> None:
    assert top_table([]) == "no trial has ended yet"


def test_the_usual_table_fits_80_columns() -> None:
    table = top_table([summary("completed", 27, 0.8, cell=WIDEST, epochs=27, seed=seed) for seed in range(20)])
    assert max(map(len, table.splitlines())) <= 80


def test_the_table_has_a_row_per_cell_with_its_number_of_seeds() -> None:
    table = top_table([summary("completed", 9, accuracy, seed=seed) for seed, accuracy in enumerate((0.7, 0.8))])
    assert table.splitlines()[1].split()[:4] == ["1", "75.00%", "9/9", "x2"]


def test_a_diverged_seed_is_shown_beside_its_cell() -> None:
    table = top_table([summary("completed", 9, 0.7), summary("diverged", 2, 0.9, seed=1)])
    assert table.splitlines()[1].endswith("mlp constant relu sgd (1 diverged)")


def test_a_control_that_counts_as_stopped_is_marked_and_its_end_told() -> None:
    control = summary("completed", 9, 0.9, stop_epoch=1, rung_accuracies={1: 0.4})
    _, row, *rest = top_table([control]).splitlines()
    assert row.split()[:3] == ["1", "40.00%*", "1/9"]
    assert "ended so: rank 1 90.00%" in " ".join(rest)


def test_the_table_shows_the_best_learning_rate_scale_unless_it_is_1() -> None:
    table = top_table([summary("completed", 9, 0.8 * scale, lr_scale=scale) for scale in (0.5, 1.0, 0.7)])
    assert table.splitlines()[1].endswith("mlp constant relu sgd")
    table = top_table([summary("completed", 9, 0.8, lr_scale=0.5)])
    assert table.splitlines()[1].endswith("mlp constant relu sgd lr x0.5")


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (420, "7 min"), (12000, "3 h 20 min")])
def test_durations_are_worded_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
