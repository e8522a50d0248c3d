from pathlib import Path

import pytest

from grid.optimizers import OPTIMIZERS
from grid.plan import Plan, make_plan
from grid.run import _parser, read_request


def plan(*arguments: str) -> Plan:
    return make_plan(read_request(_parser().parse_args(arguments)), device="cpu", fingerprint="abc")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_full_grid_is_1920_trials_and_58_controls() -> None:
    full = plan()
    assert (len(full.cells), len(full.trials), len(full.controls)) == (1920, 1920, 58)


def test_eighty_cells_of_the_mlp() -> None:
    assert len(plan("--only", "model=mlp", "--only", "lr_schedule=cosine", "--only", "regularization=none").cells) == 80


def test_every_trial_starts_from_its_optimizers_base_rate_times_the_scale() -> None:
    for trial in plan("--grid", "smoke", "--lr-scales", "0.5,1").trials:
        assert trial.learning_rate == OPTIMIZERS[trial.optimizer].base_learning_rate * trial.lr_scale


def test_trials_carry_budget_data_and_device() -> None:
    trial = plan("--grid", "smoke", "--epochs", "5").trials[0]
    assert (trial.epochs, trial.data, trial.data_fingerprint, trial.device) == (5, "glyphs", "abc", "cpu")


def test_the_precision_can_be_chosen() -> None:
    assert {trial.precision for trial in plan("--grid", "smoke", "--precision", "float32").trials} == {"float32"}


def test_the_same_request_is_the_same_plan() -> None:
    assert plan("--grid", "smoke") == plan("--grid", "smoke")
