"""How important factors are said to be on replays of real curves."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.replay import importance
from benchmarks.replay.__main__ import main
from benchmarks.replay.curves import PATH
from benchmarks.replay.draws import draw_controls, replay
from benchmarks.replay.examine import prepare
from benchmarks.replay.importance import METHODS, OF_OPTUNA, compare_importances, installed_methods, of_effects
from grid.plan.asha import DEFAULT_RULE


def effects(**by_factor: list[float]) -> pd.DataFrame:
    rows = [(factor, "", value) for factor, values in by_factor.items() for value in values]
    return pd.DataFrame([*rows, ("dropout", "model", 9.0)], columns=["factor", "other_factor", "effect"])


@pytest.fixture(scope="module")
def trials() -> pd.DataFrame:
    table, rng = prepare(PATH)[0], np.random.default_rng(0)
    return replay(table, DEFAULT_RULE, *draw_controls(table.cells, 60, rng), rng)


def test_importance_is_the_share_in_the_mean_squares_of_main_effects() -> None:
    shares = of_effects(effects(dropout=[0.3, -0.3], activation=[0.1, -0.1, 0.0]))
    assert shares.to_dict() == pytest.approx(
        {"activation": 0.02 / 3 / (0.09 + 0.02 / 3), "dropout": 0.09 / (0.09 + 0.02 / 3)}
    )


def test_orders_are_compared_with_the_truth_and_with_a_method_s_own_answer() -> None:
    true = pd.Series({"model": 0.6, "dropout": 0.3, "optimizer": 0.1})
    found, own = true[::-1], pd.Series({"model": 0.1, "dropout": 0.3, "optimizer": 0.6})
    assert dict(compare_importances(found, true, own)) == {"order": 1, "own order": -1, "first": 1}
    assert dict(compare_importances(own, true, true)) == {"order": -1, "own order": -1, "first": 0}


@pytest.mark.parametrize("method", METHODS)
def test_shares_of_all_varied_factors_add_up_to_one(method: str, trials: pd.DataFrame) -> None:
    if method in OF_OPTUNA:
        pytest.importorskip("optuna")
        pytest.importorskip("sklearn")
    shares = METHODS[method](trials)
    assert list(shares.index) == [name for name in trials.columns[:7] if trials[name].nunique() > 1]
    assert (shares >= 0).all()
    assert shares.sum() == pytest.approx(1)


def test_without_optuna_its_methods_are_left_out_with_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "NEEDED", ("no_such_package",))
    assert installed_methods() == ["ours", "least squares"]
    assert main(["--draws", "1", "--only", "importance"]) == 0
    printed = capsys.readouterr().out
    assert 'no_such_package not installed; run:\npip install -e ".[bench]"' in printed
    assert "PED-ANOVA" not in printed
