from pathlib import Path

import pytest

from grid.confirm import main

ENDED = 2


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--top", "0"], "--top must be 1 to 1,000, got 0"),
        (["--seeds", "0"], "--seeds must be 1 to 1,000, got 0"),
        (["--refit", "--top", "1"], "--refit trains the best finalist alone; leave --top out"),
        (["--concurrency", "0"], "--concurrency must be 1 to 100,000, got 0"),
        (["--experiment", " "], "--experiment must be 1 to 200 printable characters"),
        (["--register", "a/b"], "--register must be a name without / and :, got 'a/b'"),
        (["--register", " "], "--register must be a name without / and :, got ' '"),
        (["--address", "nowhere"], "--address must be HOST:PORT, auto or local, got 'nowhere'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: list[str], problem: str, store_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--experiment", "some grid", "--store", store_uri, *arguments]) == ENDED
    error = capsys.readouterr().err
    assert error.startswith(f"grid.confirm: {problem}")
    assert error.count("\n") == 1


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--experiment", "some grid"]) == ENDED
    assert "there is no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_that_is_not_there_is_not_made(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["--experiment", "other", "--store", store_uri]) == ENDED
        assert capsys.readouterr().err == f"grid.confirm: no experiment 'other' in {store_uri}; it has unused\n"


def test_a_grid_without_trials_is_told_to_run_first(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--experiment", "unused", "--store", store_uri]) == ENDED
    assert capsys.readouterr().err.startswith("grid.confirm: no trial of 'unused' has ended with an accuracy; run")


def test_the_experiment_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == ENDED
    assert "--experiment" in capsys.readouterr().err
