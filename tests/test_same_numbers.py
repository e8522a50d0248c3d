import pytest

from benchmarks.same_numbers import Comparison, compare, main
from grid.record.store import Store

ONE = {"a": {("val_accuracy", 1): 0.5, ("val_accuracy", 2): 0.6}, "b": {("val_accuracy", 1): 0.7}}


def test_equal_stores_have_no_difference() -> None:
    assert compare(ONE, ONE) == Comparison(trials=2, only_in_one=0, values=3, different=0)


def test_the_last_bit_counts() -> None:
    other = {**ONE, "b": {("val_accuracy", 1): 0.7000000000000001}}
    assert compare(ONE, other).different == 1


def test_missing_epochs_and_trials_are_differences() -> None:
    found = compare(ONE, {"a": {("val_accuracy", 1): 0.5}})
    assert (found.trials, found.only_in_one, found.values, found.different) == (1, 1, 1, 1)


def test_a_store_equals_itself(finished_store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([finished_store.uri, finished_store.uri, "--experiment", "finished"]) == 0
    assert capsys.readouterr().out.startswith("48 trials in both stores, 0 in one of them only\n")


def test_an_unknown_experiment_is_reported_in_one_line(
    finished_store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([finished_store.uri, finished_store.uri, "--experiment", "x"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.same_numbers: no experiment 'x' in ")
